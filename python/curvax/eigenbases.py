"""Eigenvectors of sums of outer products, where rounding must not choose them.

A factor of fewer terms than rows has a space of eigenvalues that are zero to rounding, and any basis of that space
would do. The one that a decomposition returns is made of the last digits: it changes with the number of devices, with
padding that is masked, with the order of a sum. What is measured along such eigenvectors changes with it.

Here that space gets the basis in which a fixed diagonal matrix W is diagonal. Let K be the known eigenvectors and
P = I - K K^T. Then P W P has the eigenvalue 0 on the span of K, and on the rest the fixed basis with eigenvalues
between those of W:

    eigenvalues of the factor      0   0   0.3  1.2        ascending, two of them known
    eigenvectors                   ?   ?   k1   k2
    eigenvalues of P W P           0   0   1.4  1.8
    eigenvectors                   k   k   f1   f2         -> f1  f2  k1  k2
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.kernels._dispatch import Choice, Implementation
from curvax.kernels.dense_linalg import eigh


def adjoint(matrix: jax.Array) -> jax.Array:
    """The conjugate transpose of each matrix."""
    return jnp.swapaxes(matrix, -1, -2).conj()


def unit_scale(factor: jax.Array) -> jax.Array:
    """A power of two near the mean diagonal of each factor, (..., 1, 1); 1 of a factor without any.

    Divided by it, factors of gradients that differ by a power of two are the same bits: no factorization underflows,
    and none sees the scale of the loss.
    """
    return unit_of(jnp.mean(jnp.abs(jnp.diagonal(factor, axis1=-2, axis2=-1)), axis=-1))[..., None, None]


def unit_of(means: jax.Array) -> jax.Array:
    """A power of two near each mean; 1 where it is zero or not finite."""
    _, exponent = jnp.frexp(means)
    scale = jnp.ldexp(jnp.ones_like(means), exponent)
    return jnp.where((means > 0) & jnp.isfinite(means), scale, jnp.ones_like(means))


def rounding(eigenvalues: jax.Array) -> jax.Array:
    """What eigenvalues of factors, in the last axis, must exceed to be known: rounding leaves an eighth of it."""
    return 16 * jnp.finfo(eigenvalues.dtype).eps * jnp.sum(eigenvalues, axis=-1, keepdims=True)


def eigenbasis(
    factors: jax.Array, implementation: Implementation | Choice | None = None
) -> tuple[jax.Array, jax.Array]:
    """Eigenvalues, ascending, and orthonormal eigenvectors in columns, with a fixed basis where values are rounding.

    The second decomposition, of P W P, runs only if some factor has such values.

    Args:
      factors: (..., n, n), symmetric or Hermitian and positive semidefinite.
      implementation: of `eigh`.

    Returns:
      values (..., n) and vectors (..., n, n). Rows and columns of zeros keep to themselves.
    """
    pairs = eigh(factors, implementation=implementation)
    unknown = pairs.values <= rounding(pairs.values)

    return pairs.values, with_fixed_rest(pairs.vectors, unknown, implementation)


def with_fixed_rest(
    vectors: jax.Array, unknown: jax.Array, implementation: Implementation | Choice | None = None
) -> jax.Array:
    """Orthonormal columns, (..., n, n), with a fixed basis of what the others leave in the place of `unknown` ones."""

    def fixed() -> jax.Array:
        n = vectors.shape[-1]
        known = jnp.where(unknown[..., None, :], jnp.zeros_like(vectors), vectors)
        others = jnp.eye(n, dtype=vectors.dtype) - _product(known, adjoint(known))
        weights = jnp.linspace(1, 2, n, dtype=jnp.finfo(vectors.dtype).dtype)
        weighed = others * weights.astype(vectors.dtype)
        basis = eigh(_product(weighed, others), implementation=implementation).vectors
        # Its last columns, as many as there are unknown ones, take their places in order.
        count = jnp.sum(unknown, axis=-1, keepdims=True)
        place = (n - count + jnp.cumsum(unknown, axis=-1) - 1) % n
        return jnp.where(unknown[..., None, :], jnp.take_along_axis(basis, place[..., None, :], axis=-1), vectors)

    return jax.lax.cond(jnp.any(unknown), fixed, lambda: vectors)


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
