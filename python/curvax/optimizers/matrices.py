"""How Shampoo and SOAP see a parameter: a matrix, a stack of matrices, or a vector."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.eigenbases import adjoint

Factors: TypeAlias = tuple[jax.Array, ...]
"""One per side of a leaf: (..., d, d), or its diagonal (..., d) for a side that is too long."""


def upcast(gradient: jax.Array) -> jax.Array:
    """The gradient of a leaf in the dtype of the state, at least single precision."""
    return gradient.astype(tree.accumulation_dtype(gradient.dtype))


def real_dtype(dtype: Any) -> Any:
    """The dtype of magnitudes."""
    return jnp.finfo(dtype).dtype


def decayed(old: jax.Array, new: jax.Array, decay: float | jax.Array) -> jax.Array:
    """Decay old + (1 - decay) new; a decay that `optax.inject_hyperparams` traces has a dtype of its own."""
    weight = jnp.asarray(decay, real_dtype(old.dtype)).astype(old.dtype)
    return weight * old + (1 - weight) * new


def corrected(average: jax.Array, decay: float | jax.Array, count: jax.Array) -> jax.Array:
    """An average of `count` terms that started at zero, as a mean."""
    dtype = real_dtype(average.dtype)
    weight = 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)
    return average / weight.astype(average.dtype)


def sides(shape: tuple[int, ...], max_dim: int) -> tuple[tuple[int, bool], ...]:
    """(length, whether a dense factor is kept) of each side: none of a scalar, one of a vector, else the last two axes.

    Leading axes of a leaf with more than two are a stack of matrices, such as layers stacked for `jax.lax.scan`.
    """
    return tuple((d, d <= max_dim) for d in shape[-2:])


def outer(gradient: jax.Array, side: int, dense: bool) -> jax.Array:
    """G G^H of the first side, G^T conj(G) of the second; g g^H of a vector; or the diagonal, which is real."""
    if not dense:
        squares = jnp.square(jnp.abs(gradient))
        return squares if gradient.ndim == 1 else jnp.sum(squares, axis=-1 if side == 0 else -2)
    if gradient.ndim == 1:
        return jnp.outer(gradient, gradient.conj())
    g = gradient if side == 0 else jnp.swapaxes(gradient, -1, -2)
    return jnp.matmul(g, adjoint(g), precision=jax.lax.Precision.HIGHEST)


def multiply(factor: jax.Array, x: jax.Array, side: int) -> jax.Array:
    """F X on the first side, X F^T on the second; of a diagonal factor entry by entry."""
    factor = factor.astype(x.dtype)
    if factor.ndim == max(x.ndim - 1, 1):
        return x * (factor if x.ndim == 1 else jnp.expand_dims(factor, -2 if side else -1))
    if side == 0:
        return jnp.matmul(factor, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(x, jnp.swapaxes(factor, -1, -2), precision=jax.lax.Precision.HIGHEST)
