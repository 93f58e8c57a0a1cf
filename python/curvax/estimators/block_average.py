"""AdaHessian's spatial averaging of a noisy diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp

from curvax.structure.axes import LeafAxes
from curvax.tree import PyTree

Uses: TypeAlias = Sequence[Sequence[LeafAxes]]
"""Per leaf the axes of the leaf at each of its uses, as `curvax.structure.axes.leaf_axes` finds them."""


def spatial_or_last_axis(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes averaged where nothing but the shape is known: a guess, as shapes of different layers can be equal.

    Convolution kernels in JAX's layout (spatial axes first, then input and output channels; 4 axes or more) are
    averaged over their spatial axes, matrices and 3-axis parameters over the last axis, vectors and scalars not at
    all.
    """
    del path
    if len(shape) >= 4:
        return tuple(range(len(shape) - 2))
    return (len(shape) - 1,) if len(shape) >= 2 else ()


@dataclasses.dataclass(frozen=True)
class BlockAverage:
    """Replaces every entry of a diagonal by the mean over its block.

    One Rademacher probe gives a very noisy diagonal; entries that act alike (the taps of one convolution filter) are
    averaged. See Yao et al., "ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning" (2021), section 3.2.

    What acts alike the model tells (`curvax.structure.axes`): the taps of a convolution kernel, whatever its number of
    dimensions and layout; of the weights of any other layer, one row: the last of its output axes, so one head of
    several. Layers stacked for a scan, experts and groups are averaged each for itself, and so is a scanned model as
    the unrolled one. A leaf that several layers use is averaged as the first of them does. One that is no layer's
    weights (a bias, a gain, what is not understood) keeps its entries.

    Attributes:
      axes: (path, shape) -> axes averaged together, in place of that, where path is the parameter's
        `jax.tree_util.keystr`.
    """

    axes: Callable[[str, tuple[int, ...]], tuple[int, ...]] | None = None

    def __call__(self, diagonal: PyTree, uses: Uses | None = None) -> PyTree:
        """The averaged diagonal, with the shapes and dtypes of `diagonal`; `uses` as in `axes_of`."""
        leaves, structure = jax.tree.flatten(diagonal)

        def average(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return jnp.broadcast_to(jnp.mean(leaf, axis=axes, keepdims=True), leaf.shape) if axes else leaf

        return jax.tree.unflatten(structure, map(average, leaves, self.axes_of(diagonal, uses)))

    def axes_of(self, diagonal: PyTree, uses: Uses | None = None) -> tuple[tuple[int, ...], ...]:
        """The axes averaged in each leaf, none in one without entries.

        Args:
          diagonal: arrays or shapes.
          uses: what the axes of each leaf are; `None` where no model is known, which leaves `spatial_or_last_axis`.
        """
        paths = jax.tree_util.tree_leaves_with_path(diagonal)
        if self.axes is None and uses is not None:
            return tuple(_averaged(own) if leaf.size else () for (_, leaf), own in zip(paths, uses, strict=True))
        rule = self.axes or spatial_or_last_axis
        return tuple(tuple(rule(jax.tree_util.keystr(path), leaf.shape)) if leaf.size else () for path, leaf in paths)


def _averaged(uses: Sequence[LeafAxes]) -> tuple[int, ...]:
    if not uses:
        return ()
    first = uses[0]
    return first.taps or first.outputs[-1:]
