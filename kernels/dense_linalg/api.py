"""The ops cholesky, triangular_solve, eigh and qr on stacks of dense matrices.

Per matrix (n, n), or (m, n) of rank at most k = min(m, n), all of it read once and the results written once:

| op | FLOPs |
|---|---|
| cholesky | n^3 / 3 |
| triangular_solve, c columns | n^2 c; a third of it for the identity |
| eigh | about 6 n^3: 4/3 n^3 to tridiagonal form, up to 8/3 n^3 for its eigenvectors, 2 n^3 to take them back |
| qr | 2 k (m n - k (m + n) / 2 + k^2 / 3) for R, and as much again for Q |

On the CPU the native forms share XLA's own threads among the matrices of a stack and, where matrices are large, inside
of each. They never wait for a thread that has not begun, so that any number of calls may be in flight, and use neither
LAPACK nor its threads.

The references are JAX's own factorizations. On the CPU these are LAPACK, which is called for one matrix after the
other, with its threads held to one (`curvax.kernels._lapack` says why, and what that does to the rest of the process).

Batching: leading axes are batch axes, and `jax.vmap` over any operand is exact.
Partitioning: along the batch axes nothing is communicated; axes of the matrices are gathered.
Differentiation: where JAX's own operation has derivatives, and through it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels import _lapack
from curvax.kernels._batched import check_floating, common_dtype
from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select
from curvax.kernels._operands import arrays
from curvax.kernels.dense_linalg import native, reference
from curvax.kernels.dense_linalg.factors import CholeskyFactor as CholeskyFactor
from curvax.kernels.dense_linalg.factors import Eigenpairs as Eigenpairs
from curvax.kernels.dense_linalg.factors import QrFactors as QrFactors


def _op(name: str) -> Op:
    return Op(name, (Variant("native", native.cannot, gain="on XLA's own threads"), Variant("reference")))


CHOLESKY, TRIANGULAR_SOLVE, EIGH, QR = _op("cholesky"), _op("triangular_solve"), _op("eigh"), _op("qr")
OPS = (CHOLESKY, TRIANGULAR_SOLVE, EIGH, QR)


def cholesky(matrices: jax.Array, *, implementation: Implementation | Choice | None = None) -> CholeskyFactor:
    """The Cholesky factors of symmetric positive definite matrices.

    Args:
      matrices: (..., n, n), float32, float64 or narrower (upcast to float32), taken as symmetric: which triangle
        counts is not said.
      implementation: `None` for the best supported one.

    Returns:
      The factors and how each ended. A failure in one matrix never reaches another.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    matrices = _square("cholesky", matrices)
    if _chosen(CHOLESKY, implementation, matrices) == "native":
        return native.cholesky(matrices)
    return reference.cholesky(matrices)


def triangular_solve(
    lower: jax.Array,
    rhs: jax.Array,
    *,
    transpose: bool = False,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """The solution X of L X = B, or of L^T X = B.

    Args:
      lower: L, (..., n, n), float32, float64 or narrower (upcast); what stands above the diagonal is not read.
      rhs: B, (..., n, c), whose leading axes broadcast against those of L.
      transpose: solve with L^T.
      implementation: `None` for the best supported one.

    Returns:
      X, in the wider dtype of both, at least float32. A zero on the diagonal makes infinities and NaN of it, as in any
      division.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    op = TRIANGULAR_SOLVE.name
    lower, rhs = arrays(lower, rhs)
    if min(lower.ndim, rhs.ndim) < 2 or lower.shape[-2:] != (rhs.shape[-2],) * 2:
        raise TypeError(f"{op}: lower must be (..., n, n) and rhs (..., n, c), got {lower.shape} and {rhs.shape}")
    check_floating(op, lower=lower, rhs=rhs)
    dtype = common_dtype(lower, rhs)
    try:
        batch = np.broadcast_shapes(lower.shape[:-2], rhs.shape[:-2])
    except ValueError:
        actual = f"{lower.shape[:-2]} of lower, {rhs.shape[:-2]} of rhs"
        raise TypeError(f"{op}: the leading axes do not broadcast: {actual}; give them matching batch axes") from None
    lower = jnp.broadcast_to(lower.astype(dtype), (*batch, *lower.shape[-2:]))
    rhs = jnp.broadcast_to(rhs.astype(dtype), (*batch, *rhs.shape[-2:]))
    if _chosen(TRIANGULAR_SOLVE, implementation, lower, rhs) == "native":
        return native.triangular_solve(lower, rhs, transpose)
    return reference.triangular_solve(lower, rhs, transpose)


def eigh(matrices: jax.Array, *, implementation: Implementation | Choice | None = None) -> Eigenpairs:
    """Eigenvalues and eigenvectors of symmetric matrices.

    Values are known to rounding relative to the largest magnitude, and vectors are orthonormal to rounding, however
    close values are. The native form is divide and conquer (Cuppen 1981; Gu and Eisenstat 1995), as LAPACK's syevd.

    Args:
      matrices: (..., n, n), float32, float64 or narrower (upcast to float32), taken as symmetric: which triangle
        counts is not said. Complex ones, taken as Hermitian, go through the reference.
      implementation: `None` for the best supported one.

    Returns:
      The pairs and how each decomposition ended. A failure in one matrix never reaches another.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    matrices = _square("eigh", matrices, hermitian=True)
    if _chosen(EIGH, implementation, matrices) == "native":
        return native.eigh(matrices)
    return reference.eigh(matrices)


def qr(matrices: jax.Array, *, implementation: Implementation | Choice | None = None) -> QrFactors:
    """The reduced QR factorization of matrices of any shape.

    Args:
      matrices: (..., m, n), float32, float64 or narrower (upcast to float32); complex ones go through the reference.
      implementation: `None` for the best supported one.

    Returns:
      The factors and how each factorization ended. A failure in one matrix never reaches another.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    (matrices,) = arrays(matrices)
    if matrices.ndim < 2:
        raise TypeError(f"qr: matrices must be (..., m, n), got {matrices.shape}")
    _check_inexact("qr", matrices)
    matrices = matrices.astype(common_dtype(matrices))
    if _chosen(QR, implementation, matrices) == "native":
        return native.qr(matrices)
    return reference.qr(matrices)


def _square(op: str, matrices: Any, *, hermitian: bool = False) -> jax.Array:
    (array,) = arrays(matrices)
    if array.ndim < 2 or array.shape[-1] != array.shape[-2]:
        raise TypeError(f"{op}: matrices must be (..., n, n), got {array.shape}")
    _check_inexact(op, array) if hermitian else check_floating(op, matrices=array)
    return array.astype(common_dtype(array))


def _check_inexact(op: str, matrices: jax.Array) -> None:
    if not jnp.issubdtype(matrices.dtype, jnp.inexact):
        raise TypeError(f"{op}: matrices has dtype {matrices.dtype}: convert it to a floating or complex dtype")


def _chosen(op: Op, implementation: Implementation | Choice | None, *operands: jax.Array) -> Implementation:
    request = Request.of(*operands)
    chosen = select(op, implementation, request).implementation
    if chosen == "reference":
        _lapack.prepare(request)
    return chosen
