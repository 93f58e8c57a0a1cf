"""batched_cg through the XLA FFI handlers of csrc/cpu/batched_handlers.cc and csrc/cuda/batched_cg.cu.

Operands: matrices, rhs, tol, maxiter, then x0 if `start` is 1 and the preconditioner's inverse if `inverse` is 1.
Results: value, result, iterations, residual.
"""

from __future__ import annotations

import jax
import numpy as np

from curvax.kernels import _batched_native
from curvax.kernels._batched import BatchedSolution
from curvax.kernels._dispatch import Request, timed_on_hopper
from curvax.kernels.batched_cg import reference

# The largest systems whose matrix a multiprocessor holds, in registers and shared memory.
_ON_CHIP = {np.dtype(np.float32): 256, np.dtype(np.float64): 128}


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    n = request.shapes[0][-1]
    most = min((_ON_CHIP[dtype] for dtype in request.dtypes if dtype in _ON_CHIP), default=0)
    if request.platform in ("gpu", "cuda") and n > most:
        return f"a multiprocessor holds matrices of up to {most} unknowns in this dtype, and these have {n}"
    return _batched_native.cannot(request)


def better_not(request: Request) -> str | None:
    """Why the reference is the better choice; None if it is not: on the CPU it was slower wherever it was measured."""
    return timed_on_hopper(request)


def solve(
    matrices: jax.Array,
    rhs: jax.Array,
    x0: jax.Array | None,
    tol: jax.Array,
    maxiter: jax.Array,
    inverse: jax.Array | None,
    batch: tuple[int, ...],
    *,
    threads: int = 0,
) -> BatchedSolution:
    """See `api.batched_cg`. `threads` of the CPU: 0 lets the handler decide; the result does not depend on it."""

    def fallback(*operands: jax.Array) -> BatchedSolution:
        matrices, rhs, tol, maxiter, *optional = operands
        start = optional.pop(0) if x0 is not None else None
        full = reference.broadcast(batch, rhs, start, tol, maxiter, optional[0] if optional else None)
        return reference.solve_dense(matrices, *full)

    return _batched_native.solve(
        "curvax_batched_cg",
        [matrices, rhs, tol, maxiter, *(v for v in (x0, inverse) if v is not None)],
        batch,
        {"start": int(x0 is not None), "inverse": int(inverse is not None)},
        fallback,
        threads=threads,
        cuda=matrices.shape[-1] <= _ON_CHIP[np.dtype(rhs.dtype)],
    )
