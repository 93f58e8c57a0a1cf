"""Rows of a leaf, formed from the factors at its layer uses."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.structure.capture import Capture
from curvax.structure.uses import EmbeddingUse, LayerUse


def uses_by_leaf(capture: Capture) -> dict[int, list[int]]:
    """Leaf -> indices of its layer uses."""
    uses: dict[int, list[int]] = collections.defaultdict(list)
    for index, use in enumerate(capture.structure.uses):
        uses[use.leaf].append(index)
    return dict(uses)


def formed(uses: Sequence[LayerUse], a: Sequence[jax.Array], d: Sequence[jax.Array]) -> jax.Array:
    """The rows (R, *leaf) of one example of a leaf with these layer uses."""
    total = None
    for use, activations, cotangents in zip(uses, a, d, strict=True):
        if isinstance(use, EmbeddingUse):
            activations = one_hot(use, activations, cotangents.dtype)
        blocks = jnp.einsum("tgn,rtgm->rgnm", activations, cotangents, precision=jax.lax.Precision.HIGHEST)
        rows = jax.vmap(use.to_leaf)(blocks)
        total = rows if total is None else total + rows
    if total is None:
        raise AssertionError("a leaf with layer uses has at least one.")
    return total


def with_one(use: LayerUse, activations: jax.Array) -> jax.Array:
    """(T, G, n) with a one appended if the layer use has a bias."""
    if use.bias is None:
        return activations
    return jnp.concatenate([activations, jnp.ones_like(activations[..., :1])], axis=-1)


def one_hot(use: LayerUse, indices: jax.Array, dtype: np.dtype) -> jax.Array:
    """(T, 1, n) from the indices of an embedding; what finds nothing is zero."""
    return jax.nn.one_hot(indices, use.block[1], dtype=dtype)[..., None, :]
