"""tree_cg through the XLA FFI handlers of csrc/cpu and csrc/cuda: one call for all leaves, in place where XLA allows.

Operands and results are flat: `cg_update` takes alpha, lam and the leaves of x, p, r, q and gives rr and the leaves of
x and r; `cg_direction` takes beta and the leaves of z, p and gives those of p; `dots` takes the leaves of a and b of
each pair in turn and gives one scalar per pair. Batch axes of the scalars stand in front of every leaf, which is what
`vmap_method="broadcast_all"` makes of a vmapped call.

On a GPU an op with sums has one result more, scratch memory for one term per inner product and block of a leaf; XLA
allocates it, so that the handlers allocate nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np

from curvax import ffi
from curvax.kernels import _native
from curvax.kernels._dispatch import Request, timed_on_hopper
from curvax.kernels._vary import vary_alike
from curvax.kernels.tree_cg import reference
from curvax.tree import PyTree

# Where the handler of cg_direction was measured to be no slower than the reference.
_DIRECTION_SIZES = (2**14, 2**21)

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    if len(request.dtypes) != 1 or request.dtypes[0] not in _DTYPES:
        actual = ", ".join(map(str, request.dtypes)) or "no leaves"
        return f"the native handlers take leaves of one dtype, float32 or float64, and these have {actual}"
    return _native.cannot(request)


def direction_better_not(request: Request) -> str | None:
    """Why the reference is the better choice for `cg_direction`; None if it is not.

    Without a reduction XLA's own loop is as good: it wins by the overhead of a call on short vectors, and on vectors
    beyond the caches, where both wait for memory.
    """
    low, high = _DIRECTION_SIZES
    if request.platform != "cpu":
        return timed_on_hopper(request)
    if low <= request.size <= high:
        return None
    return f"XLA's own loop is as fast outside {low} to {high} elements, and these are {request.size}"


def cg_update(
    alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree, *, threads: int = 0
) -> tuple[PyTree, PyTree, jax.Array]:
    """See `api.cg_update`. `threads` of the CPU: 0 lets the handler decide; the result does not depend on it."""
    structure = jax.tree.structure(x)
    n = structure.num_leaves
    operands = vary_alike([alpha, lam, *jax.tree.leaves([x, p, r, q])])
    aliases = {2 + i: 1 + i for i in range(n)} | {2 + 2 * n + i: 1 + n + i for i in range(n)}

    def vectors(flat: Sequence[jax.Array]) -> list[jax.ShapeDtypeStruct]:
        return [*map(_like, flat[:n]), *map(_like, flat[2 * n : 3 * n])]

    def cpu(alpha: jax.Array, lam: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        return _cpu_call("curvax_cg_update", [_like(alpha), *vectors(flat)], aliases, threads, alpha, lam, *flat)

    def cuda(alpha: jax.Array, lam: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        results = [_like(alpha), *vectors(flat), _scratch(flat[:n], 1)]
        return _cuda_call("curvax_cg_update", results, aliases, alpha, lam, *flat)[:-1]

    def fallback(alpha: jax.Array, lam: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        new_x, new_r, rr = reference.cg_update(alpha, lam, *(list(flat[g * n : (g + 1) * n]) for g in range(4)))
        return [rr, *new_x, *new_r]

    rr, *flat = _on_each_platform(cpu, cuda, fallback, operands)
    return jax.tree.unflatten(structure, flat[:n]), jax.tree.unflatten(structure, flat[n:]), rr


def cg_direction(beta: jax.Array, z: PyTree, p: PyTree, *, threads: int = 0) -> PyTree:
    """See `api.cg_direction`. `threads` of the CPU: 0 lets the handler decide."""
    structure = jax.tree.structure(p)
    n = structure.num_leaves
    operands = vary_alike([beta, *jax.tree.leaves([z, p])])
    aliases = {1 + n + i: i for i in range(n)}

    def cpu(beta: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        return _cpu_call("curvax_cg_direction", [*map(_like, flat[n:])], aliases, threads, beta, *flat)

    def cuda(beta: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        return _cuda_call("curvax_cg_direction", [*map(_like, flat[n:])], aliases, beta, *flat)

    def fallback(beta: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        return reference.cg_direction(beta, list(flat[:n]), list(flat[n:]))

    return jax.tree.unflatten(structure, _on_each_platform(cpu, cuda, fallback, operands))


def dots(pairs: Sequence[tuple[PyTree, PyTree]], *, threads: int = 0) -> tuple[jax.Array, ...]:
    """See `api.dots`. `threads` of the CPU: 0 lets the handler decide; the result does not depend on it."""
    n = jax.tree.structure(pairs[0][0]).num_leaves
    operands = vary_alike(jax.tree.leaves(list(pairs)))

    def cpu(*flat: jax.Array) -> list[jax.Array]:
        return _cpu_call("curvax_dots", [jax.ShapeDtypeStruct((), flat[0].dtype)] * len(pairs), {}, threads, *flat)

    def cuda(*flat: jax.Array) -> list[jax.Array]:
        results = [*[jax.ShapeDtypeStruct((), flat[0].dtype)] * len(pairs), _scratch(flat[:n], len(pairs))]
        return _cuda_call("curvax_dots", results, {}, *flat)[:-1]

    def fallback(*flat: jax.Array) -> list[jax.Array]:
        vectors = [list(flat[i * n : (i + 1) * n]) for i in range(2 * len(pairs))]
        return list(reference.dots(list(zip(vectors[::2], vectors[1::2], strict=True))))

    return tuple(_on_each_platform(cpu, cuda, fallback, operands))


_Call: TypeAlias = Callable[..., list[jax.Array]]


def _on_each_platform(cpu: _Call, cuda: _Call, fallback: _Call, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """Calls what suits the platform that the computation is lowered for; the fallback where a module is absent."""
    return jax.lax.platform_dependent(
        *operands,
        cpu=cpu if ffi.native_status("cpu").available else fallback,
        cuda=cuda if ffi.native_status("cuda").available else fallback,
        default=fallback,
    )


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _scratch(leaves: Sequence[jax.Array], products: int) -> jax.ShapeDtypeStruct:
    """Bytes for a float64 per inner product and block of each leaf, as csrc/common/leaves.h cuts them."""
    block: int = ffi.native_status("cuda").build["block"]
    return jax.ShapeDtypeStruct((8 * products * sum(-(-leaf.size // block) for leaf in leaves),), np.uint8)


def _cpu_call(
    target: str, results: list[jax.ShapeDtypeStruct], aliases: dict[int, int], threads: int, *operands: jax.Array
) -> list[jax.Array]:
    ffi.require_native("cpu")
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    return vary_alike(call(*operands, threads=np.int64(threads)), like=operands)


def _cuda_call(
    target: str, results: list[jax.ShapeDtypeStruct], aliases: dict[int, int], *operands: jax.Array
) -> list[jax.Array]:
    ffi.require_native("cuda")
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    return vary_alike(call(*operands), like=operands)
