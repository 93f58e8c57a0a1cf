"""Calls inside a model: vmap, jit, checkpoint, cond, rules of one's own for derivatives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from tests.structure.zoo.dense import mlp
from tests.structure.zoo.entry import bias, convolution, dense, explicit, model, scale


@model("vmap over time", (2, 3), dict(w=dense(3, 2), b=bias(2)))
def over_time(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda t: jnp.tanh(t @ p["w"] + p["b"]), in_axes=1, out_axes=1)(x)


@model("vmap over examples", (3,), dict(w=dense(4, 3), b=bias(4), v=dense(2, 4)))
def per_example(p: Any, x: jax.Array) -> jax.Array:
    return jax.vmap(lambda row: jnp.dot(p["v"], jnp.tanh(p["w"] @ row + p["b"])))(x)


@model("ensemble", (3,), dict(w=dense(2, 3, 4), b=bias(2, 4), v=dense(2, 4, 2), c=bias(2, 2)))
def ensemble(p: Any, x: jax.Array) -> jax.Array:
    return jnp.moveaxis(jax.vmap(mlp, (0, None))(p, x), 0, 1)


@model("ensemble of convolutions", (3, 2), dict(k=convolution(2, 3, 2, 3), b=bias(2, 3), l=convolution(2, 2, 3, 2)))
def convolutions(p: Any, x: jax.Array) -> jax.Array:
    """An ensemble of two convolutions each, which becomes one with as many groups."""

    def one(k: jax.Array, b: jax.Array, last: jax.Array) -> jax.Array:
        numbers = ("NWC", "WIO", "NWC")
        y = jnp.tanh(lax.conv_general_dilated(x, k, (1,), "SAME", dimension_numbers=numbers) + b)
        return lax.conv_general_dilated(y, last, (2,), "VALID", dimension_numbers=numbers)[:, 0]

    return jnp.moveaxis(jax.vmap(one)(p["k"], p["b"], p["l"]), 0, 1)


@model("inner jit", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2), c=bias(2)))
def jitted(p: Any, x: jax.Array) -> jax.Array:
    layer = jax.jit(lambda w, b, h: jax.nn.relu(jax.jit(jnp.matmul)(h, w) + b))
    return layer(p["v"], p["c"], layer(p["w"], p["b"], x))


@model("rematerialized", (3,), dict(w=dense(3, 3), b=bias(3), v=dense(3, 2)))
def remat(p: Any, x: jax.Array) -> jax.Array:
    save = jax.checkpoint_policies.save_only_these_names("kept")
    block = jax.checkpoint(lambda q, h: jnp.sin(checkpoint_name(h @ q["w"] + q["b"], "kept")), policy=save)
    return block(p, block(p, x)) @ p["v"]


@jax.custom_vjp
def _straight_through(x: jax.Array) -> jax.Array:
    return jnp.sign(x)


_straight_through.defvjp(lambda x: (jnp.sign(x), x), lambda x, u: (u * jnp.exp(-jnp.square(x)),))


@model("custom_vjp", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2)))
def with_a_vjp_of_its_own(p: Any, x: jax.Array) -> jax.Array:
    return _straight_through(x @ p["w"] + p["b"]) @ p["v"]


@jax.custom_jvp
def _snake(x: jax.Array, a: jax.Array) -> jax.Array:
    return x + jnp.square(jnp.sin(a * x)) / a


@_snake.defjvp
def _snake_rule(primals: Any, tangents: Any) -> Any:
    (x, a), (dx, da) = primals, tangents
    return _snake(x, a), dx * (1 + jnp.sin(2 * a * x)) + 0.5 * da * x


@model("custom_jvp of a parameter", (3,), dict(w=dense(3, 4), b=bias(4), a=explicit(), v=dense(4, 2)))
def with_a_jvp_of_its_own(p: Any, x: jax.Array) -> jax.Array:
    return _snake(x @ p["w"] + p["b"], p["a"]) @ p["v"]


@model("cond", (3,), dict(w=dense(3, 2), b=bias(2), s=scale()))
def branched(p: Any, x: jax.Array) -> jax.Array:
    return lax.cond(jnp.sum(p["s"]) > 0, lambda: jnp.tanh(x @ p["w"]), lambda: x @ p["w"] + p["b"]) * p["s"]
