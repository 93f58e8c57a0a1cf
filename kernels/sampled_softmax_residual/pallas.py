"""sampled_softmax_residual as a Mosaic GPU kernel: the first pass of softmax_hvp, a search, and one write.

The cluster's blocks know from the exchanged sums whose run holds the drawn share of the total. That block goes over the
chunks it keeps to find the chunk, and halves that one until a column is left: a dozen masked sums of registers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from curvax.kernels._vary import vary_alike
from curvax.kernels.sampled_softmax_residual import reference
from curvax.kernels.softmax_hvp import pallas as softmax
from curvax.kernels.softmax_hvp.launch import TASK, launch, row_of_block
from curvax.kernels.softmax_hvp.rows import PART, Row, Statistics
from curvax.kernels.softmax_hvp.tiling import Tiling

cannot = softmax.cannot

_Sample = tuple[jax.Array, jax.Array]
# Times this a float32 is the one before it, or rounds to it.
_JUST_LESS = 1 - 2.0**-24
_NOT_HERE = -1


def sampled_softmax_residual(
    logits: jax.Array, uniforms: jax.Array, weights: jax.Array, *, interpret: Any = None
) -> _Sample:
    """See `reference.sampled_softmax_residual`, for (rows, columns) logits."""
    operands = vary_alike([logits, uniforms, weights])
    if interpret is not None:
        return _batching(lambda *flat: _sample(*flat, interpret=interpret))(*operands)
    return jax.lax.platform_dependent(*operands, cuda=_batching(_sample), default=reference.sampled_softmax_residual)


def _batching(kernel: Callable[..., _Sample]) -> Callable[..., _Sample]:
    """The kernel with a rule for `jax.vmap`: more rows."""

    @jax.custom_batching.custom_vmap
    def call(logits: jax.Array, uniforms: jax.Array, weights: jax.Array) -> _Sample:
        return kernel(logits, uniforms, weights)

    @call.def_vmap
    def rule(size: int, batched: Sequence[bool], *operands: jax.Array) -> tuple[_Sample, tuple[bool, bool]]:
        z, u, w = (
            x if own else jnp.broadcast_to(x, (size, *x.shape)) for x, own in zip(operands, batched, strict=True)
        )
        residual, label = call(z.reshape(-1, z.shape[-1]), u.reshape(-1), w.reshape(-1))
        return (residual.reshape(z.shape), label.reshape(u.shape)), (True, True)

    return call


def _sample(logits: jax.Array, uniforms: jax.Array, weights: jax.Array, *, interpret: Any = None) -> _Sample:
    rows, columns = logits.shape
    tiled = Tiling.of(columns, (logits.dtype.itemsize,))

    def body(z_ref: Any, u_ref: Any, w_ref: Any, out_ref: Any, label_ref: Any, *memory: Any) -> None:
        row = jax.lax.axis_index(TASK)
        view = row_of_block(tiled, [z_ref.at[row]], row, memory)
        weight = w_ref[row]
        first = jax.lax.axis_index(PART) == 0 if tiled.parts > 1 else jnp.bool_(True)

        def write(j: jax.Array, value: jax.Array) -> None:
            out_ref[row, pl.ds(view.start(j), tiled.chunk)] = value

        def write_label(when: jax.Array, label: jax.Array) -> None:
            @pl.when(when)
            def _() -> None:
                label_ref[row] = label

        @pl.when(weight == 0.0)
        def _() -> None:
            jax.lax.fori_loop(0, tiled.chunks, lambda j, _: write(j, view.full(0.0)), None)
            write_label(first, jnp.int32(0))

        @pl.when(weight != 0.0)
        def _() -> None:
            view.fetch()
            statistics = view.statistics()
            target = jnp.minimum(u_ref[row] * statistics.total, statistics.total * _JUST_LESS)
            here = (statistics.before <= target) & (target < statistics.before + statistics.own)
            label = jax.lax.cond(here, lambda: _search(view, statistics, target), lambda: jnp.int32(_NOT_HERE))
            write_label(here, label)
            # Without a class, or with NaN, the target is in no run.
            write_label(first & ~(statistics.total > 0.0), jnp.int32(0))
            any_class = jnp.where(statistics.total == 0.0, 0.0, weight)

            def residual(j: jax.Array, values: list[jax.Array], _: None) -> None:
                p = view.exponentials(values[0], statistics.top) * statistics.inverse
                drawn = view.columns == label - view.start(j)
                write(j, any_class * (p - jnp.where(drawn, 1.0, 0.0)))

            view.for_each_chunk(residual, None)

    out = [jax.ShapeDtypeStruct(logits.shape, jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
    residual, label, *_ = launch(body, tiled, rows, out, [logits.dtype], [logits, uniforms, weights], interpret)
    return residual, label


def _search(view: Row, statistics: Statistics, target: jax.Array) -> jax.Array:
    """The column of this block's run where the sum of exponentials first passes `target`."""

    def fresh(j: jax.Array, logits: jax.Array) -> jax.Array:
        e = view.exponentials(logits, statistics.top)
        return jnp.where(view.columns < view.seen_before(j), 0.0, e)

    def reach(j: jax.Array, values: list[jax.Array], carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        before, chunk, start, size = carry
        own = jnp.sum(fresh(j, values[0]))
        # The last chunk that begins at or before the target and holds something: rounding cannot leave none.
        take = (before <= target) & (own > 0.0)
        return (
            before + own,
            jnp.where(take, j, chunk),
            jnp.where(take, before, start),
            jnp.where(take, own, size),
        )

    zero = jnp.float32(0.0)
    _, chunk, start, size = view.for_each_chunk(reach, (statistics.before, jnp.int32(0), zero, zero))
    e = fresh(chunk, view.read(chunk)[0])

    def halve(_: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = carry
        middle = (low + high) // 2
        reached = jnp.sum(jnp.where(view.columns <= middle, e, 0.0))
        passed = (reached > target - start) | (reached >= size)
        return jnp.where(passed, low, middle + 1), jnp.where(passed, middle, high)

    last = view.tiling.chunk - 1
    low, _ = jax.lax.fori_loop(0, last.bit_length(), halve, (jnp.int32(0), jnp.int32(last)))
    return view.start(chunk) + low
