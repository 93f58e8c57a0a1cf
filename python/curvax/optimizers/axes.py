"""Rules that say which axes of a parameter are the rows and the columns of a matrix.

SOAP, Shampoo and Muon act on matrices, and what a model keeps is arrays. A shape does not tell: (12, 64, 64) may be
twelve layers stacked for a scan, twelve heads, or one matrix that writes into heads. A rule does, by the leaf's path
and shape:

    {"q": (64, 4, 16)}     LastTwoAxes()                                64 matrices (4, 16)
                           ByPath({"q$": MatrixAxes((0,), (1, 2))})     1 matrix (64, 64)
                           ByPath({"q$": MatrixAxes((0,), (2,))})       4 matrices (64, 16), one per head

`axes_of_model` reads the axes off the layers that use each leaf, so that nobody has to say them. What a rule calls no
matrix is a vector: SOAP takes Adam's step there and Muon's labels leave it to AdamW.
"""

from __future__ import annotations

import abc
import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from curvax.structure.axes import LeafAxes, leaf_axes
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """How the axes of a leaf make a matrix; the axes that are neither rows nor columns count its copies.

    Attributes:
      rows, columns: axes, the fastest last; negative ones count from the end.
      shape: what the leaf is reshaped to first, `None` for its own shape; the axes are those of this shape.
      row_parts, column_parts: sizes of matrices that stand side by side along a side, such as (512, 128, 128) for
        queries, keys and values in one array; they add up to the side. `()` for one.
    """

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    shape: tuple[int, ...] | None = None
    row_parts: tuple[int, ...] = ()
    column_parts: tuple[int, ...] = ()


class MatrixRule(abc.ABC):
    """What of a parameter is a matrix. An implementor is a frozen dataclass with `axes`."""

    @abc.abstractmethod
    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """The matrix axes of a leaf, or `None` where it is no matrix.

        Args:
          path: of the leaf, its keys joined by slashes ("layers/0/kernel"), without the boxes of Flax.
          shape: of the leaf, which has entries.
        """


@dataclasses.dataclass(frozen=True)
class LastTwoAxes(MatrixRule):
    """Matrices over the last two axes, one for each index of the axes before them: layers that are scanned over."""

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """The last two axes; `None` of vectors and scalars."""
        del path
        return MatrixAxes((len(shape) - 2,), (len(shape) - 1,)) if len(shape) > 1 else None


@dataclasses.dataclass(frozen=True)
class NoMatrices(MatrixRule):
    """Every leaf is a vector."""

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """`None`."""
        del path, shape


@dataclasses.dataclass(frozen=True)
class Convolutions(MatrixRule):
    """Convolution kernels in JAX's layout (taps..., inputs, outputs) as one matrix (taps x inputs, outputs).

    A leaf is taken for a kernel if it has four axes or more and those before the last two are at most `longest` long:
    a guess, which `axes_of_model` spares. Depthwise kernels, with one input or one output, are no matrices.

    Attributes:
      longest: the most taps along an axis. 7 by default: larger kernels are rare, shorter stacks of layers too.
      otherwise: the rule of all other leaves.
    """

    longest: int = 7
    otherwise: MatrixRule = LastTwoAxes()

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """Of a kernel all axes but the last as rows."""
        if len(shape) < 4 or max(shape[:-2]) > self.longest:
            return self.otherwise.axes(path, shape)
        return None if 1 in shape[-2:] else MatrixAxes(tuple(range(len(shape) - 1)), (len(shape) - 1,))


@dataclasses.dataclass(frozen=True)
class MergedAxes(MatrixRule):
    """Neighboring axes are merged while their product is at most `longest` (Anil et al. 2020, arXiv 2002.09018).

    (3, 3, 16, 32) with a longest side of 128 is (9, 16, 32), nine matrices; with 512 it is (144, 32), one of them. A
    leaf that is a single axis after that is no matrix.

    Attributes:
      longest: the longest side that merging makes.
    """

    longest: int

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """The last two of the merged axes."""
        del path
        merged = [1]
        for size in shape:
            if merged[-1] * size <= self.longest:
                merged[-1] *= size
            else:
                merged.append(size)
        sides = tuple(size for size in merged if size > 1)
        return MatrixAxes((len(sides) - 2,), (len(sides) - 1,), shape=sides) if len(sides) > 1 else None


@dataclasses.dataclass(frozen=True)
class ByPath(MatrixRule):
    """The axes by regular expressions that are searched for in the path; the first one that is there counts.

    Attributes:
      patterns: pattern -> axes, or `None` for what is no matrix.
      otherwise: the rule of all other leaves.
    """

    patterns: Mapping[str, MatrixAxes | None]
    otherwise: MatrixRule = LastTwoAxes()

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """Of the first pattern."""
        for pattern, axes in self.patterns.items():
            if re.search(pattern, path):
                return axes
        return self.otherwise.axes(path, shape)


@dataclasses.dataclass(frozen=True)
class ByFunction(MatrixRule):
    """The axes by a function.

    Attributes:
      function: (path, shape) -> axes or `None`.
    """

    function: Callable[[str, tuple[int, ...]], MatrixAxes | None]

    def axes(self, path: str, shape: tuple[int, ...]) -> MatrixAxes | None:
        """What the function says."""
        return self.function(path, shape)


def axes_of_model(
    function: Callable[[PyTree, Any], PyTree], params: PyTree, arguments: Any, *, heads_apart: bool = False
) -> ByPath:
    """The axes that the layers of a model give its parameters: inputs and taps are rows, outputs columns.

    Layers of a scan, experts and groups are copies. A leaf that no layer uses (a bias, a gain, what is not understood)
    is no matrix, nor is one without inputs or outputs, as a depthwise kernel. One that several layers use is seen as
    the first of them does.

    Args:
      function: `function(params, arguments)`, such as a model or a loss.
      params: arrays or shapes.
      arguments: arrays or shapes.
      heads_apart: of several input or output axes all but the last are copies too: a matrix for each head. False by
        default, one matrix for all of them, as Muon's and SOAP's authors have.
    """
    uses = leaf_axes(function, params, arguments)
    found = {path: _of_use(own[0], heads_apart) if own else None for path, own in zip(paths(params), uses, strict=True)}
    return ByPath({f"^{re.escape(path)}$": axes for path, axes in found.items()}, otherwise=NoMatrices())


def _of_use(use: LeafAxes, heads_apart: bool) -> MatrixAxes | None:
    inputs, outputs = (use.inputs[-1:], use.outputs[-1:]) if heads_apart else (use.inputs, use.outputs)
    return MatrixAxes(use.taps + inputs, outputs) if inputs and outputs else None


def paths(params: PyTree) -> tuple[str, ...]:
    """The path of each leaf, keys joined by slashes; a box, a node with one child `value`, is left out."""
    box = jax.tree_util.GetAttrKey("value")
    found = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    return tuple(
        jax.tree_util.keystr(path[:-1] if path and path[-1] == box else path, simple=True, separator="/")
        for path in found
    )
