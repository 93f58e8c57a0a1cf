"""Complex weights, whole or as two real leaves, inside of loops, calls and branches; outputs are real."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.structure.zoo.entry import dense, model


def _weights(p: Any, name: str) -> jax.Array:
    return lax.complex(p[name]["re"], p[name]["im"])


def _pair(*shape: int) -> dict[str, Any]:
    return dict(re=dense(*shape), im=dense(*shape))


def _log_cosh(z: jax.Array) -> jax.Array:
    return jnp.log(jnp.cosh(z))


def _parts(z: jax.Array) -> jax.Array:
    return jnp.concatenate([jnp.real(z), jnp.imag(z)], axis=-1)


@model("complex, recurrent", (3, 2), dict(u=_pair(3, 3), w=_pair(2, 3)))
def recurrent(p: Any, x: jax.Array) -> jax.Array:
    """Carries a complex state that begins as a real one."""

    def cell(h: jax.Array, t: jax.Array) -> Any:
        h = jnp.sin(h @ _weights(p, "u") + t.astype(h.dtype) @ _weights(p, "w"))
        return h, jnp.real(h)

    start = lax.complex(*[jnp.zeros((x.shape[0], 3), x.dtype)] * 2)
    last, each = lax.scan(cell, start, jnp.swapaxes(x, 0, 1))
    return _parts(last) + jnp.sum(each, axis=0)[:, :1]


@model("complex, stacked layers", (3,), dict(w=_pair(2, 3, 3), o=dense(3, 2)))
def stacked(p: Any, x: jax.Array) -> jax.Array:
    """A scan goes through complex weights, which are rematerialized, halved and divided by a complex number."""

    @jax.checkpoint
    def layer(h: jax.Array, w: jax.Array) -> Any:
        left, right = jnp.split(w, [1], axis=-1)
        turn = jnp.asarray(1.0 + 2.0j, h.dtype)
        return jnp.concatenate([_log_cosh(h @ left / turn), jnp.sin(h @ right / 2.0)], axis=-1), None

    h, _ = lax.scan(layer, lax.complex(x, 0.5 * x), _weights(p, "w"))
    return jnp.real(h) @ p["o"]


@model("complex, branches", (3,), dict(w=_pair(3, 4)))
def branched(p: Any, x: jax.Array) -> jax.Array:
    """A branch of several, chosen by a parameter-free number that the trace does not know."""
    which = jnp.argmax(jnp.cos(jnp.arange(3.0))) + 1
    z = lax.complex(x, x)
    return _parts(lax.switch(which, [lambda w, f=f: f(z @ w) for f in (jnp.sin, _log_cosh, jnp.cos)], _weights(p, "w")))
