"""Weights that are copied, broadcast, joined, padded or permuted before their product."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.structure.zoo.entry import bias, dense, embedding, explicit, model, scale


@model("copies and barriers", (3,), dict(w=dense(3, 4), v=dense(4, 2)))
def barrier(p: Any, x: jax.Array) -> jax.Array:
    w, v = lax.optimization_barrier((p["w"], p["v"]))
    return jnp.tanh(x @ jnp.copy(w)) @ v


@model("weights broadcast", (3,), dict(w=scale(4), s=scale(), v=explicit(2, 2)))
def outer_broadcast(p: Any, x: jax.Array) -> jax.Array:
    """A vector that is broadcast to a matrix of weights; a kernel that is repeated."""
    w = jnp.broadcast_to(p["w"], (3, 4)) * p["s"]
    return jnp.tanh(x @ w) @ jnp.tile(p["v"], (2, 1))


@model("weights joined", (2, 3), dict(w=dense(3, 2), v=dense(3, 2), b=bias(2), c=bias(2)))
def concatenated(p: Any, x: jax.Array) -> jax.Array:
    """Weights joined before one product."""
    return jnp.tanh(x @ jnp.concatenate([p["w"], p["v"]], axis=1) + jnp.concatenate([p["b"], p["c"]]))


@model("weights padded", (3,), dict(w=dense(3, 4), b=bias(2)))
def padded(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.pad(x, ((0, 0), (0, 1))) @ jnp.pad(p["w"], ((1, 0), (0, 0))) + jnp.pad(p["b"], (1, 1)))


@model("weights reversed", (3,), dict(w=dense(3, 4), b=bias(4)))
def flipped(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.flip(x @ p["w"][::-1, ::-1], -1) + jnp.flip(p["b"]))


@model("weights rolled and permuted", (3,), dict(w=dense(3, 3), v=embedding(3, 2)))
def rotated(p: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ jnp.roll(p["w"], 1, axis=1)) @ p["v"][np.asarray([2, 0, 1])]
