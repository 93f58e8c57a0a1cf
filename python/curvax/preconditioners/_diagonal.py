"""What the diagonal preconditioners share."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.tree import PyTree


def mean_magnitude(diagonal: PyTree) -> jax.Array:
    """Mean of |d| over all entries of all leaves, the scale that relative floors refer to; 0 for an empty tree."""
    dtype = tree.scalar_dtype(diagonal)
    total = jnp.zeros((), dtype)
    for leaf in jax.tree.leaves(diagonal):
        total = total + jnp.sum(jnp.abs(leaf).astype(dtype))
    return total / max(tree.size(diagonal), 1)


def divide(v: jax.Array, denominator: jax.Array, scale: jax.Array) -> jax.Array:
    """v / denominator, in the dtype of `v`.

    A denominator of 0 (no curvature seen in that entry, and no damping) becomes `scale`, and 1 if that is 0 too, so
    that the division stays positive definite and 0 / 0 is 0.
    """
    safe = jnp.where(scale > 0, scale, jnp.ones_like(scale)).astype(denominator.dtype)
    return (v.astype(denominator.dtype) / jnp.where(denominator > 0, denominator, safe)).astype(v.dtype)
