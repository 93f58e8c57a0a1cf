"""The op batched_cholesky_solve: many independent symmetric positive definite systems, solved directly.

Per system of size n with one right-hand side (on the CPU right-hand sides in turn that share a matrix share its factor;
the CUDA handler factorizes for each):

| part | reads | writes | FLOPs |
|---|---|---|---|
| factor | n^2 | n^2 (kept in cache by the native form) | n^3 / 3 |
| solve, refine once, true residual | 4 n^2 from the factor, 2 n^2 from the matrix | n | 8 n^2 |

Batching: `jax.vmap` over any operand is exact, and what is not mapped is not copied.
Partitioning: systems are independent, so along the batch axes nothing is communicated: inside `jax.shard_map` each
device solves its own. Outside, the reference is partitioned by XLA like any JAX code; the native handlers are not, so
with several devices they are not taken there.
Differentiation: none; the op stays off the differentiated path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.kernels import _lapack
from curvax.kernels._batched import (
    BatchedSolution,
    align,
    batch_shape,
    check_matrices,
    common_dtype,
    widen_matrices,
)
from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select
from curvax.kernels._operands import arrays
from curvax.kernels.batched_cholesky_solve import native, reference

BATCHED_CHOLESKY_SOLVE = Op(
    "batched_cholesky_solve",
    (
        Variant("native", native.cannot, native.better_not, gain="each factor stays in cache"),
        Variant("reference"),
    ),
)
OPS = (BATCHED_CHOLESKY_SOLVE,)


def batched_cholesky_solve(
    matrices: jax.Array,
    rhs: jax.Array,
    *,
    damping: jax.Array | float | None = None,
    implementation: Implementation | Choice | None = None,
) -> BatchedSolution:
    """Solves (A + damping I) x = b for many symmetric positive definite A at once, with one step of refinement.

    Leading axes broadcast as in NumPy. Several right-hand sides of one matrix are a batch axis of `rhs` against an axis
    of size 1, or none, of the matrices: (b, 1, n, n) with (b, k, n), or (n, n) with (k, n).

    Outcomes, per system: CONVERGED, the system is solved and `residual` says how well; NOT_POSITIVE_DEFINITE, a pivot
    is not above n eps times its diagonal entry; NON_FINITE, matrix or right-hand side hold NaN or infinity. The value
    is NaN in the last two: there is no solution to take by mistake. NaN in one system never reaches another.

    Args:
      matrices: (..., n, n), float32, float64 or narrower (upcast), taken as symmetric: which triangle counts is not
        said.
      rhs: right-hand sides, (..., n).
      damping: added to the diagonal, a scalar or one per system; `None` for 0.
      implementation: `None` for the best supported one.

    Returns:
      The solutions, with outcome and true residual of each system; `iterations` is 0. The arithmetic is in the widest
      dtype of matrices and `rhs`, at least float32.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    op = BATCHED_CHOLESKY_SOLVE.name
    matrices, rhs = arrays(matrices, rhs)
    check_matrices(op, matrices, rhs)
    dtype = common_dtype(matrices, rhs)
    lam = jnp.asarray(0 if damping is None else damping).astype(dtype)
    batch = batch_shape(op, matrices=(matrices, 2), rhs=(rhs, 1), damping=(lam, 0))
    matrices = align(widen_matrices(matrices, dtype), 2, len(batch))
    rhs = align(rhs.astype(dtype), 1, len(batch))
    lam = align(lam, 0, len(batch))
    request = Request.of(matrices, rhs)
    if select(BATCHED_CHOLESKY_SOLVE, implementation, request).implementation == "native":
        return native.solve(matrices, rhs, lam, batch)
    _lapack.prepare(request)
    return reference.solve(matrices, rhs, lam, batch)
