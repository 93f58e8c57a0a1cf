"""The dense factorizations through the XLA FFI handlers of csrc/cpu/linalg: one call for all matrices of a stack.

| handler | operands | results |
|---|---|---|
| curvax_cholesky | matrices (..., n, n) | lower (..., n, n), result (...,) |
| curvax_triangular_solve | lower (..., n, n), rhs (..., n, c) | value (..., n, c) |
| curvax_eigh | matrices (..., n, n) | values (..., n), vectors (..., n, n), result (...,) |
| curvax_qr | matrices (..., m, n) | q (..., m, k), r (..., k, n), result (...,) |

All have the same batch axes, and `vmap_method="broadcast_all"` makes more of them. Results are int32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.xla_metadata import set_xla_metadata

from curvax import ffi
from curvax.kernels._dispatch import Request
from curvax.kernels._lapack import with_derivatives_of
from curvax.kernels._vary import vary_alike
from curvax.kernels.dense_linalg import reference
from curvax.kernels.dense_linalg.factors import CholeskyFactor, Eigenpairs, QrFactors


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    if request.platform != "cpu":
        return f"the C++ handlers run on cpu, and this is {request.platform}"
    if any(np.issubdtype(dtype, np.complexfloating) for dtype in request.dtypes):
        return "the C++ handlers take real matrices"
    status = ffi.native_status("cpu")
    return None if status.available else status.reason


def cholesky(matrices: jax.Array, *, threads: int = 0) -> CholeskyFactor:
    """See `api.cholesky`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    results = [_like(matrices), _ends(matrices)]
    return _on_cpu("curvax_cholesky", CholeskyFactor, results, reference.cholesky, [matrices], {"threads": threads})


def triangular_solve(lower: jax.Array, rhs: jax.Array, transpose: bool, *, threads: int = 0) -> jax.Array:
    """See `api.triangular_solve`; the operands have the same batch axes. `threads` as in `cholesky`."""

    def fallback(lower: jax.Array, rhs: jax.Array) -> jax.Array:
        return reference.triangular_solve(lower, rhs, transpose)

    attributes = {"threads": threads, "transpose": int(transpose)}
    return _on_cpu("curvax_triangular_solve", lambda x: x, [_like(rhs)], fallback, [lower, rhs], attributes)


def eigh(matrices: jax.Array, *, threads: int = 0) -> Eigenpairs:
    """See `api.eigh`. `threads` as in `cholesky`."""
    results = [_like(matrices, *matrices.shape[:-1]), _like(matrices), _ends(matrices)]
    return _on_cpu("curvax_eigh", Eigenpairs, results, reference.eigh, [matrices], {"threads": threads})


def qr(matrices: jax.Array, *, threads: int = 0) -> QrFactors:
    """See `api.qr`. `threads` as in `cholesky`."""
    *batch, m, n = matrices.shape
    k = min(m, n)
    results = [_like(matrices, *batch, m, k), _like(matrices, *batch, k, n), _ends(matrices)]
    return _on_cpu("curvax_qr", QrFactors, results, reference.qr, [matrices], {"threads": threads})


def _like(matrices: jax.Array, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape or matrices.shape, matrices.dtype)


def _ends(matrices: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(matrices.shape[:-2], np.int32)


def _on_cpu(
    target: str,
    made: Callable[..., Any],
    results: Sequence[jax.ShapeDtypeStruct],
    fallback: Callable[..., Any],
    operands: Sequence[jax.Array],
    attributes: Mapping[str, int],
) -> Any:
    """`made` of the handler's results where the computation is lowered for the CPU, the fallback elsewhere."""

    def call(*operands: jax.Array) -> Any:
        handler = jax.ffi.ffi_call(target, list(results), vmap_method="broadcast_all")
        integers = {name: np.int64(value) for name, value in attributes.items()}
        # The leading axes that a sharded call may be cut along (`ffi.native_status` registers that it may).
        with set_xla_metadata(num_batch_dims=str(operands[0].ndim - 2)):
            answers = handler(*operands, **integers)
        return made(*vary_alike(answers, like=operands))

    ffi.require_native("cpu")
    return jax.lax.platform_dependent(*vary_alike(operands), cpu=with_derivatives_of(fallback, call), default=fallback)
