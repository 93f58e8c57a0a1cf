"""How one row of logits is cut over a cluster of thread blocks, and what of it stays in their shared memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARPGROUP = 128
"""Threads of a block: each block is one warpgroup."""

# Columns per step of a block: `_CHUNKS` times a width for which the accumulators stay in registers.
_CHUNKS = (2048, 1024, 512, 256, 128)
# What a chunk costs beyond its columns, in columns: a reduction over the block and its barriers.
_CHUNK_COST = 256
# Blocks of a cluster, as many as every GPU of capability 9.0 and above can place.
_PARTS = (1, 2, 4, 8)
# What a block should hold at most, so that four of them share a multiprocessor: one loads while another computes.
_SHARE = 56 * 2**10
# What a block can hold at most: 227 KiB of a multiprocessor's shared memory, less what Mosaic, barriers and exchanged
# sums take (4.2 KiB with their padding).
_LIMIT = 222 * 2**10
# Barriers in one array, a limit of Mosaic.
_BARRIERS = 32
# The copy engine moves multiples of 16 bytes between addresses that are multiples of 16.
_ALIGNMENT = 16


@dataclass(frozen=True)
class Tiling:
    """The cut of a row of `columns` columns.

    A row is cut into chunks of `chunk` columns and these are dealt out to `parts` blocks in contiguous runs. The last
    chunk of a run may reach back over columns that the chunk before it had: so no chunk is ragged, no address out of
    bounds and nothing is padded; what is seen twice is counted once and written twice with one value.

    Attributes:
      columns: of the row.
      chunk: columns that a block handles at a time.
      parts: blocks in the cluster that shares a row.
      chunks: chunks of the longest run.
      kept: how many chunks of its run a block keeps in shared memory; the others are read a second time.
      vector: columns that a thread handles side by side, the widest for which addresses are aligned.
      copied: the copy engine fetches the kept chunks, all at once; else the threads load them one after another.
    """

    columns: int
    chunk: int
    parts: int
    chunks: int
    kept: int
    vector: int
    copied: bool

    @staticmethod
    def of(columns: int, itemsizes: tuple[int, ...]) -> Tiling:
        """The cut for arrays with these bytes per element that share a row's columns.

        Raises:
          ValueError: fewer columns than one chunk has at least; see `cannot`.
        """
        reason = cannot(columns)
        if reason is not None:
            raise ValueError(reason)
        bytes_per_column = sum(itemsizes)
        wanted = next((p for p in _PARTS if columns * bytes_per_column <= p * _SHARE), _PARTS[-1])
        aligned = all(columns * size % _ALIGNMENT == 0 for size in itemsizes)
        parts = wanted if _CHUNKS[-1] * wanted <= columns else 1
        cuts = [(c, _ceil(_ceil(columns, c), parts)) for c in _CHUNKS if c * parts <= columns]
        # With the copy engine each kept chunk has a barrier.
        fitting = [cut for cut in cuts if not aligned or cut[1] <= _BARRIERS] or cuts[:1]
        chunk, chunks = min(fitting, key=lambda cut: (cut[0] + _CHUNK_COST) * cut[1])
        kept = min(chunks, _LIMIT // (chunk * bytes_per_column), _BARRIERS if aligned else chunks)
        return Tiling(columns, chunk, parts, chunks, kept, min(math.gcd(columns, 4), chunk // WARPGROUP), aligned)

    @property
    def reads(self) -> float:
        """How often the row is read from device memory: 1 if all of it is kept, up to 2."""
        return 2 - self.kept / self.chunks


def _ceil(n: int, per: int) -> int:
    return -(-n // per)


def cannot(columns: int) -> str | None:
    """Why rows of so many columns cannot be cut; None if they can."""
    if columns < _CHUNKS[-1]:
        return f"the Mosaic kernels take rows of at least {_CHUNKS[-1]} columns, and these have {columns}"
    return None
