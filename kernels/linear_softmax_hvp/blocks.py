"""The head's rows in blocks: how many at a time, and the loop over them.

Blocks are of one size and balanced; the last one reaches back over rows that the one before had, and these have no
weight in it. So nothing is padded, no remainder is compiled apart, and fewer rows are done twice than there are blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Of a block alive at once, per logit: logits, their tangents, the product and a copy in the matmul's dtype.
BYTES_PER_LOGIT = 16
# Fewer rows at a time and the matmuls wait for the head: then columns are cut too, at the price of doing them twice.
_LEAST_ROWS = 16
# Then blocks are this wide, so that as many rows as fit share one reading of the head; or narrower, by lanes.
_WIDE = 1024
_LANES = 128


class Cotangents(NamedTuple):
    """Of a linear head: each shaped like what it is the cotangent of, in the accumulation dtype; None where none was
    made.
    """

    hidden: jax.Array | None
    head: jax.Array | None
    bias: jax.Array | None


class Tangent(NamedTuple):
    """How a linear head moves: each shaped like what moves, in its dtype; None for what is held fixed."""

    hidden: jax.Array | None = None
    head: jax.Array | None = None
    bias: jax.Array | None = None


class Head(NamedTuple):
    """A linear head: logits = hidden @ head + bias.

    Attributes:
      hidden: (rows, features).
      head: (features, columns).
      bias: (columns,), or None.
    """

    hidden: jax.Array
    head: jax.Array
    bias: jax.Array | None


@dataclass(frozen=True)
class LogitBlocks:
    """`rows` and `columns` per block."""

    rows: int
    columns: int

    @staticmethod
    def of(rows: int, columns: int, max_bytes: int) -> LogitBlocks:
        """The largest blocks within `max_bytes` that are balanced; at least one row by one lane group."""
        logits = max(max_bytes // BYTES_PER_LOGIT, 1)
        least = min(rows, _LEAST_ROWS)
        if logits >= least * columns:
            return LogitBlocks(balanced(rows, logits // columns), columns)
        wide = min(max(logits // least // _LANES * _LANES, _LANES), _WIDE, columns)
        return LogitBlocks(balanced(rows, max(logits // wide, least)), wide)


def balanced(total: int, at_most: int) -> int:
    """The size of the equal blocks, as few as there can be, that cover `total`."""
    count = -(-total // max(min(at_most, total), 1))
    return -(-total // count)


def start(index: jax.Array, size: int, total: int) -> jax.Array:
    """Where block `index` begins."""
    return jnp.minimum(index * size, total - size)


def fresh(index: jax.Array, size: int, total: int) -> jax.Array:
    """Which entries of block `index` no block before it had."""
    return start(index, size, total) + jnp.arange(size, dtype=jnp.int32) >= index * size


def count(size: int, total: int) -> int:
    """How many blocks there are."""
    return -(-total // size)


def take(array: jax.Array, begin: jax.Array, size: int, axis: int = 0) -> jax.Array:
    """`size` entries along `axis`."""
    return jax.lax.dynamic_slice_in_dim(array, begin, size, axis)
