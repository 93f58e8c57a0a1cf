"""batched_cholesky_solve through the XLA FFI handlers of csrc/cpu and csrc/cuda: one call for all systems.

Operands: matrices, rhs, damping. Results: value, result, iterations, residual.
"""

from __future__ import annotations

import jax

from curvax.kernels import _batched_native
from curvax.kernels._batched import BatchedSolution
from curvax.kernels._dispatch import Request, timed_on_hopper
from curvax.kernels.batched_cholesky_solve import reference

# The largest systems that the CUDA kernel takes: a thread per row, the factor in shared memory.
_ON_CHIP = 128


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    n = request.shapes[0][-1]
    if request.platform in ("gpu", "cuda") and n > _ON_CHIP:
        return f"the CUDA handler takes up to {_ON_CHIP} unknowns, and these systems have {n}"
    return _batched_native.cannot(request)


def better_not(request: Request) -> str | None:
    """Why the reference is the better choice; None if it is not: on the CPU it was slower wherever it was measured."""
    return timed_on_hopper(request)


def solve(
    matrices: jax.Array, rhs: jax.Array, damping: jax.Array, batch: tuple[int, ...], *, threads: int = 0
) -> BatchedSolution:
    """See `api.batched_cholesky_solve`. `threads` of the CPU: 0 lets the handler decide, with the same result."""

    def fallback(matrices: jax.Array, rhs: jax.Array, damping: jax.Array) -> BatchedSolution:
        return reference.solve(matrices, rhs, damping, batch)

    return _batched_native.solve(
        "curvax_batched_cholesky_solve",
        [matrices, rhs, damping],
        batch,
        {},
        fallback,
        threads=threads,
        cuda=matrices.shape[-1] <= _ON_CHIP,
    )
