"""batched_cg as a Mosaic GPU kernel: one warpgroup per system, whose matrix is read once and stays in shared memory.

    device memory                      shared memory of one block, 227 KiB              registers of its four warps
    A (n, n), b, x0, M^-1   --copies-->  A (max(n, 64), n)  b  x0  M^-1   product  --64 rows at a time-->  all vectors
    x, outcome              <--copies--  x                                (x, where n is above 128)

One block solves one system from start to end (`on_chip`), so its iterations touch no device memory. The copy engine
brings the matrix and the vectors, and zeros for rows that a small matrix has not. Systems whose size is no multiple of
8 are padded to one beforehand, with zeros, in one more pass over the matrices. `interpret` runs the kernel on the CPU,
for the tests.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from curvax.kernels import _mosaic
from curvax.kernels._batched import BatchedSolution
from curvax.kernels._dispatch import Request
from curvax.kernels._vary import vary_alike, varying_like
from curvax.kernels.batched_cg import on_chip, reference

_SYSTEM = "system"
# The largest system whose matrix and vectors fit beside what Mosaic takes of a block's 227 KiB of shared memory.
_MOST = 232
_F32, _BF16 = np.dtype(np.float32), np.dtype(jnp.bfloat16)
# Offsets into an operand are 32-bit.
_ELEMENTS = 2**31


def cannot(request: Request) -> str | None:
    """Why the kernel cannot run a request (operands: matrices, right-hand sides); None if it can."""
    reason = _mosaic.cannot(request)
    if reason is not None:
        return reason
    if set(request.dtypes) not in ({_F32}, {_F32, _BF16}):
        actual = ", ".join(map(str, request.dtypes))
        # Mosaic's copies between device and shared memory know no float64.
        return f"the Mosaic kernel takes float32, or bfloat16 matrices beside float32, and this is {actual}"
    n = request.shapes[0][-1]
    if n > _MOST:
        return f"a multiprocessor's shared memory holds matrices of up to {_MOST} unknowns, and these have {n}"
    if request.size == 0:
        return "there are no elements"
    if request.size >= _ELEMENTS:
        return f"offsets in the Mosaic kernel are 32-bit, and the matrices have {request.size} elements"
    return None


@dataclasses.dataclass(frozen=True)
class _Optional:
    """Which of the optional operands there are; those stand last, in this order."""

    start: bool
    inverse: bool

    def named(self, operands: Sequence[Any]) -> tuple[Any, Any]:
        """(start, inverse), each `None` if it is missing."""
        rest = list(operands)
        return rest.pop(0) if self.start else None, rest.pop(0) if self.inverse else None


def solve(
    matrices: jax.Array,
    rhs: jax.Array,
    x0: jax.Array | None,
    tol: jax.Array,
    maxiter: jax.Array,
    inverse: jax.Array | None,
    *,
    interpret: Any = None,
) -> BatchedSolution:
    """See `api.batched_cg`; all operands have the same number of batch axes, each whole or of size 1."""
    optional = _Optional(x0 is not None, inverse is not None)

    def kernel(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return _launch(optional, operands, interpret)

    def plain(*operands: jax.Array) -> tuple[jax.Array, ...]:
        matrices, rhs, tol, maxiter, *rest = operands
        start, inverse = optional.named(rest)
        full = reference.broadcast(_batch(operands), rhs, start, tol, maxiter, inverse)
        solution = reference.solve_dense(matrices, *full)
        return solution.value, solution.result, solution.iterations, solution.residual

    operands = vary_alike([matrices, rhs, tol, maxiter, *(v for v in (x0, inverse) if v is not None)])
    if 0 in _batch(operands):
        return BatchedSolution(*plain(*operands))
    if interpret is not None:
        return BatchedSolution(*_batching(kernel)(*operands))
    return BatchedSolution(*jax.lax.platform_dependent(*operands, cuda=_batching(kernel), default=plain))


def _batch(operands: Sequence[jax.Array]) -> tuple[int, ...]:
    """The batch axes of the operands of `solve` together."""
    own = (2, 1, 0, 0, 1, 1)
    return np.broadcast_shapes(*(v.shape[: v.ndim - k] for v, k in zip(operands, own, strict=False)))


def _batching(kernel: Callable[..., tuple[jax.Array, ...]]) -> Callable[..., tuple[jax.Array, ...]]:
    """The kernel with a rule for `jax.vmap`: one more batch axis, of size 1 where an operand is not mapped."""

    @jax.custom_batching.custom_vmap
    def call(*operands: jax.Array) -> tuple[jax.Array, ...]:
        return kernel(*operands)

    @call.def_vmap
    def rule(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[tuple[jax.Array, ...], Any]:
        del size
        results = call(*(v if own else v[None] for v, own in zip(operands, batched, strict=True)))
        return results, tuple(True for _ in results)

    return call


def _launch(optional: _Optional, operands: Sequence[jax.Array], interpret: Any) -> tuple[jax.Array, ...]:
    """(value, result, iterations, residual)."""
    plgpu = _mosaic.backend()
    matrices, rhs, tol, maxiter, *rest = operands
    batch, n = _batch(operands), rhs.shape[-1]
    count = math.prod(batch)
    matrix_of = _index(batch, matrices.shape[:-2])
    tol, maxiter = (jnp.broadcast_to(v, batch).reshape(count) for v in (tol, maxiter))
    vectors = [_padded(jnp.broadcast_to(v, (*batch, n)).reshape(count, n), 1) for v in (rhs, *rest)]
    matrices = _padded(matrices.reshape(-1, n, n), 2)
    size = matrices.shape[-1]

    def body(a_ref: Any, tol_ref: Any, maxiter_ref: Any, *refs: Any) -> None:
        sources, memory = refs[: len(vectors)], refs[len(vectors) :]
        value, result, iterations, residual, arrived, matrix, product, *stores = memory
        solution = stores.pop() if on_chip.keeps_solution(size) else None
        system = jax.lax.axis_index(_SYSTEM)
        # A start that is not static, for a static slice has to be within bounds.
        whole = a_ref.at[matrix_of(system), pl.ds(system * 0, on_chip.rows_of(size))]
        plgpu.copy_gmem_to_smem(whole, matrix, arrived)
        for source, store in zip(sources, stores, strict=True):
            plgpu.copy_gmem_to_smem(source.at[system], store, arrived)
        plgpu.barrier_wait(arrived)
        start, inverse = optional.named(stores[1:])
        limits = tol_ref[system], maxiter_ref[system]
        answer = on_chip.solve(on_chip.System(matrix, stores[0], start, inverse, product, solution, *limits))
        stores[0][...] = answer.value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(stores[0], value.at[system])
        result[system], iterations[system], residual[system] = answer.result, answer.iterations, answer.residual
        plgpu.wait_smem_to_gmem(0)

    scalars = [jax.ShapeDtypeStruct((count,), dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32)]
    outputs = [jax.ShapeDtypeStruct(vectors[0].shape, jnp.float32), *scalars]
    kernel = plgpu.kernel(
        body,
        out_type=tuple(varying_like(each, rhs) for each in outputs),
        scratch_types=[
            plgpu.Barrier(num_arrivals=1 + len(vectors)),
            plgpu.SMEM((on_chip.rows_of(size), size), matrices.dtype),
            plgpu.SMEM((on_chip.rows_of(size),), jnp.float32),
            *[plgpu.SMEM((size,), jnp.float32)] * (len(vectors) + on_chip.keeps_solution(size)),
        ],
        grid=(count,),
        grid_names=(_SYSTEM,),
        interpret=interpret,
    )
    value, *others = kernel(matrices, tol, maxiter, *vectors)
    return value[:, :n].reshape(*batch, n), *(v.reshape(batch) for v in others)


def _index(batch: tuple[int, ...], own: tuple[int, ...]) -> Callable[[jax.Array], jax.Array]:
    """Maps the number of a system to that of its matrix, where some of the matrices' batch axes have size 1."""

    def of(system: jax.Array) -> jax.Array:
        index, stride = jnp.int32(0), 1
        for whole, size in zip(reversed(batch), reversed(own), strict=True):
            if size > 1:
                index = index + system % whole * stride
            system, stride = system // whole, stride * size
        return index

    return of


def _padded(array: jax.Array, own: int) -> jax.Array:
    """The array with zeros at the end of its `own` last axes."""
    missing = -array.shape[-1] % on_chip.COLUMNS
    return jnp.pad(array, [(0, 0)] * (array.ndim - own) + [(0, missing)] * own) if missing else array
