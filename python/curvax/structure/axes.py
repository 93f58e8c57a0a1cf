"""What the axes of a parameter leaf are to the layers that use it: copies, inputs, outputs, taps of a convolution.

A shape does not tell: (3, 4, 5) is the kernel of a convolution in one dimension, a dense layer that writes into heads,
or three dense layers stacked for a scan. The layer uses do (`curvax.structure.uses`): each says what the axes of its
operand are, and the axes of the leaf are followed to these through the views in between.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import jax

from curvax.structure.recognize import recognize
from curvax.structure.replay import traced_program
from curvax.structure.uses import ConvolutionUse, DenseUse, LayerUse, PartialUse
from curvax.structure.views import Pad, Reshape, Slice, Stacked, Transpose, View
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LeafAxes:
    """The axes of a leaf at one of its uses, each kind in the order of the operand, the fastest last.

    An axis of length one, and one that is several of these at once, is none of them.

    Attributes:
      copies: along which weights act apart: layers of a scan, groups, experts.
      inputs: that the layer sums over.
      outputs: that it leaves.
      taps: of space, in the kernel of a convolution.
    """

    copies: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    taps: tuple[int, ...] = ()


def leaf_axes(
    function: Callable[[PyTree, Any], PyTree], params: PyTree, arguments: Any
) -> tuple[tuple[LeafAxes, ...], ...]:
    """Per leaf of `params` its axes at each of its uses in `function(params, arguments)`, in the order of the program.

    A leaf that is not, or not only, an operand of layers (a bias, a gain, what is not understood) has no uses here.

    Args:
      function: of parameters and anything else, such as a model or a loss.
      params: arrays or shapes.
      arguments: arrays or shapes.
    """
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    uses = recognize(traced_program(function, params, arguments), shapes).uses
    return tuple(tuple(_axes(use, shape) for use in uses if use.leaf == leaf) for leaf, shape in enumerate(shapes))


class _Kind(enum.Enum):
    COPIES = enum.auto()
    INPUTS = enum.auto()
    OUTPUTS = enum.auto()
    TAPS = enum.auto()


def _axes(use: LayerUse, shape: tuple[int, ...]) -> LeafAxes:
    operand = _through(use.views, [[_Run(frozenset({axis}), size)] for axis, size in enumerate(shape)])
    axes: dict[_Kind, list[int]] = {kind: [] for kind in _Kind}
    for kind, axis in _kinds(use):
        for run in operand[axis]:
            axes[kind] += sorted(run.axes)
    wide = [axis for axis, size in enumerate(shape) if size > 1]
    # An axis of which this use sees a single entry: others see the others.
    axes[_Kind.COPIES] += [axis for axis in wide if not any(axis in of for of in axes.values())]
    single = {axis for axis in wide if sum(axis in of for of in axes.values()) == 1}

    def of(kind: _Kind) -> tuple[int, ...]:
        return tuple(dict.fromkeys(axis for axis in axes[kind] if axis in single))

    return LeafAxes(of(_Kind.COPIES), of(_Kind.INPUTS), of(_Kind.OUTPUTS), of(_Kind.TAPS))


def _kinds(use: LayerUse) -> Iterator[tuple[_Kind, int]]:
    """(kind, axis of the operand with the axes of stacked weights in front), kind by kind in the operand's order."""
    depth = sum(use.stacked)
    use = use.of_whole if isinstance(use, PartialUse) else use
    yield from ((_Kind.COPIES, axis) for axis in range(depth))
    if isinstance(use, DenseUse):
        contracted, batch = (tuple(of[use.operand]) for of in use.numbers)
        for axis in range(len(use.operand_shape)):
            kind = _Kind.COPIES if axis in batch else _Kind.INPUTS if axis in contracted else _Kind.OUTPUTS
            yield kind, depth + axis
    elif isinstance(use, ConvolutionUse):
        outputs, inputs, *taps = use.params["dimension_numbers"].rhs_spec
        yield _Kind.OUTPUTS, depth + outputs
        yield _Kind.INPUTS, depth + inputs
        yield from ((_Kind.TAPS, depth + axis) for axis in taps)
    else:
        yield _Kind.INPUTS, depth
        yield from ((_Kind.OUTPUTS, depth + axis) for axis in range(1, len(use.operand_shape)))


@dataclasses.dataclass(frozen=True)
class _Run:
    """Entries along which the axes `axes` of the leaf, and no others, are walked through."""

    axes: frozenset[int]
    size: int


_Axes: TypeAlias = list[list[_Run]]
"""Per axis of an array the runs that it is made of, the fastest last."""


def _through(views: Sequence[View], axes: _Axes) -> _Axes:
    for view in views:
        axes = _view(view, axes)
    return axes


def _view(view: View, axes: _Axes) -> _Axes:
    if isinstance(view, Stacked):
        return [axes[0], *_view(view.view, axes[1:])]
    if isinstance(view, Transpose):
        return [axes[axis] for axis in view.permutation]
    if isinstance(view, Slice):
        return [
            runs if stop - start == before else [_Run(_joined(runs), len(range(start, stop, stride)))]
            for runs, before, (start, stop, stride) in zip(axes, view.before, view.box, strict=True)
        ]
    if isinstance(view, Pad):
        sizes = zip(axes, view.before, view.after, strict=True)
        return [runs if before == after else [_Run(_joined(runs), after)] for runs, before, after in sizes]
    if isinstance(view, Reshape):
        return _reshaped([run for runs in axes for run in runs if run.size != 1], view.after)
    return axes


def _joined(runs: Sequence[_Run]) -> frozenset[int]:
    return frozenset[int]().union(*(run.axes for run in runs))


def _reshaped(runs: list[_Run], shape: Sequence[int]) -> _Axes:
    """The runs, slowest first, dealt out to the axes of `shape`; where they do not fit, all of them are one run."""
    if any(size == 0 for size in shape):
        return [[] for _ in shape]
    rest, made = list(runs), []
    for size in shape:
        own: list[_Run] = []
        while (left := size // math.prod(run.size for run in own)) > 1:
            run = rest.pop(0)
            if run.size > left and run.size % left == 0:
                rest.insert(0, _Run(run.axes, run.size // left))
                run = _Run(run.axes, left)
            elif left % run.size:
                return [[_Run(_joined(runs), size)] for size in shape]
            own.append(run)
        made.append(own)
    return made
