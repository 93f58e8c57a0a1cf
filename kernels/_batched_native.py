"""What the native handlers of the ops on many linear systems share: which requests they take, and the foreign call.

The handlers broadcast: every operand has all batch axes, each of the full size or of size 1. That is also what
`vmap_method="expand_dims"` makes of a vmapped call, so nothing is ever copied to be broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax import ffi
from curvax.kernels import _native
from curvax.kernels._batched import BatchedSolution
from curvax.kernels._dispatch import Request
from curvax.kernels._vary import vary_alike

_F32, _F64, _BF16 = np.dtype(np.float32), np.dtype(np.float64), np.dtype(jnp.bfloat16)
_DTYPES = ({_F32}, {_F64}, {_F32, _BF16})

Solve: TypeAlias = Callable[..., BatchedSolution]
_Results: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request on matrices and right-hand sides; None if they can."""
    if set(request.dtypes) not in _DTYPES:
        actual = ", ".join(map(str, request.dtypes))
        return f"the native handlers take float32, float64, or bfloat16 matrices beside float32, and this is {actual}"
    return _native.cannot(request)


def solve(
    target: str,
    operands: Sequence[jax.Array],
    batch: tuple[int, ...],
    attributes: dict[str, int],
    fallback: Solve,
    *,
    threads: int,
    cuda: bool,
) -> BatchedSolution:
    """Calls the handler of the platform that the computation is lowered for; the fallback where there is none.

    Args:
      target: the handlers' name.
      operands: matrices, right-hand sides (..., n) and whatever else the handlers take.
      batch: the batch axes of the results.
      attributes: of the handlers.
      fallback: the reference on the same operands.
      threads: of the CPU; 0 lets the handler decide.
      cuda: whether there is a handler for NVIDIA GPUs.
    """

    def reference(*operands: jax.Array) -> _Results:
        solution = fallback(*operands)
        return solution.value, solution.result, solution.iterations, solution.residual

    def on_cpu(*operands: jax.Array) -> _Results:
        ffi.require_native("cpu")
        return _call(target, operands, batch, attributes | {"threads": threads})

    def on_cuda(*operands: jax.Array) -> _Results:
        ffi.require_native("cuda")
        return _call(target, operands, batch, attributes)

    results = jax.lax.platform_dependent(
        *vary_alike(operands),
        cpu=on_cpu if ffi.native_status("cpu").available else reference,
        cuda=on_cuda if cuda and ffi.native_status("cuda").available else reference,
        default=reference,
    )
    return BatchedSolution(*results)


def _call(target: str, operands: Sequence[jax.Array], batch: tuple[int, ...], attributes: dict[str, int]) -> _Results:
    """(value, result, iterations, residual)."""
    rhs = operands[1]
    results = [
        jax.ShapeDtypeStruct((*batch, rhs.shape[-1]), rhs.dtype),
        jax.ShapeDtypeStruct(batch, np.int32),
        jax.ShapeDtypeStruct(batch, np.int32),
        jax.ShapeDtypeStruct(batch, rhs.dtype),
    ]
    handler = jax.ffi.ffi_call(target, results, vmap_method="expand_dims")
    integers = {name: np.int64(value) for name, value in attributes.items()}
    value, result, iterations, residual = vary_alike(handler(*operands, **integers), like=operands)
    return value, result, iterations, residual
