"""Normalizations with learnt gains and shifts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from tests.structure.zoo.entry import bias, dense, explicit, model, normalize, scale


@model("rms norm", (2, 3), dict(w=dense(3, 4), g=scale(4)))
def rms(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w"]
    return h * lax.rsqrt(jnp.mean(jnp.square(h), -1, keepdims=True) + 1e-6) * (1.0 + p["g"])


@model("group norm", (3,), dict(w=dense(3, 4), g=scale(4), b=bias(4)))
def group_norm(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w"]
    grouped = normalize(h.reshape(h.shape[0], 2, -1)).reshape(h.shape)
    return grouped * p["g"] + p["b"]


@model("broadcast, then reshaped", (3,), dict(w=dense(3, 4), g=explicit(2), b=explicit(2)))
def broadcast_reshaped(p: Any, x: jax.Array) -> jax.Array:
    """One gain and one bias per group of two channels."""
    h = x @ p["w"]
    return h * jnp.repeat(p["g"], 2) + jnp.broadcast_to(p["b"][:, None], (2, 2)).reshape(-1)
