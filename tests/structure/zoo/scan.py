"""Loops over time and over layers: scan, fori_loop, while_loop, associative_scan, unrolled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.structure.zoo.entry import bias, dense, explicit, model, scale


def _cell(p: Any) -> Callable[[jax.Array, jax.Array], Any]:
    def cell(h: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        h = jnp.tanh(h @ p["u"] + t @ p["w"] + p["b"])
        return h, h

    return cell


def _time(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1)


def _state(p: Any, x: jax.Array) -> jax.Array:
    return jnp.zeros((x.shape[0], p["u"].shape[0]), x.dtype)


CELL = dict(u=dense(4, 4), w=dense(3, 4), b=bias(4))


@model("recurrent", (3, 3), CELL)
def recurrent(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(_cell(p), _state(p, x), _time(x))[0]


@model("recurrent, reverse", (3, 3), CELL)
def recurrent_reverse(p: Any, x: jax.Array) -> jax.Array:
    return _time(lax.scan(_cell(p), _state(p, x), _time(x), reverse=True, unroll=2)[1])


@model("recurrent, weights carried", (3, 3), CELL)
def recurrent_carried(p: Any, x: jax.Array) -> jax.Array:
    def cell(carry: Any, t: jax.Array) -> Any:
        h, q = carry
        return (_cell(q)(h, t)[0], q), None

    return lax.scan(cell, (_state(p, x), p), _time(x))[0][0]


@model("gated recurrent unit", (3, 3), dict(zr=dense(5, 4), b=bias(4), n=dense(3, 2), u=dense(2, 2)))
def gru(p: Any, x: jax.Array) -> jax.Array:
    def cell(h: jax.Array, t: jax.Array) -> Any:
        z, r = jnp.split(jax.nn.sigmoid(jnp.concatenate([t, h], -1) @ p["zr"] + p["b"]), 2, axis=-1)
        n = jnp.tanh(t @ p["n"] + r * (h @ p["u"]))
        return (1 - z) * n + z * h, None

    return lax.scan(cell, _state(p, x), _time(x))[0]


@model("stacked layers", (4,), dict(w=dense(3, 4, 4), b=bias(3, 4)))
@model("stacked layers on positions", (2, 4), dict(w=dense(3, 4, 4), b=bias(3, 4)))
def stacked(p: Any, x: jax.Array) -> jax.Array:
    return lax.scan(lambda h, q: (jnp.tanh(h @ q["w"] + q["b"]), None), x, p)[0]


@model("stacked layers, rematerialized", (2, 3), dict(w=dense(3, 3, 4), b=bias(3, 4), v=dense(3, 3, 4), g=scale(3, 3)))
def stacked_remat(p: Any, x: jax.Array) -> jax.Array:
    def layer(h: jax.Array, q: Any) -> Any:
        return h + jnp.tanh(h @ q["w"] + q["b"]) @ q["v"].T * q["g"], None

    return lax.scan(jax.checkpoint(layer, policy=jax.checkpoint_policies.dots_saveable), x, p)[0]


@model("layers of a list, stacked", (3,), [dict(w=dense(3, 3), b=bias(3))] * 2)
def stacked_list(p: Any, x: jax.Array) -> jax.Array:
    """Layers of a list, stacked and scanned."""
    return stacked(jax.tree.map(lambda *leaves: jnp.stack(leaves), *p), x)


@model("nested scans", (2, 2), dict(**{"in": dense(2, 3)}, layers=dict(w=dense(2, 3, 3), b=bias(2, 3))))
def nested(p: Any, x: jax.Array) -> jax.Array:
    """Stacked layers, each applied twice, over time."""

    def layer(h: jax.Array, q: Any) -> Any:
        return lax.scan(lambda g, _: (jnp.tanh(g @ q["w"] + q["b"]), None), h, length=2)[0], None

    def step(h: jax.Array, t: jax.Array) -> Any:
        return lax.scan(layer, h + t @ p["in"], p["layers"])[0], None

    return lax.scan(step, jnp.zeros((x.shape[0], 3), x.dtype), _time(x))[0]


@model("unrolled layers", (3,), dict(w=dense(3, 3, 3), b=bias(3, 3)))
def unrolled(p: Any, x: jax.Array) -> jax.Array:
    for i in range(3):
        x = jnp.tanh(x @ p["w"][i] + p["b"][i])
    return x


@model("overlapping slices", (3,), dict(w=dense(4, 3)))
def overlapping(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"][:3]) @ p["w"][1:].T @ p["w"][1:4:2].T


@model("layers indexed in a loop", (3,), dict(w=explicit(3, 3, 3), b=explicit(3, 3)))
def indexed_in_loop(p: Any, x: jax.Array) -> jax.Array:
    def body(i: jax.Array, h: jax.Array) -> jax.Array:
        return jnp.tanh(h @ p["w"][i] + p["b"][i])

    return lax.fori_loop(0, 3, body, x)


@model("dynamic index of layers", (3,), dict(w=explicit(3, 3, 3)))
def dynamic_index(p: Any, x: jax.Array) -> jax.Array:
    def body(h: jax.Array, i: jax.Array) -> Any:
        return jnp.tanh(h @ lax.dynamic_index_in_dim(p["w"], i, keepdims=False)), None

    return lax.scan(body, x, jnp.arange(3))[0]


@model("fori_loop", (3,), dict(w=dense(3, 3), b=bias(3)))
def fori(p: Any, x: jax.Array) -> jax.Array:
    return lax.fori_loop(0, 3, lambda _, h: h + 0.5 * jnp.tanh(h @ p["w"] + p["b"]), x)


@model("neural differential equation", (2,), dict(w=dense(2, 4), t=scale(4), b=bias(4), v=dense(4, 2)))
def neural_ode(p: Any, x: jax.Array) -> jax.Array:
    def field(y: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.tanh(y @ p["w"] + t * p["t"] + p["b"]) @ p["v"]

    def step(y: jax.Array, t: jax.Array) -> Any:
        half = y + 0.1 * field(y, t)
        return y + 0.2 * field(half, t + 0.1), None

    return lax.scan(step, x, jnp.arange(3, dtype=x.dtype) * 0.2)[0]


@model("while loop", (3,), dict(w=dense(3, 3), b=bias(3)))
def root(p: Any, x: jax.Array) -> jax.Array:
    """A fixed point that gradients do not enter, then one step."""
    h = lax.while_loop(
        lambda c: c[0] < 3,
        lambda c: (c[0] + 1, jnp.tanh(c[1] @ lax.stop_gradient(p["w"]) + x)),
        (0, jnp.zeros_like(x)),
    )[1]
    return jnp.tanh(lax.stop_gradient(h) @ p["w"] + p["b"])


@model("running mean over time", (3, 3), dict(w=dense(3, 4), v=dense(4, 2)))
def causal_mean(p: Any, x: jax.Array) -> jax.Array:
    count = jnp.arange(1, x.shape[1] + 1, dtype=x.dtype)
    return (jnp.cumsum(x @ p["w"], axis=1) / count[:, None]) @ p["v"]


@model("linear recurrence", (4, 3), dict(w=dense(3, 4), a=explicit(4), v=dense(4, 2)))
def linear_recurrence(p: Any, x: jax.Array) -> jax.Array:
    """A state-space layer: an associative scan over time with learnt decay."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], left[1] * right[0] + right[1]

    h = x @ p["w"]
    decay = jnp.broadcast_to(jax.nn.sigmoid(p["a"]), h.shape)
    return lax.associative_scan(combine, (decay, h), axis=1)[1] @ p["v"]
