"""LAPACK inside XLA's CPU client: what plain JAX's factorizations need there.

LAPACK knows nothing of XLA's threads, and JAX's wrapper waits where it must not:

- Of a batched call jaxlib 0.10 gives each thread of XLA's pool some matrices, from a thread of that pool, and waits.
  Calls at once, as many as there are threads, wait for each other for good. So no call here has more than one matrix,
  which never waits, also under `jax.vmap`.
- SciPy's OpenBLAS, which JAX calls, has threads of its own that wait for the next piece of a factorization without
  giving up their core. Where XLA's threads, or other processes, want that core too, 15 ms become seconds. So its
  threads are held to one. That setting is the process's: SciPy's own linear algebra runs on one thread from then on.
  `threadpoolctl.threadpool_limits` gives them back, and OPENBLAS_NUM_THREADS, if it is set, is left to decide.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from typing import Any

import jax
import threadpoolctl

from curvax.kernels._dispatch import Request
from curvax.tree import PyTree

_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def prepare(request: Request) -> None:
    """Holds LAPACK's threads to one, once per process, where a factorization of plain JAX is to run on the CPU."""
    if request.platform == "cpu":
        _hold_threads()


def matrix_by_matrix(function: Callable[..., PyTree], *operands: jax.Array) -> Any:
    """`function` of matrices over the leading axes of stacks (..., m, n), which all operands share.

    On the CPU it is called on one matrix at a time, also where the stack has further axes by `jax.vmap`; elsewhere on
    all at once. Derivatives are the function's own.
    """
    batch = operands[0].ndim - 2

    def over_batch(one: Callable[..., PyTree], *operands: jax.Array) -> PyTree:
        for _ in range(batch):
            one = jax.vmap(one)
        return one(*operands)

    if 0 in operands[0].shape[:-2]:  # a loop over nothing still needs a function's shapes
        return over_batch(function, *operands)
    return jax.lax.platform_dependent(
        *operands,
        # A function with a rule of its own for `vmap` has no derivatives: JAX would have to transpose it.
        cpu=functools.partial(over_batch, with_derivatives_of(function, jax.custom_batching.sequential_vmap(function))),
        default=functools.partial(over_batch, function),
    )


def with_derivatives_of(function: Callable[..., PyTree], fast: Callable[..., PyTree]) -> Callable[..., Any]:
    """`fast`, with the derivatives of a `function` that computes the same."""
    operation = jax.custom_jvp(fast)
    operation.defjvp(lambda primals, tangents: jax.jvp(function, primals, tangents))
    return operation


@functools.cache
def _hold_threads() -> None:
    # JAX takes its LAPACK from there, at the first factorization: before that there are no threads to hold.
    importlib.import_module("scipy.linalg.cython_lapack")
    if any(os.environ.get(name) for name in _VARIABLES):
        return
    for library in threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers:
        # NumPy's wheel brings a library of its own, which JAX never calls.
        if "numpy.libs" not in library.filepath:
            library.set_num_threads(1)
