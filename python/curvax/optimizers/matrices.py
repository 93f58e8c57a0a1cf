"""How Shampoo and SOAP see a parameter: a matrix, a stack of matrices, or a vector."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

Factors: TypeAlias = tuple[jax.Array, ...]
"""One per side of a leaf: (..., d, d), or its diagonal (..., d) for a side that is too long."""


def sides(leaf: jax.Array, max_dim: int) -> tuple[tuple[int, bool], ...]:
    """(length, whether a dense factor is kept) of each side: none of a scalar, one of a vector, else the last two axes.

    Leading axes of a leaf with more than two are a stack of matrices, such as layers stacked for `jax.lax.scan`.
    """
    return tuple((d, d <= max_dim) for d in leaf.shape[-2:])


def outer(gradient: jax.Array, side: int, dense: bool) -> jax.Array:
    """G G^T of the first side, G^T G of the second; g g^T of a vector; or the diagonal."""
    if gradient.ndim == 1:
        return jnp.outer(gradient, gradient) if dense else gradient * gradient
    if not dense:
        return jnp.sum(gradient * gradient, axis=-1 if side == 0 else -2)
    g = gradient if side == 0 else jnp.swapaxes(gradient, -1, -2)
    return jnp.matmul(g, jnp.swapaxes(g, -1, -2), precision=jax.lax.Precision.HIGHEST)


def multiply(factor: jax.Array, x: jax.Array, side: int, *, transpose: bool = False) -> jax.Array:
    """F X on the first side, X F^T on the second; of a diagonal factor entry by entry."""
    if x.ndim == 1:
        f = factor.T if transpose and factor.ndim == 2 else factor
        return jnp.matmul(f, x, precision=jax.lax.Precision.HIGHEST) if f.ndim == 2 else f * x
    if factor.ndim == x.ndim - 1:
        return x * (factor[..., :, None] if side == 0 else factor[..., None, :])
    f = jnp.swapaxes(factor, -1, -2) if transpose else factor
    if side == 0:
        return jnp.matmul(f, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(x, jnp.swapaxes(f, -1, -2), precision=jax.lax.Precision.HIGHEST)
