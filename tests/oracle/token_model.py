"""A pooled language model whose position ids all examples may share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PyTree = Any


def drawn(seed: int, *shape: int, dtype: Any = jnp.float64) -> jax.Array:
    return jnp.array(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def tokens(params: PyTree, x: PyTree) -> jax.Array:
    """The model: tokens (B, T), position ids in any shape that broadcasts against them."""
    hidden = params["embed"][x["tokens"]] + params["place"][x["places"]]
    return jnp.tanh(hidden @ params["w"]).mean(1) @ params["v"]


def token_params(length: int) -> PyTree:
    return {
        "embed": drawn(0, 9, 4),
        "place": drawn(1, length, 4),
        "w": drawn(2, 4, 5) / 2,
        "v": drawn(3, 5, 3) / 2,
    }


def token_inputs(examples: int, length: int, places: Any) -> PyTree:
    ids = np.random.default_rng(4).integers(0, 9, (examples, length))
    return {"tokens": jnp.asarray(ids), "places": jnp.asarray(places)}
