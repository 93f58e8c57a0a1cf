"""tree_cg through the XLA FFI handlers of csrc/cpu/tree_cg.cc: one call for all leaves, in place where XLA allows it.

Operands and results are flat: `cg_update` takes alpha, lam and the leaves of x, p, r, q and gives rr and the leaves of
x and r; `cg_direction` takes beta and the leaves of z, p and gives those of p; `dots` takes the leaves of a and b of
each pair in turn and gives one scalar per pair. Batch axes of the scalars stand in front of every leaf, which is what
`vmap_method="broadcast_all"` makes of a vmapped call.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from curvax import ffi
from curvax.kernels._dispatch import Request
from curvax.kernels.tree_cg import reference
from curvax.tree import PyTree

# Where the handler of cg_direction was measured to be no slower than the reference.
_DIRECTION_SIZES = (2**14, 2**21)

_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))


def cannot(request: Request) -> str | None:
    """Why the handlers cannot run a request; None if they can."""
    if request.platform != "cpu":
        return f"the native handlers run on cpu, and this is {request.platform}"
    if len(request.dtypes) != 1 or request.dtypes[0] not in _DTYPES:
        found = ", ".join(map(str, request.dtypes)) or "no leaves"
        return f"the native handlers take leaves of one dtype, float32 or float64, and these have {found}"
    if request.devices != 1:
        return f"outside jax.shard_map the native handlers are not partitioned, and there are {request.devices} devices"
    status = ffi.native_status()
    return None if status.available else status.reason


def direction_better_not(request: Request) -> str | None:
    """Why the reference is the better choice for `cg_direction`; None if it is not.

    Without a reduction XLA's own loop is as good: it wins by the overhead of a call on short vectors, and on vectors
    beyond the caches, where both wait for memory.
    """
    low, high = _DIRECTION_SIZES
    if low <= request.size <= high:
        return None
    return f"XLA's own loop is as fast outside {low} to {high} elements, and these are {request.size}"


def cg_update(
    alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree, *, threads: int = 0
) -> tuple[PyTree, PyTree, jax.Array]:
    """See `api.cg_update`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    structure = jax.tree.structure(x)
    n = structure.num_leaves
    operands = _vary_alike([alpha, lam, *jax.tree.leaves([x, p, r, q])])

    def call(alpha: jax.Array, lam: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        results = [_like(alpha), *map(_like, flat[:n]), *map(_like, flat[2 * n : 3 * n])]
        aliases = {2 + i: 1 + i for i in range(n)} | {2 + 2 * n + i: 1 + n + i for i in range(n)}
        return _ffi_call("curvax_cg_update", results, aliases, threads, alpha, lam, *flat)

    def fallback(alpha: jax.Array, lam: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        new_x, new_r, rr = reference.cg_update(alpha, lam, *(list(flat[g * n : (g + 1) * n]) for g in range(4)))
        return [rr, *new_x, *new_r]

    rr, *flat = jax.lax.platform_dependent(*operands, cpu=call, default=fallback)
    return jax.tree.unflatten(structure, flat[:n]), jax.tree.unflatten(structure, flat[n:]), rr


def cg_direction(beta: jax.Array, z: PyTree, p: PyTree, *, threads: int = 0) -> PyTree:
    """See `api.cg_direction`. `threads`: 0 lets the handler decide."""
    structure = jax.tree.structure(p)
    n = structure.num_leaves
    operands = _vary_alike([beta, *jax.tree.leaves([z, p])])

    def call(beta: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        aliases = {1 + n + i: i for i in range(n)}
        return _ffi_call("curvax_cg_direction", [_like(leaf) for leaf in flat[n:]], aliases, threads, beta, *flat)

    def fallback(beta: jax.Array, *flat: jax.Array) -> list[jax.Array]:
        return reference.cg_direction(beta, list(flat[:n]), list(flat[n:]))

    return jax.tree.unflatten(structure, jax.lax.platform_dependent(*operands, cpu=call, default=fallback))


def dots(pairs: Sequence[tuple[PyTree, PyTree]], *, threads: int = 0) -> tuple[jax.Array, ...]:
    """See `api.dots`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    n = jax.tree.structure(pairs[0][0]).num_leaves
    operands = _vary_alike(jax.tree.leaves(list(pairs)))

    def call(*flat: jax.Array) -> list[jax.Array]:
        return _ffi_call("curvax_dots", [jax.ShapeDtypeStruct((), flat[0].dtype)] * len(pairs), {}, threads, *flat)

    def fallback(*flat: jax.Array) -> list[jax.Array]:
        vectors = [list(flat[i * n : (i + 1) * n]) for i in range(2 * len(pairs))]
        return list(reference.dots(list(zip(vectors[::2], vectors[1::2], strict=True))))

    return tuple(jax.lax.platform_dependent(*operands, cpu=call, default=fallback))


def _vary_alike(arrays: Sequence[jax.Array], like: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """Types arrays inside `jax.shard_map` as varying over every mesh axis over which any of them, or of `like`, varies.

    A result may depend on every operand; JAX wants that in its type and cannot infer it for a foreign call.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset().union(*axes, *(jax.typeof(array).manual_axis_type.varying for array in like))
    missing = [tuple(sorted(everywhere - own)) for own in axes]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _ffi_call(
    target: str, results: list[jax.ShapeDtypeStruct], aliases: dict[int, int], threads: int, *operands: jax.Array
) -> list[jax.Array]:
    ffi.require_native()
    call = jax.ffi.ffi_call(target, results, vmap_method="broadcast_all", input_output_aliases=aliases)
    return _vary_alike(call(*operands, threads=np.int64(threads)), like=operands)
