"""Layer uses: the places where a parameter leaf is multiplied into a model, each with its two factors.

At every layer use a block W of weights with G groups, n inputs and m outputs per group acts on T positions of an
example,

    h[t, g, :] = a[t, g, :] W[g],

so that the gradient of W is sum_t a[t, g, :] d[t, g, :]^T with d the cotangent of h. A matrix product, a convolution
(a holds the patches that the kernel meets) and a table lookup (a is one-hot) differ only in how a and h are laid out.
Inside scans all of a layer use's arrays have one axis in front per scan: positions where the scan reuses the same
weights, groups where it goes through stacked ones.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.jaxprs import Path
from curvax.structure.regions import Region
from curvax.structure.views import View, back, factor, squared, through, unscaled

DENSE, CONVOLUTION, EMBEDDING = "dense", "convolution", "embedding"

# Numbering the entries of an operand costs time and memory at planning.
_MOST_ENTRIES = 1 << 24


@dataclasses.dataclass(frozen=True)
class Bias:
    """A leaf, or a part of one, that is nothing but a bias of a layer use's output.

    Attributes:
      region: the leaf, or the part of one.
      order: (G m,): which of its entries is added to which output.
      scale: the number that an entry has been multiplied with where it meets the output: -1 of one that is subtracted.
    """

    region: Region
    order: np.ndarray = dataclasses.field(compare=False)
    scale: float = 1.0

    @property
    def leaf(self) -> int:
        """Index of the leaf."""
        return self.region.leaf

    def to_leaf(self, outputs: jax.Array) -> jax.Array:
        """(G, m) at its places in the leaf."""
        return self.region.put(self.to_region(outputs))

    def to_region(self, outputs: jax.Array) -> jax.Array:
        """(G, m) as the region."""
        return outputs.reshape(-1)[np.argsort(self.order)].reshape(self.region.shape)

    def from_leaf(self, leaf: jax.Array) -> jax.Array:
        """The leaf's entries in the order of the outputs, (G m,)."""
        return self.region.take(leaf).reshape(-1)[self.order]


