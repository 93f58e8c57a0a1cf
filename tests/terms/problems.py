"""Losses of three terms that share their parameters, and the dense float64 truth of their sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import Term, Terms
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.oracle import dense, losses

PyTree = Any
SCALES = {"labels": 1.0, "slopes": 0.3, "images": 2.5}


def normal(seed: int, *shape: int) -> jax.Array:
    """Standard normal numbers of the default dtype."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.result_type(float))


def parameters() -> PyTree:
    """Leaves that several terms use, in different layers, and some that one alone does."""
    return {
        "w": normal(0, 4, 5) / 2,
        "b": normal(1, 5),
        "q": normal(2, 5, 5) / 2,
        "k": normal(3, 2, 2, 1, 4) / 2,
        "v": normal(4, 5, 3),
        "c": normal(5, 3),
    }


def trunk(p: PyTree, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ p["w"] + p["b"])


def attention(p: PyTree, x: jax.Array) -> jax.Array:
    """(B, T, 4) -> (B, 3)."""
    h = trunk(p, x)
    mixed = jax.nn.softmax(h @ p["q"] @ jnp.swapaxes(h, 1, 2)) @ h
    return jnp.mean(mixed, axis=1) @ p["v"] + p["c"]


def slopes(p: PyTree, x: jax.Array) -> jax.Array:
    """(B, 4) -> (B, 2): derivatives along two directions of one output."""

    def one(z: jax.Array) -> jax.Array:
        def u(y: jax.Array) -> jax.Array:
            return jnp.sum(trunk(p, y) @ p["q"])

        return jnp.stack([jax.jvp(u, (z,), (e,))[1] for e in jnp.eye(4, dtype=z.dtype)[:2]])

    return jax.vmap(one)(x)


def convolution(p: PyTree, x: jax.Array) -> jax.Array:
    """(B, 4, 4, 1) -> (B, 3)."""
    h = jax.lax.conv_general_dilated(x, p["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return trunk(p, jnp.tanh(h).mean(axis=(1, 2))) @ p["v"] + p["c"]


def terms() -> Terms:
    """Different models, losses, numbers of outputs and examples, weights, and a mask."""
    return Terms(
        labels=Term(attention, SoftmaxCrossEntropy(), SCALES["labels"]),
        slopes=Term(slopes, SquaredError(), SCALES["slopes"], key="points"),
        images=Term(convolution, SoftmaxCrossEntropy(), SCALES["images"], weight_key="w"),
    )


def batch() -> dict[str, Any]:
    """4 sequences, 7 points and 6 images."""
    labels = np.random.default_rng(9).integers(0, 3, 10)
    return {
        "labels": {"x": normal(6, 4, 3, 4), "y": jnp.asarray(labels[:4], jnp.int32)},
        "points": {"x": normal(7, 7, 4), "y": normal(8, 7, 2)},
        "images": {
            "x": normal(10, 6, 4, 4, 1),
            "y": jnp.asarray(labels[4:], jnp.int32),
            "w": jnp.asarray([1.0, 0.5, 0.0, 2.0, 1.0, 1.0], jnp.result_type(float)),
        },
    }


def truths(params: PyTree, data: dict[str, Any]) -> dict[str, dense.Truth]:
    """Of each term at weight 1."""
    oracles = {
        "labels": (attention, losses.softmax_cross_entropy, "labels"),
        "slopes": (slopes, losses.squared_error, "points"),
        "images": (convolution, losses.softmax_cross_entropy, "images"),
    }
    return {
        name: dense.truth(predict, loss, params, data[key]["x"], data[key]["y"], data[key].get("w"))
        for name, (predict, loss, key) in oracles.items()
    }


def total(found: dict[str, dense.Truth], of: str, scales: dict[str, float] = SCALES) -> np.ndarray:
    """The weighted sum of "ggn" or "gradient" over the terms."""
    return np.sum([scales[name] * getattr(truth, of) for name, truth in found.items()], axis=0)
