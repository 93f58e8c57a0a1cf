"""Parameters as stacks of matrices, and back: what `MatrixAxes` say, carried out.

A leaf is reshaped, its axes are ordered as (copies..., rows, columns), and the matrix is cut where parts or blocks
end. Blocks of one shape are one stack, so that a long side costs few calls:

    (10, 4) in blocks of at most 4, rows 4 + 4 + 2, columns 4     ->  (2, 4, 4) and (2, 4)

A leaf of plain matrices is its own stack, and nothing is copied. Moments stay like the parameters; what follows sides,
such as factors, follows the stacks.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.optimizers.axes import MatrixAxes, MatrixRule, paths
from curvax.tree import PyTree, accumulation_dtype


@dataclasses.dataclass(frozen=True)
class MatrixView:
    """One leaf as stacks of matrices.

    Attributes:
      path, shape: of the leaf.
      axes: its matrix axes, counted from the front; `None` where the leaf is no matrix, and its own only stack.
      rows, columns: sizes of the blocks along each side.
    """

    path: str
    shape: tuple[int, ...]
    axes: MatrixAxes | None
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    @property
    def stacks(self) -> tuple[tuple[int, ...], ...]:
        """The shapes that `split` returns."""
        if self.axes is None:
            return (self.shape,)
        copies = tuple(self._ordered_shape()[: len(self._copies())])
        if self._whole:
            return ((*copies, self.rows[0], self.columns[0]),)
        return tuple((len(places), *copies, *block) for block, places in self._blocks().items())

    def split(self, x: jax.Array) -> list[jax.Array]:
        """The stacks (..., rows, columns) of an array like the leaf."""
        if self.axes is None:
            return [x]
        copies = self._ordered_shape()[: len(self._copies())]
        x = x.reshape(self._reshaped()).transpose(self._order()).reshape(*copies, sum(self.rows), sum(self.columns))
        if self._whole:
            return [x]
        rows, columns = _ranges(self.rows), _ranges(self.columns)
        return [jnp.stack([x[..., rows[i], columns[j]] for i, j in places]) for places in self._blocks().values()]

    def join(self, stacks: Sequence[jax.Array]) -> jax.Array:
        """The array like the leaf whose stacks these are."""
        if self.axes is None:
            return stacks[0]
        x = stacks[0]
        if not self._whole:
            blocks = {
                place: block
                for stack, places in zip(stacks, self._blocks().values(), strict=True)
                for place, block in zip(places, stack, strict=True)
            }
            columns = range(len(self.columns))
            bands = [jnp.concatenate([blocks[i, j] for j in columns], axis=-1) for i in range(len(self.rows))]
            x = jnp.concatenate(bands, axis=-2)
        order = self._order()
        back = sorted(range(len(order)), key=order.__getitem__)
        return x.reshape(self._ordered_shape()).transpose(back).reshape(self.shape)

    def describe(self) -> str:
        """How the leaf is seen, in words."""
        if self.axes is None:
            return f"{self.path} {self.shape}: no matrix"
        each = [f"{math.prod(s[:-2])} x ({s[-2]}, {s[-1]})" for s in self.stacks]
        return f"{self.path} {self.shape}: {', '.join(each)}"

    @property
    def _whole(self) -> bool:
        return len(self.rows) == len(self.columns) == 1

    def _reshaped(self) -> tuple[int, ...]:
        return self.shape if self.axes is None or self.axes.shape is None else self.axes.shape

    def _copies(self) -> tuple[int, ...]:
        sides = () if self.axes is None else (*self.axes.rows, *self.axes.columns)
        return tuple(axis for axis in range(len(self._reshaped())) if axis not in sides)

    def _order(self) -> tuple[int, ...]:
        return self._copies() if self.axes is None else (*self._copies(), *self.axes.rows, *self.axes.columns)

    def _ordered_shape(self) -> tuple[int, ...]:
        return tuple(self._reshaped()[axis] for axis in self._order())

    def _blocks(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        """Shape of a block -> the places of such blocks."""
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for (i, m), (j, n) in itertools.product(enumerate(self.rows), enumerate(self.columns)):
            found.setdefault((m, n), []).append((i, j))
        return found


@dataclasses.dataclass(frozen=True)
class Stack:
    """A stack of matrices, or an array that is none.

    Attributes:
      shape: (..., rows, columns).
      dtype: of what is kept of it.
      is_matrix: whether the last two axes are a matrix.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    is_matrix: bool