@dataclasses.dataclass(frozen=True)
class LayerUse(abc.ABC):
    """One layer use.

    Attributes:
      leaf: index of the parameter leaf.
      views: from the leaf to the operand, scans' axes in front.
      path: the step that multiplies; inside a branch, the first branch that has this layer use.
      twins: the steps that are the same layer use in further branches (`curvax.structure.branches`).
      stacked: for each scan around it, outermost first, whether it goes through stacked weights.
      operand: which operand of the step the weights are.
      operand_shape, activation_shape, output_shape: of one iteration.
      output_dtype: dtype of the step's output.
      lengths: of the scans around it.
      bias: the leaf that is nothing but a bias of this layer use's output, or `None`.
    """

    leaf: int
    views: tuple[View, ...]
    path: Path
    stacked: tuple[bool, ...]
    operand: int
    operand_shape: tuple[int, ...]
    activation_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_dtype: Any
    lengths: tuple[int, ...]
    bias: Bias | None = None
    twins: tuple[Path, ...] = ()

    @property
    def paths(self) -> tuple[Path, ...]:
        """The steps that multiply, of which one is evaluated."""
        return (self.path, *self.twins)

    @property
    @abc.abstractmethod
    def rule(self) -> str:
        """`DENSE`, `CONVOLUTION` or `EMBEDDING`."""

    @property
    @abc.abstractmethod
    def activation(self) -> int:
        """The operand of the step that the activations are made of."""

    @property
    @abc.abstractmethod
    def block(self) -> tuple[int, int, int]:
        """(groups, inputs, outputs)."""

    @property
    @abc.abstractmethod
    def positions(self) -> int:
        """T, positions per example."""

    @property
    @abc.abstractmethod
    def position_axes(self) -> tuple[int, ...]:
        """Axes of one iteration's output that hold the positions, in their order."""

    @abc.abstractmethod
    def activations(self, recorded: jax.Array) -> jax.Array:
        """(T, G, n) from the recorded operand; for an embedding (T,) indices, n for an index that finds nothing."""

    @abc.abstractmethod
    def cotangents(self, d: Any) -> Any:
        """(T, G, m) from the cotangent of the step's output; NumPy arrays stay such."""

    @abc.abstractmethod
    def to_operand(self, block: jax.Array) -> jax.Array:
        """(G, n, m) laid out as the operand, axes of stacked weights in front."""

    @abc.abstractmethod
    def from_operand(self, operand: jax.Array) -> jax.Array:
        """The inverse of `to_operand`."""

    @abc.abstractmethod
    def same_layout(self, other: Any) -> bool:
        """Whether a block of another layer use of this class, over the same operand, means the same entries."""

    @property
    @abc.abstractmethod
    def entry_order(self) -> tuple[Any, ...]:
        """What `to_operand` depends on beside the shapes: equal orders lay blocks out alike."""

    def to_leaf(self, block: jax.Array) -> jax.Array:
        """A gradient of the block (G, n, m) as a gradient of the leaf."""
        return back(self.views, self.to_operand(block))

    def from_leaf(self, leaf: jax.Array) -> jax.Array:
        """The part of the leaf that acts here, as a block (G, n, m): the adjoint of `to_leaf`."""
        return self.from_operand(through(self.views, leaf))

    def squared(self) -> LayerUse:
        """The layer use for squares of gradients: factors on the way to the leaf are squared, too."""
        return dataclasses.replace(self, views=squared(self.views))

    @property
    def factor(self) -> float:
        """The number that the leaf is multiplied with before its use; its gradient is the block's times that number."""
        return factor(self.views)

    @property
    def perturbation_shape(self) -> tuple[int, ...]:
        """Shape of the step's output over all iterations."""
        return (*self.lengths, *self.output_shape)

    def by_position(self, x: np.ndarray, join: Callable[..., np.ndarray]) -> np.ndarray:
        """(T,) from an array that broadcasts against the step's output over all iterations.

        Args:
          x: the array.
          join: joins the entries of a position, as `np.min` does.
        """
        depth, (repeated, _) = len(self.lengths), self._levels()
        axes = [*repeated, *(depth + i for i in self.position_axes)]
        joined = join(x, axis=tuple(i for i in range(x.ndim) if i not in axes))
        # The axes that are left keep their order; positions have another one.
        sizes = [self.perturbation_shape[i] for i in sorted(axes)]
        return np.broadcast_to(joined, sizes).transpose(np.argsort(np.argsort(axes))).ravel()

    def _levels(self) -> tuple[list[int], list[int]]:
        """Axes of the scans: (positions, groups)."""
        return (
            [i for i, stacked in enumerate(self.stacked) if not stacked],
            [i for i, stacked in enumerate(self.stacked) if stacked],
        )

    def _stack(self) -> tuple[int, ...]:
        return tuple(length for length, stacked in zip(self.lengths, self.stacked, strict=True) if stacked)

    def _arrange(self, x: Any, positions: Sequence[int], groups: Sequence[int], widths: Sequence[int]) -> Any:
        """(T, G, width) from an array with the scans' axes in front; axes are those of one iteration."""
        depth, (repeated, stacked) = len(self.lengths), self._levels()
        t = [*repeated, *(depth + i for i in positions)]
        g = [*stacked, *(depth + i for i in groups)]
        w = [depth + i for i in widths]
        sizes = [math.prod(x.shape[i] for i in axes) for axes in (t, g, w)]
        return x.transpose((*t, *g, *w)).reshape(sizes)


