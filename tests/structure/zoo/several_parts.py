"""A leaf that plays several parts, one that plays none, and numbers of other kinds."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tests.structure.zoo.entry import bias, dense, explicit, model, none, scale


@model("weight and bias", (3,), dict(w=explicit(3, 4), v=dense(4, 2)))
def weight_and_bias(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["w"][0]) @ p["v"]


@model("scale and weight", (2, 3), dict(w=explicit(3)))
def scale_and_weight(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"])[..., None] * p["w"]


@model("penalized", (3,), dict(w=explicit(3, 4), v=dense(4, 2)))
def penalized(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) @ p["v"] + jnp.sum(jnp.square(p["w"]))


@model("bias through an activation", (3,), dict(w=dense(3, 2), s=explicit(), b=explicit(2)))
def activated_bias(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"]) * jax.nn.softplus(p["s"]) + jax.nn.silu(p["b"])


@model("bfloat16 inside", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2)), tolerance=0.02)
def half_inside(p: Any, x: jax.Array) -> jax.Array:
    half = jnp.bfloat16
    h = jnp.tanh(x.astype(half) @ p["w"].astype(half) + p["b"].astype(half))
    return (h @ p["v"].astype(half)).astype(x.dtype)


@model("float32 inside", (3,), dict(w=dense(3, 4), b=bias(4), v=dense(4, 2)), tolerance=1e-06)
def single_inside(p: Any, x: jax.Array) -> jax.Array:
    h = jnp.tanh(x.astype(jnp.float32) @ p["w"].astype(jnp.float32) + p["b"].astype(jnp.float32))
    return (h @ p["v"].astype(jnp.float32)).astype(x.dtype)


@model("integer inputs", (3,), dict(w=dense(3, 2), b=bias(2)), high=9)
def integers(p: Any, counts: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.log1p(counts.astype(p["w"].dtype)) @ p["w"] + p["b"])


@model("dead, empty and scalar leaves", (3,), dict(w=dense(3, 2), dead=none(7), empty=none(0, 2), s=scale()))
def dead(p: Any, x: jax.Array) -> jax.Array:
    return (x @ p["w"] + jnp.sum(p["empty"])) * p["s"]
