"""The dense factorizations in plain JAX: its own, with outcomes.

A matrix that is not finite is replaced before LAPACK sees it, which may not return from one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.kernels._lapack import matrix_by_matrix
from curvax.kernels.dense_linalg.factors import CholeskyFactor, Eigenpairs, QrFactors
from curvax.result import Result, code


def cholesky(matrices: jax.Array) -> CholeskyFactor:
    """See `api.cholesky`."""
    finite, safe = _finite(matrices)
    lower = matrix_by_matrix(lambda a: jax.lax.linalg.cholesky(a, symmetrize_input=False), safe)
    usable = jnp.all(jnp.isfinite(lower), axis=(-2, -1))
    return CholeskyFactor(_known(finite & usable, lower), _result(finite, usable, Result.NOT_POSITIVE_DEFINITE))


def triangular_solve(lower: jax.Array, rhs: jax.Array, transpose: bool) -> jax.Array:
    """See `api.triangular_solve`."""

    def solve(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.linalg.triangular_solve(a, b, left_side=True, lower=True, transpose_a=transpose)

    return matrix_by_matrix(solve, lower, rhs)


def eigh(matrices: jax.Array) -> Eigenpairs:
    """See `api.eigh`."""
    finite, safe = _finite(matrices)
    vectors, values = matrix_by_matrix(lambda a: tuple(jax.lax.linalg.eigh(a, symmetrize_input=False)), safe)
    usable = jnp.all(jnp.isfinite(values), axis=-1)
    kept = finite & usable
    return Eigenpairs(
        jnp.where(kept[..., None], values, jnp.full_like(values, jnp.nan)),
        _known(kept, vectors),
        _result(finite, usable, Result.MAX_ITERATIONS),
    )


def qr(matrices: jax.Array) -> QrFactors:
    """See `api.qr`."""
    finite, safe = _finite(matrices)
    q, r = matrix_by_matrix(lambda a: tuple(jax.lax.linalg.qr(a, full_matrices=False)), safe)
    return QrFactors(_known(finite, q), _known(finite, r), _result(finite, finite, Result.NON_FINITE))


def _finite(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Which matrices are finite, and the matrices with the identity in place of those that are not."""
    finite = jnp.all(jnp.isfinite(matrices), axis=(-2, -1))
    identity = jnp.eye(*matrices.shape[-2:], dtype=matrices.dtype)
    return finite, jnp.where(finite[..., None, None], matrices, identity)


def _known(which: jax.Array, matrices: jax.Array) -> jax.Array:
    return jnp.where(which[..., None, None], matrices, jnp.full_like(matrices, jnp.nan))


def _result(finite: jax.Array, usable: jax.Array, failure: Result) -> jax.Array:
    outcome = jnp.where(usable, code(Result.CONVERGED), code(failure))
    return jnp.where(finite, outcome, code(Result.NON_FINITE))
