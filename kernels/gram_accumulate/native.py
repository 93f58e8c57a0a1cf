"""gram_accumulate through the XLA FFI handler of csrc/cpu: all layers in one call, tile by tile.

Operands: what is added to, if there is anything, then for each layer activations (if it has them) and cotangents, and
with `against` those of the columns after those of the rows; shapes are (batch..., examples, blocks, positions, in) and
(batch..., examples, blocks, rows, positions, out), where explicit rows have one block and one position. Products of
different blocks of a layer do not meet. The result is (batch..., N, M), in place of what is added to where XLA allows.
`vmap_method="broadcast_all"` makes the batch axes of a vmapped call.

The handler keeps a packed copy of the factors, and per thread the scales of one tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from curvax import ffi
from curvax.kernels import _native
from curvax.kernels._dispatch import Request
from curvax.kernels._vary import vary_alike
from curvax.kernels.gram_accumulate import reference
from curvax.kernels.gram_accumulate.factors import BlockRows, Rows

_TARGET = "curvax_gram_accumulate"
# Below so many rows XLA's own products were measured to be as fast: a call costs more than it saves.
_LEAST_ROWS = 8


def cannot(request: Request) -> str | None:
    """Why the handler cannot run a request; None if it can."""
    if request.platform != "cpu":
        return f"the C++ handler runs on cpu, and this is {request.platform}"
    return _native.cannot(request)


def better_not(request: Request) -> str | None:
    """Why the reference is the better choice; None if it is not."""
    rows = max(request.shapes[0])
    return (
        f"XLA's own products are as fast below {_LEAST_ROWS} rows, and these are {rows}" if rows < _LEAST_ROWS else None
    )


def accumulate(gram: jax.Array, left: Rows, right: Rows | None, *, threads: int = 0) -> jax.Array:
    """See `api.gram_accumulate`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    structure = jax.tree.structure((left, right))
    operands = vary_alike([gram, *jax.tree.leaves((left, right))])

    def on_cpu(gram: jax.Array, *flat: jax.Array) -> jax.Array:
        rows, others = jax.tree.unflatten(structure, flat)
        sides = [BlockRows.of(rows)] if others is None else [BlockRows.of(rows), BlockRows.of(others)]
        return _call(gram, [sides], jax.ShapeDtypeStruct(gram.shape, gram.dtype), mirror=False, threads=threads)

    def fallback(gram: jax.Array, *flat: jax.Array) -> jax.Array:
        return reference.accumulate(gram, *jax.tree.unflatten(structure, flat))

    return _on_cpu(on_cpu, fallback, operands)


def gram_of_layers(layers: Sequence[BlockRows], dtype: np.dtype, *, threads: int = 0) -> jax.Array:
    """See `api.gram_of_layers`. `threads`: 0 lets the handler decide; the result does not depend on it."""
    flat, structure = jax.tree.flatten(list(layers))
    total = layers[0].total

    def on_cpu(*flat: jax.Array) -> jax.Array:
        made = [[layer] for layer in jax.tree.unflatten(structure, flat)]
        return _call(None, made, jax.ShapeDtypeStruct((total, total), dtype), mirror=True, threads=threads)

    def fallback(*flat: jax.Array) -> jax.Array:
        return reference.gram_of_layers(jax.tree.unflatten(structure, flat), dtype)

    return _on_cpu(on_cpu, fallback, vary_alike(flat))


def _on_cpu(call: Callable[..., jax.Array], fallback: Callable[..., jax.Array], operands: list[jax.Array]) -> jax.Array:
    """The call where the computation is lowered for the CPU, the fallback elsewhere."""
    available = ffi.native_status("cpu").available
    return jax.lax.platform_dependent(*operands, cpu=call if available else fallback, default=fallback)


def _call(
    start: jax.Array | None,
    layers: Sequence[Sequence[BlockRows]],
    result: jax.ShapeDtypeStruct,
    *,
    mirror: bool,
    threads: int,
) -> jax.Array:
    """The foreign call; each layer has one side or two."""
    ffi.require_native("cpu")
    operands = ([] if start is None else [start]) + jax.tree.leaves(layers)
    call = jax.ffi.ffi_call(
        _TARGET, result, vmap_method="broadcast_all", input_output_aliases={} if start is None else {0: 0}
    )
    made = call(
        *operands,
        scaled=np.asarray([sides[0].activations is not None for sides in layers], np.int64),
        start=np.int64(start is not None),
        against=np.int64(len(layers[0]) == 2),
        mirror=np.int64(mirror),
        threads=np.int64(threads),
    )
    return vary_alike([made], like=operands)[0]