@dataclasses.dataclass(frozen=True)
class DenseUse(LayerUse):
    """A `dot_general`.

    Attributes:
      numbers: its dimension numbers.
    """

    numbers: Any = None

    @property
    def rule(self) -> str:
        return DENSE

    @property
    def activation(self) -> int:
        return 1 - self.operand

    @property
    def block(self) -> tuple[int, int, int]:
        groups = math.prod(self._stack()) * math.prod(self.operand_shape[i] for i in self._batch(self.operand))
        return (
            groups,
            math.prod(self.operand_shape[i] for i in self._contracted(self.operand)),
            math.prod(self.operand_shape[i] for i in self._free(self.operand)),
        )

    @property
    def positions(self) -> int:
        repeated = math.prod(n for n, stacked in zip(self.lengths, self.stacked, strict=True) if not stacked)
        return repeated * math.prod(self.activation_shape[i] for i in self._free(self.activation))

    def _contracted(self, operand: int) -> tuple[int, ...]:
        return tuple(self.numbers[0][operand])

    def _batch(self, operand: int) -> tuple[int, ...]:
        return tuple(self.numbers[1][operand])

    def _free(self, operand: int) -> tuple[int, ...]:
        shape = self.operand_shape if operand == self.operand else self.activation_shape
        used = (*self._contracted(operand), *self._batch(operand))
        return tuple(i for i in range(len(shape)) if i not in used)

    def activations(self, recorded: jax.Array) -> jax.Array:
        side = self.activation
        return self._arrange(recorded, self._free(side), self._batch(side), self._contracted(side))

    @property
    def position_axes(self) -> tuple[int, ...]:
        return self._output_axes()[self.activation]

    def _output_axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Axes of the output that are left of the first operand, and of the second; those of the batch come first."""
        batch, first = len(self._batch(0)), len(self._free(0))
        return tuple(range(batch, batch + first)), tuple(range(batch + first, len(self.output_shape)))

    def cotangents(self, d: Any) -> Any:
        frees = self._output_axes()
        return self._arrange(d, frees[self.activation], range(len(self._batch(0))), frees[self.operand])

    def same_layout(self, other: DenseUse) -> bool:
        return self.operand_shape == other.operand_shape and self._axes() == other._axes() and self.block == other.block

    @property
    def entry_order(self) -> tuple[int, ...]:
        return self._axes()

    def _axes(self) -> tuple[int, ...]:
        depth = len(self._stack())
        order = (*self._batch(self.operand), *self._contracted(self.operand), *self._free(self.operand))
        return (*range(depth), *(depth + i for i in order))

    def to_operand(self, block: jax.Array) -> jax.Array:
        full, axes = (*self._stack(), *self.operand_shape), self._axes()
        return block.reshape([full[i] for i in axes]).transpose([int(i) for i in np.argsort(axes)])

    def from_operand(self, operand: jax.Array) -> jax.Array:
        return operand.transpose(self._axes()).reshape(self.block)


@dataclasses.dataclass(frozen=True)
class ConvolutionUse(LayerUse):
    """A `conv_general_dilated` whose kernel the weights are.

    Attributes:
      params: its parameters.
    """

    params: Any = dataclasses.field(default=None, compare=False)

    @property
    def rule(self) -> str:
        return CONVOLUTION

    @property
    def activation(self) -> int:
        return 0

    @property
    def _groups(self) -> int:
        return self.params["feature_group_count"]

    @property
    def _kernel(self) -> tuple[int, ...]:
        return tuple(self.operand_shape[i] for i in self.params["dimension_numbers"].rhs_spec[2:])

    @property
    def block(self) -> tuple[int, int, int]:
        out_axis, in_axis = self.params["dimension_numbers"].rhs_spec[:2]
        inputs = self.operand_shape[in_axis] * math.prod(self._kernel)
        return math.prod(self._stack()) * self._groups, inputs, self.operand_shape[out_axis] // self._groups

    @property
    def positions(self) -> int:
        repeated = math.prod(n for n, stacked in zip(self.lengths, self.stacked, strict=True) if not stacked)
        numbers = self.params["dimension_numbers"]
        return repeated * math.prod(d for i, d in enumerate(self.output_shape) if i != numbers.out_spec[1])

    def activations(self, recorded: jax.Array) -> jax.Array:
        """Patches, gathered by strided slices: for each axis of space one per entry of the kernel."""
        numbers, depth = self.params["dimension_numbers"], len(self.lengths)
        x = recorded.transpose((*range(depth), *(depth + i for i in numbers.lhs_spec)))
        x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (depth + 2) + self._padding())
        out = [self.output_shape[i] for i in numbers.out_spec[2:]]
        for axis, size in enumerate(self._kernel):
            # Taps gather at the end: (..., batch, channels, space..., taps...).
            taps = [self._tap(x, depth + 2 + axis, axis, tap, out[axis]) for tap in range(size)]
            x = jnp.stack(taps, axis=-1)
        batch, channels = x.shape[depth : depth + 2]
        x = x.reshape((*x.shape[:depth], batch, self._groups, channels // self._groups, *x.shape[depth + 2 :]))
        space = len(out)
        return self._arrange(x, [0, *range(3, 3 + space)], [1], [2, *range(3 + space, 3 + 2 * space)])

    def _padding(self) -> list[tuple[int, int, int]]:
        dilated = self.params["lhs_dilation"]
        return [(low, high, d - 1) for (low, high), d in zip(self.params["padding"], dilated, strict=True)]

    def _tap(self, x: jax.Array, axis: int, spatial: int, tap: int, count: int) -> jax.Array:
        stride = self.params["window_strides"][spatial]
        start = tap * self.params["rhs_dilation"][spatial]
        return jax.lax.slice_in_dim(x, start, start + (count - 1) * stride + 1, stride, axis)

    @property
    def position_axes(self) -> tuple[int, ...]:
        spec = self.params["dimension_numbers"].out_spec
        return (spec[0], *spec[2:])

    def cotangents(self, d: Any) -> Any:
        spec, depth = self.params["dimension_numbers"].out_spec, len(self.lengths)
        d = d.transpose((*range(depth), *(depth + i for i in spec)))
        d = d.reshape((*d.shape[: depth + 1], self._groups, d.shape[depth + 1] // self._groups, *d.shape[depth + 2 :]))
        return self._arrange(d, [0, *range(3, d.ndim - depth)], [1], [2])

    def same_layout(self, other: ConvolutionUse) -> bool:
        spec = self.params["dimension_numbers"].rhs_spec
        return spec == other.params["dimension_numbers"].rhs_spec and self.block == other.block

    @property
    def entry_order(self) -> tuple[int, ...]:
        return (*self.params["dimension_numbers"].rhs_spec, self._groups)

    def to_operand(self, block: jax.Array) -> jax.Array:
        spec, stack = self.params["dimension_numbers"].rhs_spec, self._stack()
        _, _, m = self.block
        inputs = self.operand_shape[spec[1]]
        x = block.reshape((*stack, self._groups, inputs, *self._kernel, m))
        depth, last = len(stack), x.ndim - 1
        x = x.transpose((*range(depth), depth, last, *range(depth + 1, last)))
        x = x.reshape((*stack, self._groups * m, inputs, *self._kernel))
        return x.transpose((*range(depth), *(depth + int(i) for i in np.argsort(spec))))

    def from_operand(self, operand: jax.Array) -> jax.Array:
        spec, depth = self.params["dimension_numbers"].rhs_spec, len(self._stack())
        x = operand.transpose((*range(depth), *(depth + i for i in spec)))
        groups, n, m = self._groups, *self.block[1:]
        x = x.reshape((*x.shape[:depth], groups, m, n))
        return x.swapaxes(-1, -2).reshape(self.block)


@dataclasses.dataclass(frozen=True)
class EmbeddingUse(LayerUse):
    """A `gather` of whole rows of a table.

    Attributes:
      clips: whether an index that does not fit is moved until it does; otherwise it finds nothing.
    """

    clips: bool = False

    @property
    def rule(self) -> str:
        return EMBEDDING

    @property
    def activation(self) -> int:
        return 1

    @property
    def block(self) -> tuple[int, int, int]:
        return math.prod(self._stack()), self.operand_shape[0], math.prod(self.operand_shape[1:])

    @property
    def positions(self) -> int:
        repeated = math.prod(n for n, stacked in zip(self.lengths, self.stacked, strict=True) if not stacked)
        return repeated * math.prod(self.activation_shape[:-1])

    def activations(self, recorded: jax.Array) -> jax.Array:
        rows = self.operand_shape[0]
        index = recorded.reshape(-1).astype(jnp.int32)
        if self.clips:
            return jnp.clip(index, 0, rows - 1)
        return jnp.where((index >= 0) & (index < rows), index, rows)

    @property
    def position_axes(self) -> tuple[int, ...]:
        return tuple(range(len(self.activation_shape) - 1))

    def cotangents(self, d: Any) -> Any:
        depth, index_axes = len(self.lengths), len(self.activation_shape) - 1
        return self._arrange(d, range(index_axes), [], range(index_axes, d.ndim - depth))

    def same_layout(self, other: EmbeddingUse) -> bool:
        return self.operand_shape == other.operand_shape

    @property
    def entry_order(self) -> tuple[int, ...]:
        return ()

    def to_operand(self, block: jax.Array) -> jax.Array:
        return block.reshape((*self._stack(), *self.operand_shape))

    def from_operand(self, operand: jax.Array) -> jax.Array:
        return operand.reshape(self.block)


@dataclasses.dataclass(frozen=True)
class PartialUse(LayerUse):
    """A layer use of a leaf that is only a part of the operand: some of its groups, inputs and outputs.

    Of h = a [W V], with W (3, 2) and V (3, 4): V has all inputs, and the outputs 2 to 5.

    Attributes:
      whole: the layer use of all of the operand.
      groups, inputs, outputs: which of them the leaf has.
    """

    whole: DenseUse | ConvolutionUse | None = None
    groups: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()

    @staticmethod
    def of(whole: DenseUse | ConvolutionUse, leaf_shape: tuple[int, ...]) -> PartialUse | None:
        """What a leaf has of an operand that its views pad; `None` if it is no block of groups, inputs, outputs."""
        if math.prod(whole.block) > _MOST_ENTRIES:
            return None
        numbers = np.arange(1, math.prod(leaf_shape) + 1, dtype=np.int64).reshape(leaf_shape)
        mine = np.asarray(whole.from_operand(through(unscaled(whole.views), numbers)))
        groups, inputs, outputs = (
            tuple(int(i) for i in np.flatnonzero(mine.any(axis=axes))) for axes in ((1, 2), (0, 2), (0, 1))
        )
        block = mine[np.ix_(groups, inputs, outputs)]
        if not block.all() or len(np.unique(block)) != block.size:
            return None
        common = {f.name: getattr(whole, f.name) for f in dataclasses.fields(LayerUse)}
        return PartialUse(**common, whole=whole, groups=groups, inputs=inputs, outputs=outputs)

    @property
    def of_whole(self) -> DenseUse | ConvolutionUse:
        """`whole`, which is always there."""
        if self.whole is None:
            raise AssertionError("a part is one of a whole.")
        return self.whole

    @property
    def rule(self) -> str:
        return self.of_whole.rule

    @property
    def activation(self) -> int:
        return self.of_whole.activation

    @property
    def block(self) -> tuple[int, int, int]:
        return len(self.groups), len(self.inputs), len(self.outputs)

    @property
    def positions(self) -> int:
        return self.of_whole.positions

    @property
    def position_axes(self) -> tuple[int, ...]:
        return self.of_whole.position_axes

    def activations(self, recorded: jax.Array) -> jax.Array:
        return self.of_whole.activations(recorded)[:, np.array(self.groups)][..., np.array(self.inputs)]

    def cotangents(self, d: Any) -> Any:
        return self.of_whole.cotangents(d)[:, np.array(self.groups)][..., np.array(self.outputs)]

    def to_operand(self, block: jax.Array) -> jax.Array:
        return self.of_whole.to_operand(jnp.zeros(self.of_whole.block, block.dtype).at[self._places].set(block))

    def from_operand(self, operand: jax.Array) -> jax.Array:
        return self.of_whole.from_operand(operand)[self._places]

    @property
    def _places(self) -> tuple[np.ndarray, ...]:
        return np.ix_(self.groups, self.inputs, self.outputs)

    def same_layout(self, other: PartialUse) -> bool:
        places = (self.groups, self.inputs, self.outputs) == (other.groups, other.inputs, other.outputs)
        return places and same_entries(self.of_whole, other.of_whole)

    @property
    def entry_order(self) -> tuple[Any, ...]:
        return (*self.of_whole.entry_order, self.groups, self.inputs, self.outputs)


def same_entries(a: LayerUse, b: LayerUse) -> bool:
    """Whether a block (G, n, m) means the same entries of a leaf, in the same order, at two layer uses of it."""
    return type(a) is type(b) and a.views == b.views and a.same_layout(b)
