"""All inner products of many rows, in bounded memory, from groups of rows that are made when they are needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# More panels save less and less of the product, and each costs compile time; products of fewer than 64 rows are not
# worth cutting.
_PANELS = 6
_LEAST_PANEL = 64


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


def gram(rows: RowGroups, max_bytes: int) -> jax.Array:
    """All inner products as a symmetric (total, total) matrix, products at highest precision.

    Args:
      rows: the rows.
      max_bytes: bound on the memory of factors. If it is too small for all, they are made in blocks, and made again
        for each block that they meet.
    """
    one = jax.tree.leaves(jax.eval_shape(rows.make, jax.ShapeDtypeStruct((), jnp.int32)))
    if not any(leaf.size for leaf in one):
        return jnp.zeros((rows.total, rows.total), rows.dtype)
    group_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in one)
    if rows.groups * group_bytes <= max_bytes:
        return _gram_at_once(rows)
    # Two blocks are alive while they meet.
    return _gram_by_blocks(rows, min(rows.groups, max(1, max_bytes // (2 * group_bytes))))


def _meet(left: Factors, right: Factors, dtype: np.dtype) -> jax.Array:
    """Inner products of all rows of stacked groups, as (groups, rows, groups, rows).

    <a_i d_r^T, a_j d_s^T> = (a_i . a_j) (d_r . d_s): one small product per pair of groups scales one per pair of rows.
    """
    terms = [_inner(a, b, 2) for a, b in zip(left.explicit, right.explicit, strict=True)]
    scales = [_inner(a, b, 1) for a, b in zip(left.activations, right.activations, strict=True)]
    products = [_inner(a, b, 2) for a, b in zip(left.cotangents, right.cotangents, strict=True)]
    terms += [scale[:, None, :, None].astype(p.dtype) * p for scale, p in zip(scales, products, strict=True)]
    total = terms[0].astype(dtype)
    for term in terms[1:]:
        total = total + term.astype(dtype)
    return total


def _inner(a: jax.Array, b: jax.Array, leading: int) -> jax.Array:
    """Inner products over all but the `leading` axes of either."""
    width = math.prod(a.shape[leading:])
    flat = (x.reshape(math.prod(x.shape[:leading]), width) for x in (a, b))
    products = jnp.einsum("in,jn->ij", *flat, precision=jax.lax.Precision.HIGHEST)
    return products.reshape(*a.shape[:leading], *b.shape[:leading])


def _matrix(blocks: jax.Array) -> jax.Array:
    a, r, b, s = blocks.shape
    return blocks.reshape(a * r, b * s)


def _gram_at_once(rows: RowGroups) -> jax.Array:
    """Upper triangle by panels: p panels take (1 + 1/p) / 2 of the full product."""
    factors = rows.many(jnp.arange(rows.groups, dtype=jnp.int32))
    width = -(-max(_LEAST_PANEL, -(-rows.total // _PANELS)) // rows.rows)
    bands = []
    for start in range(0, rows.groups, width):
        panel = jax.tree.map(lambda x, a=start: x[a : a + width], factors)
        band = _matrix(_meet(panel, jax.tree.map(lambda x, a=start: x[a:], factors), rows.dtype))
        bands.append(jnp.pad(band, ((0, 0), (start * rows.rows, 0))))
    return _mirror(jnp.concatenate(bands))


def _mirror(upper: jax.Array) -> jax.Array:
    """The symmetric matrix whose upper triangle is that of `upper`."""
    strict = jnp.triu(upper, 1)
    return jnp.triu(upper) + strict.T


def _gram_by_blocks(rows: RowGroups, at_once: int) -> jax.Array:
    """Upper triangle by blocks of rows that are made anew wherever they meet."""
    count = -(-rows.groups // at_once)
    # The last block is filled up by repeating the last group; the surplus is cut off below.
    indices = jnp.minimum(jnp.arange(count * at_once, dtype=jnp.int32), rows.groups - 1).reshape(count, at_once)
    side = at_once * rows.rows

    def row_of_blocks(i: jax.Array, gram: jax.Array) -> jax.Array:
        left = rows.many(indices[i])

        def block(j: jax.Array, gram: jax.Array) -> jax.Array:
            corner = _matrix(_meet(left, rows.many(indices[j]), rows.dtype))
            return jax.lax.dynamic_update_slice(gram, corner, (i * side, j * side))

        return jax.lax.fori_loop(i, jnp.asarray(count, i.dtype), block, gram)

    empty = jnp.zeros((count * side, count * side), rows.dtype)
    gram = jax.lax.fori_loop(jnp.zeros((), jnp.int32), jnp.asarray(count, jnp.int32), row_of_blocks, empty)
    return _mirror(gram[: rows.total, : rows.total])
