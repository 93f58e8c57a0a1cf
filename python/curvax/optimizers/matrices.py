"""The arithmetic that SOAP, Shampoo and Muon share, on stacks of matrices (..., rows, columns) and on vectors."""

from __future__ import annotations

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.eigenbases import adjoint

BySide: TypeAlias = dict[int, jax.Array]
"""Of a stack, by side (0 rows, 1 columns): (..., d, d), or a diagonal (..., d) for a side that is too long."""


def upcast(gradient: jax.Array) -> jax.Array:
    """The gradient of a leaf in the dtype of the state, at least single precision."""
    return gradient.astype(tree.accumulation_dtype(gradient.dtype))


def real_dtype(dtype: Any) -> Any:
    """The dtype of magnitudes."""
    return jnp.finfo(dtype).dtype


def decayed(old: jax.Array, new: jax.Array, decay: float | jax.Array, taken: jax.Array) -> jax.Array:
    """Decay old + (1 - decay) new, or the old where the new is not `taken`.

    A decay that `optax.inject_hyperparams` traces has a dtype of its own.
    """
    dtype = real_dtype(old.dtype)
    weight = jnp.where(taken, jnp.asarray(decay, dtype), jnp.ones((), dtype)).astype(old.dtype)
    return weight * old + (1 - weight) * new


def finite_parts(updates: Any) -> tuple[jax.Array, list[jax.Array]]:
    """(whether all gradients are finite, the upcast leaves, zero if they are not).

    Averages that weigh these zeros with nothing stay as they were, and no later update remembers the bad one.
    """
    finite = tree.all_finite(updates)
    return finite, [jnp.where(finite, g, jnp.zeros_like(g)) for g in map(upcast, jax.tree.leaves(updates))]


def corrected(average: jax.Array, decay: float | jax.Array, count: jax.Array) -> jax.Array:
    """An average of `count` terms that started at zero, as a mean."""
    dtype = real_dtype(average.dtype)
    weight = 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)
    return average / weight.astype(average.dtype)


def outer(gradient: jax.Array, side: int, dense: bool) -> jax.Array:
    """G G^H of the first side, G^T conj(G) of the second; g g^H of a vector; or the diagonal, which is real."""
    if not dense:
        squares = jnp.square(jnp.abs(gradient))
        return squares if gradient.ndim == 1 else jnp.sum(squares, axis=-1 if side == 0 else -2)
    if gradient.ndim == 1:
        return jnp.outer(gradient, gradient.conj())
    g = gradient if side == 0 else jnp.swapaxes(gradient, -1, -2)
    return jnp.matmul(g, adjoint(g), precision=jax.lax.Precision.HIGHEST)


def nonzero(factor: jax.Array, dense: bool) -> jax.Array:
    """Whether a factor (..., d, d), or diagonal (..., d), has seen a gradient: of each matrix."""
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1) if dense else factor
    return jnp.any(diagonal != 0, axis=-1)


def root_mean_square(x: jax.Array) -> jax.Array:
    """Of each matrix (..., 1, 1), safe against underflow of the squares."""
    top = tree.divisor(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True, initial=0))
    return top * jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x) / top), axis=(-2, -1), keepdims=True))


def over_root_scale(x: jax.Array) -> jax.Array:
    """X over the root of its root mean square: X X^H is then in the units of X, as X R^-1 X^H is for R in these."""
    scale = root_mean_square(x)
    return x / jnp.sqrt(jnp.where(scale > 0, scale, jnp.ones_like(scale))).astype(x.dtype)


def multiply(factor: jax.Array, x: jax.Array, side: int) -> jax.Array:
    """F X on the first side, X F^T on the second; of a diagonal factor entry by entry."""
    factor = factor.astype(x.dtype)
    if factor.ndim == max(x.ndim - 1, 1):
        return x * (factor if x.ndim == 1 else jnp.expand_dims(factor, -2 if side else -1))
    if side == 0:
        return jnp.matmul(factor, x, precision=jax.lax.Precision.HIGHEST)
    return jnp.matmul(x, jnp.swapaxes(factor, -1, -2), precision=jax.lax.Precision.HIGHEST)
