"""One row of logits in a Mosaic GPU kernel: its softmax statistics, by a cluster of blocks, in one read.

Written for the bodies of `pallas`: a `Row` is made inside a kernel, where its references live. Per block, the online
softmax goes over the chunks once as they arrive,

    m' = max(m, max z),   l' = l exp(m - m') + sum exp(z - m'),   s' = s exp(m - m') + sum exp(z - m') v,

with l and s separate for each column of a chunk and added up as a tree at the end. For z = (0, 1 | 3) in chunks of two
and one: m = 1, l = 1 + 1/e; then m' = 3, l' = l e^-2 + 1. The blocks of a cluster then exchange (m, l, s): 128 bytes
each through device memory, in the copy engine's order (stored, store complete, barrier of the cluster, fetched), so no
cache of a multiprocessor is in the way.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from curvax.kernels import _mosaic
from curvax.kernels.softmax_hvp.tiling import Tiling

EXCHANGED = 32
"""Floats per block in the exchange: one line of 128 bytes, so that no two blocks write to one."""

PART = "part"
"""The cluster axis."""


@dataclass(frozen=True)
class Statistics:
    """Of the exponentials e = exp(z - top) of one row; `top` is 0 where every logit is minus infinity.

    Attributes:
      top: the largest logit.
      total: sum of e.
      sums: for each tangent, the sum of e v.
      before: the sum of e over the blocks before this one.
      own: over this block's run.
    """

    top: jax.Array
    total: jax.Array
    sums: list[jax.Array]
    before: jax.Array
    own: jax.Array

    @property
    def inverse(self) -> jax.Array:
        """1 / total, and 0 for a row without a class."""
        return jnp.where(self.total == 0.0, 0.0, 1.0 / self.total)


@dataclass(frozen=True)
class Row:
    """One row, as one block sees it.

    Attributes:
      tiling: the cut.
      sources: views of the row in device memory: the logits, then each tangent.
      stores: the shared memory that keeps them, `tiling.kept * tiling.chunk` elements each.
      arrived: a barrier per kept chunk if the copy engine fetches them, else `None`.
      exchange: `Exchange`, or `None` if the row is one block's.
    """

    tiling: Tiling
    sources: list[Any]
    stores: list[Any]
    arrived: Any
    exchange: Exchange | None

    @property
    def layout(self) -> Any:
        """How a chunk is spread over the threads."""
        return _mosaic.backend().Layout.WG_STRIDED((self.tiling.chunk,), vec_size=self.tiling.vector)

    def full(self, value: jax.Array | float) -> jax.Array:
        """A chunk of one value."""
        return _mosaic.backend().layout_cast(jnp.full((self.tiling.chunk,), value, jnp.float32), self.layout)

    @property
    def columns(self) -> jax.Array:
        """0, 1, ... over a chunk."""
        return _mosaic.backend().broadcasted_iota(jnp.int32, (self.tiling.chunk,), 0, layout=self.layout)

    def _bounds(self) -> tuple[jax.Array, jax.Array]:
        """First column of the block's run, and the one past its last."""
        t = self.tiling
        total = -(-t.columns // t.chunk)
        part = jax.lax.axis_index(PART) if t.parts > 1 else jnp.int32(0)
        return part * total // t.parts * t.chunk, jnp.minimum((part + 1) * total // t.parts * t.chunk, t.columns)

    def start(self, j: jax.Array) -> jax.Array:
        """First column of chunk j."""
        begin, end = self._bounds()
        return jnp.minimum(begin + j * self.tiling.chunk, end - self.tiling.chunk)

    def seen_before(self, j: jax.Array) -> jax.Array:
        """How many of chunk j's first columns the chunk before it had."""
        return self._bounds()[0] + j * self.tiling.chunk - self.start(j)

    def fetch(self) -> None:
        """Starts the copies of all kept chunks, if the copy engine makes them."""
        if self.arrived is None:
            return
        plgpu, chunk = _mosaic.backend(), self.tiling.chunk

        def issue(j: jax.Array, _: None) -> None:
            for source, store in zip(self.sources, self.stores, strict=True):
                plgpu.copy_gmem_to_smem(
                    source.at[pl.ds(self.start(j), chunk)],
                    store.at[pl.ds(j * chunk, chunk)],
                    self.arrived.at[j],
                    # Promised in bounds and contiguous, a chunk is one bulk copy, however wide.
                    oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS,
                )

        jax.lax.fori_loop(0, self.tiling.kept, issue, None)

    def for_each_chunk(self, visit: Callable[[jax.Array, list[jax.Array], Any], Any], carry: Any) -> Any:
        """Folds `visit(j, [logits, *tangents], carry)` over the chunks, kept ones from shared memory."""
        kept, chunks = self.tiling.kept, self.tiling.chunks
        carry = jax.lax.fori_loop(0, kept, lambda j, c: visit(j, self._kept(j), c), carry)
        if kept < chunks:
            carry = jax.lax.fori_loop(kept, chunks, lambda j, c: visit(j, self.read(j), c), carry)
        return carry

    def statistics(self) -> Statistics:
        """The first pass: brings the row in and reduces it."""

        def first(j: jax.Array, carry: Any) -> Any:
            return self._accumulate(j, self._bring(j), carry)

        tangents = len(self.sources) - 1
        carry = (jnp.float32(-jnp.inf), self.full(0.0), tuple(self.full(0.0) for _ in range(tangents)))
        carry = jax.lax.fori_loop(0, self.tiling.kept, first, carry)
        if self.tiling.kept < self.tiling.chunks:
            carry = jax.lax.fori_loop(
                self.tiling.kept, self.tiling.chunks, lambda j, c: self._accumulate(j, self.read(j), c), carry
            )
        top, total, sums = carry
        parts = [top, jnp.sum(total), *(jnp.sum(s) for s in sums)]
        if self.exchange is None:
            return Statistics(_reference(top), parts[1], parts[2:], jnp.float32(0.0), parts[1])
        return self._combined(self.exchange, parts)

    def exponentials(self, logits: jax.Array, top: jax.Array) -> jax.Array:
        """The exponentials exp(z - top) of a chunk."""
        return jnp.exp(logits.astype(jnp.float32) - top)

    def _kept(self, j: jax.Array) -> list[jax.Array]:
        chunk = self.tiling.chunk
        return [_mosaic.load(store.at[pl.ds(j * chunk, chunk)], self.layout) for store in self.stores]

    def read(self, j: jax.Array) -> list[jax.Array]:
        """Chunk j of logits and tangents, from device memory."""
        return [
            _mosaic.load(source.at[pl.ds(self.start(j), self.tiling.chunk)], self.layout) for source in self.sources
        ]

    def _bring(self, j: jax.Array) -> list[jax.Array]:
        """Kept chunk j, as soon as it is here."""
        if self.arrived is not None:
            _mosaic.backend().barrier_wait(self.arrived.at[j])
            return self._kept(j)
        values, chunk = self.read(j), self.tiling.chunk
        for store, value in zip(self.stores, values, strict=True):
            store[pl.ds(j * chunk, chunk)] = value
        return values

    def _accumulate(self, j: jax.Array, values: list[jax.Array], carry: Any) -> Any:
        top, total, sums = carry
        z = jnp.where(self.columns < self.seen_before(j), -jnp.inf, values[0].astype(jnp.float32))
        new = jnp.maximum(top, jnp.max(z))
        shift = _reference(new)
        scale, e = jnp.exp(top - shift), jnp.exp(z - shift)
        terms = [e * v.astype(jnp.float32) for v in values[1:]]
        return new, total * scale + e, tuple(s * scale + t for s, t in zip(sums, terms, strict=True))

    def _combined(self, exchange: Exchange, parts: list[jax.Array]) -> Statistics:
        everyone = exchange.all_of(parts)
        top = _reference(functools.reduce(jnp.maximum, [each[0] for each in everyone]))
        scales = [jnp.exp(each[0] - top) for each in everyone]
        part = jax.lax.axis_index(PART)
        sums = [jnp.float32(0.0)] * (len(parts) - 1)
        before, own = jnp.float32(0.0), jnp.float32(0.0)
        for i, (each, scale) in enumerate(zip(everyone, scales, strict=True)):
            before = jnp.where(part == i, sums[0], before)
            own = jnp.where(part == i, each[1] * scale, own)
            sums = [s + value * scale for s, value in zip(sums, each[1:], strict=True)]
        return Statistics(top, sums[0], sums[1:], before, own)


@dataclass(frozen=True)
class Exchange:
    """How the blocks of a cluster tell each other a few floats.

    Attributes:
      shared: (parts, EXCHANGED) of device memory, this row's.
      mine: (EXCHANGED,) of shared memory, to send from.
      all: (parts, EXCHANGED) of shared memory, to receive in.
      met: barrier of the cluster.
      fetched: barrier of the copy back.
    """

    shared: Any
    mine: Any
    all: Any
    met: Any
    fetched: Any

    def all_of(self, values: list[jax.Array]) -> list[list[jax.Array]]:
        """The values of each block, in order of the blocks."""
        plgpu = _mosaic.backend()
        for i, value in enumerate(values):
            self.mine[i] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.mine, self.shared.at[jax.lax.axis_index(PART)])
        plgpu.wait_smem_to_gmem(0)
        plgpu.barrier_arrive(self.met)
        plgpu.barrier_wait(self.met)
        plgpu.copy_gmem_to_smem(self.shared, self.all, self.fetched, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)
        plgpu.barrier_wait(self.fetched)
        return [[self.all[part, i] for i in range(len(values))] for part in range(self.all.shape[0])]


def _reference(top: jax.Array) -> jax.Array:
    """What exponents are taken against: the largest logit, or 0 where that is minus infinity."""
    return jnp.where(top == -jnp.inf, 0.0, top)
