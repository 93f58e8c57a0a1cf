"""All inner products of many rows, in bounded memory, from groups of rows that are made when they are needed.

The rows of all examples need not fit into memory at once. They are made in blocks of as many groups (examples) as the
bound allows, and made again for each block that they meet:

    block     0    1    2          1. make the rows of block i, the left side
      0      [x]                   2. for every j <= i make the rows of block j
      1      [x]  [x]              3. their inner products are tile (i, j) of the matrix
      2      [x]  [x]  [x]         4. at the end cut off the surplus of the last block, and mirror the lower triangle

With n blocks every group is made about n / 2 times more often, and two blocks are alive at once. Parts of the rows
(layers, and the groups of a grouped layer) meet one after another and add up in the tile.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from curvax.jaxprs import peak_bytes
from curvax.kernels import Choice, Implementation
from curvax.kernels.gram_accumulate import factors, gram_accumulate, gram_of_layers
from curvax.kernels.gram_accumulate.whole import mirror
from curvax.structure.layers import Layer


@dataclasses.dataclass(frozen=True)
class RowGroups:
    """Rows in groups of equal size.

    Attributes:
      groups: number of groups.
      rows: rows per group.
      dtype: dtype of the inner products.
      make: group index -> the parts that the group's rows are made of.
    """

    groups: int
    rows: int
    dtype: np.dtype
    make: Callable[[jax.Array], list[Layer]]

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.groups * self.rows

    @functools.cached_property
    def _traced(self) -> tuple[ClosedJaxpr, list[Layer]]:
        """The program that makes a group, and the shapes of its parts."""
        return jax.make_jaxpr(self.make, return_shape=True)(jax.ShapeDtypeStruct((), jnp.int32))

    @property
    def program(self) -> ClosedJaxpr:
        """What makes a group, from its index."""
        return self._traced[0]

    @property
    def one(self) -> list[Layer]:
        """Shapes of the parts of a group."""
        return self._traced[1]

    def many(self, indices: jax.Array) -> list[Layer]:
        """The parts of several groups, stacked."""
        program, structure = jaxpr_as_fun(self.program), jax.tree.structure(self.one)
        return jax.tree.unflatten(structure, jax.vmap(program)(indices))

    @functools.cached_property
    def bytes(self) -> int:
        """Bytes alive while a group is made and met, the rows that the op forms of it included."""
        return peak_bytes(self.program) + sum(_formed_bytes(layer, self) for layer in self.one)

    def pieces(self, max_bytes: int) -> Pieces:
        """How many groups are made at once in so much memory; at least one."""
        if self.groups * self.bytes <= max_bytes:
            return Pieces(self.groups, 1, self.groups * self.bytes)
        # Two blocks are alive while they meet.
        at_once = min(self.groups, max(1, max_bytes // (2 * max(self.bytes, 1))))
        return Pieces(at_once, -(-self.groups // at_once), 2 * at_once * self.bytes)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """How rows are made.

    Attributes:
      at_once: groups of a block.
      blocks: number of blocks.
      bytes: alive beside the matrix.
    """

    at_once: int
    blocks: int
    bytes: int

    @property
    def times(self) -> float:
        """How often each group is made: once, or as the left side and for every block up to its own."""
        return 1.0 if self.blocks == 1 else 1.0 + (self.blocks + 1) / 2


def gram(rows: RowGroups, max_bytes: int, implementation: Implementation | Choice | None = None) -> jax.Array:
    """All inner products as a symmetric (total, total) matrix, products at highest precision.

    Args:
      rows: the rows.
      max_bytes: bound on the memory of factors, of what it takes to make them, and of the rows that the op forms from
        them. If it is too small for all, they are made in blocks, and made again for each block that they meet.
      implementation: of the op `gram_accumulate`.
    """
    if not any(leaf.size for leaf in jax.tree.leaves(rows.one)):
        return jnp.zeros((rows.total, rows.total), rows.dtype)
    pieces = rows.pieces(max_bytes)
    if pieces.blocks > 1:
        return _gram_by_blocks(rows, pieces.at_once, implementation)
    whole = rows.many(jnp.arange(rows.groups, dtype=jnp.int32))
    return gram_of_layers([(x.activations, x.cotangents) for x in whole], rows.dtype, implementation=implementation)


def _formed_bytes(layer: Layer, rows: RowGroups) -> int:
    """Bytes of the rows of a group (shapes) that the op forms of this part: many weights make them its bulk."""
    if layer.activations is None:
        return 0
    _, t, n = layer.activations.shape
    blocks, r, _, m = layer.cotangents.shape
    many = jax.eval_shape(lambda: factors.Rows(jnp.zeros((rows.groups, t, n)), jnp.zeros((rows.groups, r, t, m))))
    return blocks * r * n * m * rows.dtype.itemsize if factors.formed_is_cheaper(many, many, triangle=True) else 0


def meet(
    gram: jax.Array, left: Sequence[Layer], right: Sequence[Layer], implementation: Implementation | Choice | None
) -> jax.Array:
    """`gram` plus the inner products of the rows of `left` with those of `right`."""
    for layer, other in zip(left, right, strict=True):
        mine, theirs = _by_group(layer), _by_group(other)

        def add(gram: jax.Array, pair: tuple[_Operands, _Operands]) -> tuple[jax.Array, None]:
            return gram_accumulate(gram, *pair[0], against=pair[1], implementation=implementation), None

        if mine[1].shape[0] == 1:
            gram, _ = add(gram, jax.tree.map(lambda x: x[0], (mine, theirs)))
        else:
            gram, _ = jax.lax.scan(add, gram, (mine, theirs))
    return gram


_Operands: TypeAlias = tuple[jax.Array | None, jax.Array]


def _by_group(layer: Layer) -> _Operands:
    """Operands of `gram_accumulate` with the groups of the block in front."""
    activations = None if layer.activations is None else jnp.moveaxis(layer.activations, 1, 0)
    cotangents = jnp.moveaxis(layer.cotangents, 1, 0)
    # One position is one vector: the op has a shorter way there.
    if activations is not None and activations.shape[2] == 1:
        activations, cotangents = activations[:, :, 0], cotangents[:, :, :, 0]
    return activations, cotangents


def _gram_by_blocks(rows: RowGroups, at_once: int, implementation: Implementation | Choice | None) -> jax.Array:
    """Lower triangle by blocks of rows that are made anew wherever they meet; steps as in the module's docstring."""
    count = -(-rows.groups // at_once)
    # The last block is filled up by repeating the last group; the surplus is cut off below.
    indices = jnp.minimum(jnp.arange(count * at_once, dtype=jnp.int32), rows.groups - 1).reshape(count, at_once)
    side = at_once * rows.rows
    empty_tile = jnp.zeros((side, side), rows.dtype)

    def row_of_blocks(i: jax.Array, gram: jax.Array) -> jax.Array:
        left = rows.many(indices[i])  # 1.

        def block(j: jax.Array, gram: jax.Array) -> jax.Array:
            tile = meet(empty_tile, left, rows.many(indices[j]), implementation)  # 2. and 3.
            return jax.lax.dynamic_update_slice(gram, tile, (i * side, j * side))

        return jax.lax.fori_loop(jnp.zeros_like(i), i + 1, block, gram)

    empty = jnp.zeros((count * side, count * side), rows.dtype)
    gram = jax.lax.fori_loop(jnp.zeros((), jnp.int32), jnp.asarray(count, jnp.int32), row_of_blocks, empty)
    return mirror(gram[: rows.total, : rows.total])  # 4.
