"""All inner products of many rows, in bounded memory, from groups of rows that are made when they are needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels import Choice, Implementation
from curvax.kernels.gram_accumulate import gram_accumulate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factors:
    """Rows of a group, or of several groups along one more leading axis; their inner products add up over all entries.

    Attributes:
      explicit: arrays (rows, ...): rows as they are.
      activations: arrays (width,), one for each of `cotangents`.
      cotangents: arrays (rows, ...): with the activation a of the group, row r stands for a d_r^T.
    """

    explicit: list[jax.Array]
    activations: list[jax.Array]
    cotangents: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Rows in groups of equal size.

    Attributes:
      groups: number of groups.
      rows: rows per group.
      dtype: dtype of the inner products.
      make: group index -> the group's factors.
    """

    groups: int
    rows: int
    dtype: np.dtype
    make: Callable[[jax.Array], Factors]

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.groups * self.rows

    def many(self, indices: jax.Array) -> Factors:
        """The factors of several groups, stacked."""
        return jax.vmap(self.make)(indices)


def gram(rows: RowGroups, max_bytes: int, implementation: Implementation | Choice | None = None) -> jax.Array:
    """All inner products as a symmetric (total, total) matrix, products at highest precision.

    Args:
      rows: the rows.
      max_bytes: bound on the memory of factors. If it is too small for all, they are made in blocks, and made again
        for each block that they meet.
      implementation: of the op `gram_accumulate`.
    """
    one = jax.tree.leaves(jax.eval_shape(rows.make, jax.ShapeDtypeStruct((), jnp.int32)))
    if not any(leaf.size for leaf in one):
        return jnp.zeros((rows.total, rows.total), rows.dtype)
    group_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in one)
    if rows.groups * group_bytes <= max_bytes:
        factors = rows.many(jnp.arange(rows.groups, dtype=jnp.int32))
        return _mirror(_meet(jnp.zeros((rows.total, rows.total), rows.dtype), factors, None, implementation))
    # Two blocks are alive while they meet.
    return _gram_by_blocks(rows, min(rows.groups, max(1, max_bytes // (2 * group_bytes))), implementation)


def _meet(
    gram: jax.Array, left: Factors, right: Factors | None, implementation: Implementation | Choice | None
) -> jax.Array:
    """`gram` plus the inner products of the rows of `left` with those of `right`, or (lower triangle) their own."""
    others = _layers(right) if right is not None else None
    for i, layer in enumerate(_layers(left)):
        against = None if others is None else others[i]
        gram = gram_accumulate(gram, *layer, against=against, implementation=implementation)
    return gram


def _layers(factors: Factors) -> list[tuple[jax.Array | None, jax.Array]]:
    """Activations, or none, and cotangents or explicit rows (groups, rows, width)."""
    explicit = [(None, x) for x in factors.explicit]
    pairs = zip(factors.activations, factors.cotangents, strict=True)
    return [(a, _vectors(d)) for a, d in (*explicit, *pairs)]


def _vectors(rows: jax.Array) -> jax.Array:
    return rows.reshape(*rows.shape[:2], math.prod(rows.shape[2:]))


def _mirror(lower: jax.Array) -> jax.Array:
    """The symmetric matrix whose lower triangle is that of `lower`."""
    strict = jnp.tril(lower, -1)
    return jnp.tril(lower) + strict.T


def _gram_by_blocks(rows: RowGroups, at_once: int, implementation: Implementation | Choice | None) -> jax.Array:
    """Lower triangle by blocks of rows that are made anew wherever they meet."""
    count = -(-rows.groups // at_once)
    # The last block is filled up by repeating the last group; the surplus is cut off below.
    indices = jnp.minimum(jnp.arange(count * at_once, dtype=jnp.int32), rows.groups - 1).reshape(count, at_once)
    side = at_once * rows.rows
    corner = jnp.zeros((side, side), rows.dtype)

    def row_of_blocks(i: jax.Array, gram: jax.Array) -> jax.Array:
        left = rows.many(indices[i])

        def block(j: jax.Array, gram: jax.Array) -> jax.Array:
            met = _meet(corner, left, rows.many(indices[j]), implementation)
            return jax.lax.dynamic_update_slice(gram, met, (i * side, j * side))

        return jax.lax.fori_loop(jnp.zeros_like(i), i + 1, block, gram)

    empty = jnp.zeros((count * side, count * side), rows.dtype)
    gram = jax.lax.fori_loop(jnp.zeros((), jnp.int32), jnp.asarray(count, jnp.int32), row_of_blocks, empty)
    return _mirror(gram[: rows.total, : rows.total])
