"""batched_cholesky_solve in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.kernels._batched import BatchedSolution, unit_scale
from curvax.kernels.dense_linalg import reference as dense
from curvax.result import Result, code


def solve(matrices: jax.Array, rhs: jax.Array, damping: jax.Array, batch: tuple[int, ...]) -> BatchedSolution:
    """See `api.batched_cholesky_solve`; the operands' batch axes broadcast to `batch`."""
    n = rhs.shape[-1]
    a = matrices.astype(rhs.dtype) + damping[..., None, None] * jnp.eye(n, dtype=rhs.dtype)
    rhs = jnp.broadcast_to(rhs, (*batch, n))
    size, unit = unit_scale(rhs)
    b = rhs * unit[..., None]
    factor = dense.cholesky(a).lower
    x = _substitute(factor, b)
    x = x + _substitute(factor, b - _product(a, x))
    rest = b - _product(a, x)
    residual = jnp.sqrt(jnp.sum(rest * rest, axis=-1))
    pivots = jnp.diagonal(factor, axis1=-2, axis2=-1)
    rounding = jnp.asarray(n * jnp.finfo(rhs.dtype).eps, rhs.dtype)
    # The squared pivot is what remains of a diagonal entry; at rounding level of that entry nothing of it is known.
    positive = jnp.isfinite(pivots) & (pivots**2 > rounding * jnp.diagonal(a, axis1=-2, axis2=-1))
    positive = jnp.broadcast_to(jnp.all(positive, axis=-1), batch)
    finite = jnp.broadcast_to(jnp.all(jnp.isfinite(a), axis=(-2, -1)), batch) & jnp.isfinite(size)
    finite = finite & (jnp.isfinite(residual) | ~positive)
    result = jnp.where(positive, code(Result.CONVERGED), code(Result.NOT_POSITIVE_DEFINITE))
    result = jnp.where(finite, result, code(Result.NON_FINITE))
    solved = result == int(Result.CONVERGED)
    nan = jnp.full_like(residual, jnp.nan)
    return BatchedSolution(
        jnp.where(solved[..., None], x * size[..., None], nan[..., None]),
        result,
        jnp.zeros_like(result),
        jnp.where(solved, residual, nan),
    )


def _product(a: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...j->...i", a, v, precision=jax.lax.Precision.HIGHEST)


def _substitute(factor: jax.Array, b: jax.Array) -> jax.Array:
    """Solves L L^T x = b. The factors' last batch axis may be 1: then that axis of `b` holds the columns."""
    shared = factor.ndim > 2 and factor.shape[-3] == 1
    columns = jnp.swapaxes(b, -1, -2) if shared else b[..., None]
    lower = jnp.broadcast_to(factor[..., 0, :, :] if shared else factor, (*columns.shape[:-1], factor.shape[-1]))
    x = dense.triangular_solve(lower, dense.triangular_solve(lower, columns, False), True)
    return jnp.swapaxes(x, -1, -2) if shared else x[..., 0]
