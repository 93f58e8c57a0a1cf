"""AdaHessian's spatial averaging of a noisy diagonal."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax.tree import PyTree


def spatial_or_last_axis(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes averaged by default, from the number of axes alone.

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

    Attributes:
      axes: (path, shape) -> axes averaged together, where path is the parameter's `jax.tree_util.keystr`. The default,
        `spatial_or_last_axis`, is the paper's choice.
    """

    axes: Callable[[str, tuple[int, ...]], tuple[int, ...]] = spatial_or_last_axis

    def __call__(self, diagonal: PyTree) -> PyTree:
        """The averaged diagonal, with the shapes and dtypes of `diagonal`."""
        leaves, structure = jax.tree.flatten(diagonal)

        def average(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
            return jnp.broadcast_to(jnp.mean(leaf, axis=axes, keepdims=True), leaf.shape) if axes else leaf

        return jax.tree.unflatten(structure, map(average, leaves, self.axes_of(diagonal)))

    def axes_of(self, diagonal: PyTree) -> tuple[tuple[int, ...], ...]:
        """The axes averaged in each leaf, none in one without entries."""

        def axes(path: tuple, leaf: jax.Array) -> tuple[int, ...]:
            return tuple(self.axes(jax.tree_util.keystr(path), leaf.shape)) if leaf.size else ()

        return tuple(axes(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(diagonal))
