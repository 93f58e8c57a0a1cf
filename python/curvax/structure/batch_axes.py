"""Which leaves of a batch hold the examples, and on which axis; the other leaves are shared by all examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax.jaxprs import Program
from curvax.tree import PyTree

AxesPrefix: TypeAlias = PyTree
"""A tree of axes and `None`, a prefix of the tree that it speaks of, as `in_axes` of `jax.vmap` is."""


@dataclasses.dataclass(frozen=True)
class BatchAxes:
    """The axis that holds the examples of each leaf, in the order of `jax.tree.leaves`.

    Attributes:
      axes: non-negative; `None` for a leaf that all examples share.
    """

    axes: tuple[int | None, ...]

    @property
    def any(self) -> bool:
        """Whether any leaf holds examples."""
        return any(axis is not None for axis in self.axes)

    @property
    def fronted(self) -> BatchAxes:
        """The axes after `to_front`."""
        return BatchAxes(tuple(None if axis is None else 0 for axis in self.axes))

    def only(self, leaves: Collection[int]) -> BatchAxes:
        """The axes of these leaves, and none of the others."""
        return BatchAxes(tuple(axis if i in leaves else None for i, axis in enumerate(self.axes)))

    def grown(self, fits: Callable[[BatchAxes], bool]) -> Iterator[BatchAxes]:
        """Sets of these leaves that fit and to which none can be added; other sets than all of them."""
        leaves = [i for i, axis in enumerate(self.axes) if axis is not None]
        tried: set[BatchAxes] = {self}
        for seed in leaves:
            chosen: list[int] = []
            for leaf in dict.fromkeys([seed, *leaves]):
                if fits(self.only([*chosen, leaf])):
                    chosen.append(leaf)
            if chosen and self.only(chosen) not in tried:
                tried.add(self.only(chosen))
                yield self.only(chosen)

    def count(self, batch: PyTree) -> int:
        """The number of examples of a batch (arrays or shapes).

        Raises:
          ValueError: no leaf holds examples, or leaves hold different numbers of them.
        """
        sizes = {
            np.shape(leaf)[axis]
            for leaf, axis in zip(jax.tree.leaves(batch), self.axes, strict=True)
            if axis is not None
        }
        if len(sizes) != 1:
            raise ValueError(
                f"the axes of examples are {sorted(sizes)} long: give all leaves as many examples, and say by "
                "batch_axes= which leaves hold none."
            )
        return sizes.pop()

    def sizes(self, batch: PyTree) -> tuple[int, ...]:
        """The distinct numbers of examples of a batch that may have several sets of them."""
        leaves = zip(jax.tree.leaves(batch), self.axes, strict=True)
        return tuple(sorted({np.shape(leaf)[axis] for leaf, axis in leaves if axis is not None}))

    def resized(self, batch: PyTree, size: int) -> PyTree:
        """The shapes of a batch (given by shapes) with another number of examples."""
        return self._map(
            lambda x, axis: jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype), batch
        )

    def example(self, leaves: Sequence[jax.Array], index: jax.Array) -> list[jax.Array]:
        """The leaves of one example, its axis kept with length one; what is shared stays whole."""
        return [
            x if axis is None else jax.lax.dynamic_slice_in_dim(x, index, 1, axis)
            for x, axis in zip(leaves, self.axes, strict=True)
        ]

    def expanded(self, leaves: Sequence[jax.Array]) -> list[jax.Array]:
        """Leaves of an example without its axis, as inside a `vmap` over the examples, with the axis of length one."""
        return [x if axis is None else jnp.expand_dims(x, axis) for x, axis in zip(leaves, self.axes, strict=True)]

    def slice(self, batch: PyTree, start: int, stop: int) -> PyTree:
        """The examples from `start` to `stop`."""
        return self._map(lambda x, axis: jax.lax.slice_in_dim(x, start, stop, axis=axis), batch)

    def share(self, batch: PyTree, first: int, last: int, pieces: int) -> PyTree:
        """The pieces from `first` to `last` of each set of examples, cut into equal `pieces`."""

        def some(x: jax.Array, axis: int) -> jax.Array:
            each = x.shape[axis] // pieces
            return jax.lax.slice_in_dim(x, first * each, last * each, axis=axis)

        return self._map(some, batch)

    def to_front(self, batch: PyTree) -> PyTree:
        """The batch with its examples on the first axis."""
        return self._map(lambda x, axis: _move(x, axis, 0), batch)

    def from_front(self, batch: PyTree) -> PyTree:
        """The inverse of `to_front`."""
        return self._map(lambda x, axis: _move(x, 0, axis), batch)

    def parts(self, batch: PyTree, size: int | None, count: int) -> Parts:
        """The first `count` parts of `size` examples each, dealt out; without a size, of all examples of each set,
        which follow one another.
        """
        leaves, structure = jax.tree.flatten(self.to_front(batch))

        def stacked(x: jax.Array) -> jax.Array:
            if size is not None:
                return dealt(x, count, size)
            each = x.shape[0] // count
            return x[: count * each].reshape(count, each, *x.shape[1:])

        held = [stacked(x) for x, axis in zip(leaves, self.axes, strict=True) if axis is not None]
        shared = [jnp.asarray(x) for x, axis in zip(leaves, self.axes, strict=True) if axis is None]
        return Parts(self, structure, held, shared)

    def _map(self, function: Callable[[Any, int], Any], batch: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(batch)
        mapped = [x if axis is None else function(x, axis) for x, axis in zip(leaves, self.axes, strict=True)]
        return jax.tree.unflatten(structure, mapped)


def dealt(x: jax.Array, count: int, size: int) -> jax.Array:
    """(count, size, ...): example i of the first count * size goes to part i modulo count, as cards are dealt.

    Of a batch whose first axis is split over devices, every part is split over all of them, and nothing moves:

        device    0        1                       0    1
        examples  0 1 2 3  4 5 6 7      parts  0: 0 2  4 6    1: 1 3  5 7
    """
    return jnp.swapaxes(x[: count * size].reshape(size, count, *x.shape[1:]), 0, 1)


def collected(parts: jax.Array) -> jax.Array:
    """The inverse of `dealt`."""
    return jnp.swapaxes(parts, 0, 1).reshape(parts.shape[0] * parts.shape[1], *parts.shape[2:])


def _move(x: Any, source: int, target: int) -> Any:
    """`jnp.moveaxis`, of shapes too."""
    if source == target:
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda y: jnp.moveaxis(y, source, target), x)
    return jnp.moveaxis(x, source, target)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Parts:
    """Equal parts of a batch.

    Attributes:
      axes, structure: of the batch; static.
      held: leaves that hold examples, (parts, examples of one, ...).
      shared: the other leaves.
    """

    axes: BatchAxes = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})
    held: list[jax.Array]
    shared: list[Any]

    def part(self, held: Sequence[jax.Array]) -> PyTree:
        """The batch that is one part, of its entries of `held`."""
        mine, others = iter(held), iter(self.shared)
        leaves = [next(others) if axis is None else next(mine) for axis in self.axes.axes]
        return self.axes.from_front(jax.tree.unflatten(self.structure, leaves))


@dataclasses.dataclass(frozen=True)
class ExampleAxes:
    """Where a batch holds its examples, and what can be done with them.

    Attributes:
      axes: which leaves of the batch hold them.
      mixed: why they cannot be told to stay apart; empty if they do.
      refused: why the loss of the batch is not made of those of pieces of it, with the mend; empty if it is.
      single: makes the program of the model on one example, where there is a model and its examples do not interact.
    """

    axes: BatchAxes
    mixed: str = ""
    refused: str = ""
    single: Callable[[], Program] | None = None


def expand_axes(prefix: AxesPrefix, tree: PyTree, name: str = "batch_axes") -> BatchAxes:
    """The axes that a prefix gives to the leaves of a tree (arrays or shapes).

    Raises:
      TypeError, ValueError: it is no prefix of the tree, or an axis is none of its leaf's; the message names the leaf.
    """
    try:
        full = jax.tree.map(
            lambda axis, below: jax.tree.map(lambda _: _Axis(axis), below), prefix, tree, is_leaf=_is_none
        )
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{name} is {prefix!r}: give an axis or None for every leaf, in a tree that is a prefix of "
            f"{jax.tree.structure(tree)}."
        ) from error
    axes = [_checked(axis.value, *leaf, name) for axis, leaf in zip(
        jax.tree.leaves(full), jax.tree_util.tree_leaves_with_path(tree), strict=True
    )]  # fmt: skip
    return BatchAxes(tuple(axes))


def leading_axes(prefix: AxesPrefix | BatchAxes | None, inputs: PyTree) -> BatchAxes | None:
    """The axes that a prefix gives to inputs whose examples are on the first axis; `None` if it is `None`.

    Raises:
      TypeError, ValueError: as `expand_axes`, or the examples are on another axis.
    """
    if prefix is None or isinstance(prefix, BatchAxes):
        return prefix
    axes = expand_axes(prefix, inputs)
    if not set(axes.axes) <= {0, None}:
        raise ValueError(f"batch_axes is {prefix!r}: bring the examples to the first axis, and say 0 or None here.")
    return axes


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis as a leaf of a tree, which a bare `None` is not."""

    value: Any


def _is_none(x: Any) -> bool:
    return x is None


def _checked(axis: Any, path: Any, leaf: Any, name: str) -> int | None:
    if axis is None:
        return None
    where = jax.tree_util.keystr(path) or "the batch"
    if not isinstance(axis, int) or isinstance(axis, bool):
        raise TypeError(
            f"{name} gives {where} the axis {axis!r}: pass an integer, or None for a leaf without examples."
        )
    shape = tuple(np.shape(leaf))
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"{name} gives {where} the axis {axis}, but its shape is {shape}.")
    return axis % len(shape)