@dataclasses.dataclass(frozen=True)
class MatrixViews:
    """All leaves of a tree, as one list of stacks.

    Attributes:
      views: one per leaf, in the order of `jax.tree.leaves`.
    """

    views: tuple[MatrixView, ...]

    @staticmethod
    def of(params: PyTree, rule: MatrixRule, block_dim: int | None = None) -> MatrixViews:
        """The views that a rule gives.

        Args:
          params: arrays or shapes.
          rule: the matrix axes of each leaf. A leaf without entries is no matrix.
          block_dim: sides longer than this are cut into blocks of this length and a rest; `None` cuts none.

        Raises:
          ValueError: the axes of a leaf do not fit its shape.
        """
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
        return MatrixViews(
            tuple(_view(path, s, rule, block_dim) for path, s in zip(paths(params), shapes, strict=True))
        )

    def split(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """The stacks of all leaves."""
        return [x for view, leaf in zip(self.views, leaves, strict=True) for x in view.split(leaf)]

    def join(self, stacks: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves of all stacks."""
        rest: Iterator[jax.Array] = iter(stacks)
        return [view.join(list(itertools.islice(rest, len(view.stacks)))) for view in self.views]

    def like(self, leaves: Sequence[Any]) -> list[Stack]:
        """What each stack is, from arrays or shapes like the leaves."""
        return [
            Stack(shape, accumulation_dtype(leaf.dtype), view.axes is not None)
            for view, leaf in zip(self.views, leaves, strict=True)
            for shape in view.stacks
        ]

    def describe(self) -> str:
        """How each leaf is seen, a line each."""
        return "\n".join(view.describe() for view in self.views)


def _view(path: str, shape: tuple[int, ...], rule: MatrixRule, block_dim: int | None) -> MatrixView:
    axes = rule.axes(path, shape) if math.prod(shape) else None
    if axes is None:
        return MatrixView(path, shape, None)
    reshaped = shape if axes.shape is None else axes.shape
    rank = len(reshaped)
    given = (*axes.rows, *axes.columns)
    fits = all(-rank <= axis < rank for axis in given) and math.prod(reshaped) == math.prod(shape)
    if not (fits and axes.rows and axes.columns and len({axis % rank for axis in given}) == len(given)):
        raise ValueError(
            f"{path} {shape} has no rows {axes.rows} and columns {axes.columns} of {reshaped}: name each axis once, "
            "and at least one for each, in the MatrixAxes of this leaf."
        )
    axes = dataclasses.replace(
        axes, rows=tuple(axis % rank for axis in axes.rows), columns=tuple(axis % rank for axis in axes.columns)
    )
    sides = [math.prod(reshaped[axis] for axis in of) for of in (axes.rows, axes.columns)]
    parts = [own or (side,) for own, side in zip((axes.row_parts, axes.column_parts), sides, strict=True)]
    for side, own in zip(sides, parts, strict=True):
        if sum(own) != side or min(own) < 1:
            raise ValueError(f"{path} {shape} has a side of {side}, and its parts {own} do not add up to that.")
    rows, columns = (tuple(b for part in own for b in _cut(part, block_dim)) for own in parts)
    return MatrixView(path, shape, axes, rows, columns)


def _cut(side: int, block_dim: int | None) -> list[int]:
    if block_dim is None or side <= block_dim:
        return [side]
    rest = side % block_dim
    return [block_dim] * (side // block_dim) + ([rest] if rest else [])


def _ranges(sizes: Sequence[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
