"""softmax_hvp as Mosaic GPU kernels: a cluster of blocks per row, which reads it once and keeps it in shared memory.

Operands are (rows, columns) logits, (tangents, rows, columns) tangents and (rows,) weights. A block handles up to
`_GROUP` tangents, so that their sums stay in registers; more of them make several blocks read the logits. `interpret`
runs the kernels on the CPU, for the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
import numpy as np

from curvax.kernels import _mosaic
from curvax.kernels._dispatch import Request
from curvax.kernels._vary import vary_alike
from curvax.kernels.softmax_hvp import reference, tiling
from curvax.kernels.softmax_hvp.launch import TASK, launch, row_of_block
from curvax.kernels.softmax_hvp.tiling import Tiling

_GROUP = 4
_DTYPES = tuple(map(np.dtype, (jnp.float32, jnp.bfloat16, jnp.float16)))
# Offsets into an operand are 32-bit.
_ELEMENTS = 2**31


def cannot(request: Request) -> str | None:
    """Why the kernels cannot run a request (operands: logits, tangents); None if they can."""
    reason = _mosaic.cannot(request)
    if reason is not None:
        return reason
    wrong = [str(dtype) for dtype in request.dtypes if dtype not in _DTYPES]
    if wrong:
        return f"the Mosaic kernels take float32, bfloat16 and float16, and these have {', '.join(wrong)}"
    if request.size == 0:
        return "there are no elements"
    if request.size >= _ELEMENTS:
        return f"offsets in the Mosaic kernels are 32-bit, and there are {request.size} logits"
    return tiling.cannot(request.shapes[0][-1])


def softmax_hvp(logits: jax.Array, tangents: jax.Array, weights: jax.Array, *, interpret: Any = None) -> jax.Array:
    """See `reference.softmax_hvp`."""
    operands = vary_alike([logits, tangents, weights])
    if interpret is not None:
        return _batching(lambda *flat: _hvp(*flat, interpret=interpret))(*operands)
    return jax.lax.platform_dependent(*operands, cuda=_batching(_hvp), default=reference.softmax_hvp)


def _batching(kernel: Any) -> Any:
    """The kernel with a rule for `jax.vmap`: tangents batched alone are more tangents per row, all else more rows."""

    @jax.custom_batching.custom_vmap
    def call(logits: jax.Array, tangents: jax.Array, weights: jax.Array) -> jax.Array:
        return kernel(logits, tangents, weights)

    @call.def_vmap
    def rule(
        size: int, batched: Sequence[bool], logits: jax.Array, tangents: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, bool]:
        if not (batched[0] or batched[2]):
            products = call(logits, tangents.reshape(-1, *logits.shape), weights)
            return products.reshape(tangents.shape), True
        z, v, w = (
            x if own else jnp.broadcast_to(x, (size, *x.shape))
            for x, own in zip((logits, tangents, weights), batched, strict=True)
        )
        count, rows, columns = v.shape[1:]
        stacked = jnp.moveaxis(v, 0, 1).reshape(count, size * rows, columns)
        products = call(z.reshape(-1, columns), stacked, w.reshape(-1))
        return jnp.moveaxis(products.reshape(count, size, rows, columns), 1, 0), True

    return call


def _hvp(logits: jax.Array, tangents: jax.Array, weights: jax.Array, *, interpret: Any = None) -> jax.Array:
    rows, columns = logits.shape
    count = tangents.shape[0]
    groups = -(-count // _GROUP)
    size = -(-count // groups)
    dtypes = [logits.dtype, *[tangents.dtype] * size]
    tiled = Tiling.of(columns, tuple(dtype.itemsize for dtype in dtypes))

    def body(z_ref: Any, v_ref: Any, w_ref: Any, out_ref: Any, *memory: Any) -> None:
        task = jax.lax.axis_index(TASK)
        row, group = task // groups, task % groups
        # Groups are of one size, and the last one reaches back: what it shares with the one before, that one writes.
        first = jnp.minimum(group * size, count - size)
        view = row_of_block(tiled, [z_ref.at[row], *(v_ref.at[first + t, row] for t in range(size))], task, memory)
        weight = w_ref[row]

        def write(t: int, j: jax.Array, value: jax.Array) -> None:
            def store() -> None:
                out_ref[first + t, row, pl.ds(view.start(j), tiled.chunk)] = value

            if count % size == 0:
                store()
            else:
                pl.when(first + t >= group * size)(store)

        @pl.when(weight == 0.0)
        def _() -> None:
            def zero(j: jax.Array, _: None) -> None:
                for t in range(size):
                    write(t, j, view.full(0.0))

            jax.lax.fori_loop(0, tiled.chunks, zero, None)

        @pl.when(weight != 0.0)
        def _() -> None:
            view.fetch()
            statistics = view.statistics()
            scale, means = weight * statistics.inverse, [s * statistics.inverse for s in statistics.sums]

            def product(j: jax.Array, values: list[jax.Array], _: None) -> None:
                e = view.exponentials(values[0], statistics.top) * scale
                for t in range(size):
                    write(t, j, e * (values[1 + t].astype(jnp.float32) - means[t]))

            view.for_each_chunk(product, None)

    out = jax.ShapeDtypeStruct(tangents.shape, jnp.float32)
    return launch(body, tiled, rows * groups, [out], dtypes, [logits, tangents, weights], interpret)[0]
