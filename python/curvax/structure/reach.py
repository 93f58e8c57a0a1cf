"""Finds which outputs of a model each entry of an intermediate value can influence ("reaches").

The program is followed backward, and only shapes are used. Outputs are numbered. For each entry, only the lowest and
the highest number that it reaches are stored; it counts as reaching every number between them. If the ranges of two
entries do not overlap, the entries share no output. This shows whether a model treats every position of a sequence, or
every pixel of an image, separately, even if it reshapes, reverses or transposes them. Attention and most convolutions
do not treat them separately.

1. Every output reaches its own number.
2. From the last step to the first, a rule per primitive says which entries of the output each entry of an operand goes
   into, and the operand reaches what these do.
3. A value that several steps read reaches the least first and the greatest last of all answers.

    three tokens, y = tanh(x w)                    numbers 0 1 2 of y
        y -> x w    0 1 2                          elementwise
        x w -> x    0 1 2                          position t of x reaches output t alone
    three tokens, y = attention(x)
        y -> values    first 0 0 0, last 2 2 2     the product with the weights sums over positions

The numbers are NumPy arrays that broadcast against the value: where features do not matter, and they seldom do, they
take no memory. An equation that is not understood sends everything everywhere, which is never wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jax.extend.core import Literal

from curvax.jaxprs import BARRIER, COND, CUSTOM, REMATERIALIZED, SCAN, Path, Program, Step, backward, scan_counts
from curvax.structure.batch_rules import CUMULATIVE, ELEMENTWISE, REDUCTIONS, WINDOWS

_NOWHERE = np.iinfo(np.int64).max
# Iterations of a scan that are looked at one by one, where its stacked results reach different outputs.
_MOST_ITERATIONS = 1024


@dataclasses.dataclass(frozen=True)
class Reach:
    """The outputs that the entries of a value reach.

    Attributes:
      first, last: int64 arrays that broadcast against the value; `last` is less than `first` where none is reached.
    """

    first: np.ndarray
    last: np.ndarray

    @staticmethod
    def of(numbers: np.ndarray) -> Reach:
        """Every entry reaches the output of its number."""
        return Reach(numbers, numbers)

    @staticmethod
    def nowhere(ndim: int) -> Reach:
        """Nothing is reached."""
        shape = (1,) * ndim
        return Reach(np.full(shape, _NOWHERE), np.full(shape, -1))

    @property
    def ndim(self) -> int:
        """Number of axes of the value."""
        return self.first.ndim

    def __or__(self, other: Reach) -> Reach:
        return Reach(np.minimum(self.first, other.first), np.maximum(self.last, other.last))

    def same(self, other: Reach) -> bool:
        """Whether both are equal."""
        return np.array_equal(self.first, other.first) and np.array_equal(self.last, other.last)

    def map(self, function: Callable[[np.ndarray], np.ndarray]) -> Reach:
        """The same function on both arrays: one that moves or repeats entries."""
        return Reach(function(self.first), function(self.last))

    def over(self, axes: Iterable[int]) -> Reach:
        """Along these axes every entry reaches what any of them does; they have length one now."""
        axes = tuple(axes)
        return Reach(self.first.min(axes, keepdims=True), self.last.max(axes, keepdims=True)) if axes else self

    def everywhere(self, ndim: int) -> Reach:
        """Every entry of a value with so many axes reaches all of it."""
        return Reach(np.full((1,) * ndim, self.first.min()), np.full((1,) * ndim, self.last.max()))

    def broadcast(self, shape: Sequence[int]) -> Reach:
        """The same, broadcast."""
        return self.map(lambda x: np.broadcast_to(x, shape))


@dataclasses.dataclass(frozen=True)
class ProgramReach:
    """The outputs that the arguments and some steps of a program reach.

    Attributes:
      arguments: per argument.
      steps: per step that was asked for, its first output; inside scans their axes in front.
    """

    arguments: list[Reach]
    steps: dict[Path, Reach]


def reach_of(program: Program, results: Sequence[Reach | None], wanted: frozenset[Path] = frozenset()) -> ProgramReach:
    """Follows a program backward.

    Args:
      program: the program.
      results: what its results reach; `None` where they do not matter.
      wanted: paths of steps.
    """
    steps: dict[Path, Reach] = {}

    def ask(index: int, step: Step, asked: list[Reach | None]) -> list[Reach] | None:
        outputs = [
            Reach.nowhere(len(aval.shape)) if reach is None else reach
            for reach, aval in zip(asked, step.output_avals, strict=True)
        ]
        if (index,) in wanted:
            steps[(index,)] = outputs[0]
        inside = _below(wanted, index)
        if not inside and all(reach is None for reach in asked):
            return None
        below = _step(step, outputs, inside)
        steps.update({(index, *path): reach for path, reach in below.steps.items()})
        return below.arguments

    arguments = backward(program, results, ask, Reach.__or__)
    return ProgramReach([Reach.nowhere(0) if reach is None else reach for reach in arguments], steps)


def _below(paths: frozenset[Path], index: int) -> frozenset[Path]:
    """The paths inside a step, or a branch of one."""
    return frozenset(path[1:] for path in paths if path[0] == index and len(path) > 1)


def _step(step: Step, outputs: list[Reach], wanted: frozenset[Path]) -> ProgramReach:
    name = step.primitive
    if name in REMATERIALIZED or name in CUSTOM:
        return reach_of(step.bodies[0], outputs, wanted)
    if name == SCAN:
        return _scan(step, outputs, wanted)
    if name == COND:
        branches = [reach_of(body, outputs, _below(wanted, which)) for which, body in enumerate(step.bodies)]
        joined = [functools.reduce(Reach.__or__, parts) for parts in zip(*(b.arguments for b in branches), strict=True)]
        steps = {(i, *path): reach for i, branch in enumerate(branches) for path, reach in branch.steps.items()}
        return ProgramReach([_everywhere(step, outputs)[0], *joined], steps)
    if name == BARRIER:
        return ProgramReach(outputs, {})
    if name in ("split", "unstack"):
        return ProgramReach([_split(step, outputs)], {})
    if name in _RULES and len(step.outputs) == 1:
        return ProgramReach(_RULES[name](step, outputs[0]), {})
    return ProgramReach(_everywhere(step, outputs), {})


def _everywhere(step: Step, outputs: Sequence[Reach]) -> list[Reach]:
    whole = functools.reduce(Reach.__or__, (reach.everywhere(0) for reach in outputs))
    return [whole.everywhere(len(aval.shape)) for aval in step.input_avals]


def _scan(step: Step, outputs: list[Reach], wanted: frozenset[Path]) -> ProgramReach:
    """Follows a scan from the last iteration to the first.

    The input for one iteration (`asked`) has two parts: what the carried state after it reaches, and what its slice of
    the stacked results reaches. If both equal those of the previous iteration visited, its answer is used again.
    """
    consts, carried = scan_counts(step.eqn)
    length, state, stacked = step.eqn.params["length"], outputs[:carried], outputs[carried:]
    if length > _MOST_ITERATIONS:
        stacked = [reach.over((0,)) for reach in stacked]
    asked: list[Reach] | None = None
    answer = ProgramReach([], {})
    each: list[ProgramReach] = []
    alike = all(len(x) == 1 for reach in stacked for x in (reach.first, reach.last))
    for i in range(length) if step.eqn.params["reverse"] else reversed(range(length)):
        slices = [reach.map(lambda x, i=i: x[min(i, len(x) - 1)]) for reach in stacked]
        if asked is None or not all(map(Reach.same, asked, [*state, *slices])):
            asked = [*state, *slices]
            answer = reach_of(step.bodies[0], asked, wanted)
        elif alike:
            each += [answer] * (length - len(each))
            break
        each.append(answer)
        # What an iteration starts with reaches what the one before ends with.
        state = answer.arguments[consts : consts + carried]
    if not each:
        return ProgramReach(_everywhere(step, outputs), {})
    if not step.eqn.params["reverse"]:
        each.reverse()
    fixed = [functools.reduce(Reach.__or__, (one.arguments[i] for one in each)) for i in range(consts)]
    scanned = [_stack([one.arguments[i] for one in each]) for i in range(consts + carried, len(step.inputs))]
    return ProgramReach(
        [*fixed, *state, *scanned], {path: _stack([one.steps[path] for one in each]) for path in wanted}
    )


def _stack(parts: Sequence[Reach]) -> Reach:
    """One axis more in front, of length one if all are alike."""
    if all(part is parts[0] or part.same(parts[0]) for part in parts):
        return parts[0].map(lambda x: x[None])
    shape = np.broadcast_shapes(*(part.first.shape for part in parts))
    parts = [part.broadcast(shape) for part in parts]
    return Reach(np.stack([part.first for part in parts]), np.stack([part.last for part in parts]))


def _elementwise(step: Step, out: Reach) -> list[Reach]:
    """An axis of length one is repeated; so is a number."""
    shape = step.output_avals[0].shape

    def operand(mine: tuple[int, ...]) -> Reach:
        if len(mine) != len(shape):
            return out.everywhere(len(mine))
        return out.over(i for i, (a, b) in enumerate(zip(mine, shape, strict=True)) if a != b)

    return [operand(aval.shape) for aval in step.input_avals]


def _broadcast(step: Step, out: Reach) -> list[Reach]:
    dimensions, shape = step.eqn.params["broadcast_dimensions"], step.input_avals[0].shape
    repeated = [i for i in range(out.ndim) if i not in dimensions or shape[dimensions.index(i)] == 1]
    fresh = tuple(i for i in range(out.ndim) if i not in dimensions)
    return [out.over(repeated).map(lambda x: np.squeeze(x, fresh))]


def _reshape(step: Step, out: Reach) -> list[Reach]:
    before, after = step.input_avals[0].shape, step.output_avals[0].shape
    if step.eqn.params["dimensions"] is not None or 0 in before:
        return [out.everywhere(len(before))]
    source, target = [1] * len(after), [1] * len(before)
    # Groups of axes that are regrouped among themselves; those along which nothing changes stay unmaterialized.
    for mine, theirs in _groups(before, after):
        if any(max(out.first.shape[j], out.last.shape[j]) > 1 for j in theirs):
            for i in mine:
                target[i] = before[i]
            for j in theirs:
                source[j] = after[j]
    return [out.map(lambda x: np.broadcast_to(x, source).reshape(target))]


def _groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[range, range]]:
    """Splits two shapes of equal size into the shortest runs of axes whose sizes have equal products.

    For example, (6, 4) and (2, 3, 4) give axis 0 with axes 0 and 1 (6 = 2 * 3), and axis 1 with axis 2 (4 = 4).
    """
    groups, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        start, other = i, j
        i, j = min(i + 1, len(before)), min(j + 1, len(after))
        while (mine := math.prod(before[start:i])) != (theirs := math.prod(after[other:j])):
            if mine < theirs:
                i += 1
            else:
                j += 1
        groups.append((range(start, i), range(other, j)))
    return groups


def _transpose(step: Step, out: Reach) -> list[Reach]:
    order = np.argsort(step.eqn.params["permutation"])
    return [out.map(lambda x: x.transpose(order))]


def _rev(step: Step, out: Reach) -> list[Reach]:
    return [out.map(lambda x: np.flip(x, step.eqn.params["dimensions"]))]


def _squeeze(step: Step, out: Reach) -> list[Reach]:
    # A negative axis counts from the end of the operand.
    axes = tuple(axis % len(step.input_avals[0].shape) for axis in step.eqn.params["dimensions"])
    return [out.map(lambda x: np.expand_dims(x, axes))]


def _expand(step: Step, out: Reach) -> list[Reach]:
    return [out.map(lambda x: np.squeeze(x, tuple(step.eqn.params["dimensions"])))]


def _reduce(step: Step, out: Reach) -> list[Reach]:
    return [out.map(lambda x: np.expand_dims(x, tuple(step.eqn.params["axes"])))] * len(step.inputs)


def _cumulative(step: Step, out: Reach) -> list[Reach]:
    return [out.over((step.eqn.params["axis"],))]


def _window(step: Step, out: Reach) -> list[Reach]:
    sizes, shape = step.eqn.params["window_dimensions"], step.output_avals[0].shape

    def operand(before: tuple[int, ...]) -> Reach:
        if len(before) != len(shape):
            return out.everywhere(len(before))
        return out.over(i for i, size in enumerate(sizes) if size != 1 or before[i] != shape[i])

    return [operand(aval.shape) for aval in step.input_avals]


def _slices(step: Step, starts: Sequence[int], strides: Sequence[int], out: Reach) -> Reach:
    """Entries of the operand outside of the slice reach nothing."""
    before, after = step.input_avals[0].shape, step.output_avals[0].shape

    def padded(x: np.ndarray, nothing: int) -> np.ndarray:
        for axis, (long, short) in enumerate(zip(before, after, strict=True)):
            if long != short:
                shape = list(x.shape)
                shape[axis] = long
                whole = np.full(shape, nothing)
                end = starts[axis] + (short - 1) * strides[axis] + 1
                whole[(slice(None),) * axis + (slice(starts[axis], end, strides[axis]),)] = x
                x = whole
        return x

    return Reach(padded(out.first, _NOWHERE), padded(out.last, -1))


def _slice(step: Step, out: Reach) -> list[Reach]:
    params = step.eqn.params
    return [_slices(step, params["start_indices"], params["strides"] or (1,) * out.ndim, out)]


def _dynamic_slice(step: Step, out: Reach) -> list[Reach]:
    before, after = step.input_avals[0].shape, step.output_avals[0].shape
    starts = step.inputs[1:]
    if all(isinstance(start, Literal) for start in starts):
        # As XLA does, a start that does not fit is moved until it does.
        at = [min(max(int(s.val), 0), d - n) for s, d, n in zip(starts, before, after, strict=True)]  # type: ignore[union-attr]
        operand = _slices(step, at, (1,) * out.ndim, out)
    else:
        operand = out.over(i for i in range(out.ndim) if before[i] != after[i])
    return [operand, *(out.everywhere(0) for _ in starts)]


def _dynamic_update_slice(step: Step, out: Reach) -> list[Reach]:
    shapes = [aval.shape for aval in step.input_avals[:2]]
    part = out.over(i for i in range(out.ndim) if shapes[0][i] != shapes[1][i])
    return [out, part, *(out.everywhere(0) for _ in step.inputs[2:])]


def _pad(step: Step, out: Reach) -> list[Reach]:
    shape = step.input_avals[0].shape

    def inner(x: np.ndarray, nothing: int) -> np.ndarray:
        for axis, (low, _, between) in enumerate(step.eqn.params["padding_config"]):
            if x.shape[axis] > 1:
                places = low + np.arange(shape[axis]) * (between + 1)
                kept = (places >= 0) & (places < x.shape[axis])
                inside = np.take(x, np.where(kept, places, 0), axis)
                x = np.where(kept.reshape((-1,) + (1,) * (x.ndim - axis - 1)), inside, nothing)
        return x

    return [Reach(inner(out.first, _NOWHERE), inner(out.last, -1)), out.everywhere(0)]


def _concatenate(step: Step, out: Reach) -> list[Reach]:
    axis, start, parts = step.eqn.params["dimension"], 0, []
    for aval in step.input_avals:
        end = start + aval.shape[axis]
        at = (slice(None),) * axis + (slice(start, end),)
        parts.append(out.map(lambda x, at=at: x if x.shape[axis] == 1 else x[at]))
        start = end
    return parts


def _stacked(step: Step, out: Reach) -> list[Reach]:
    axis = step.eqn.params["axis"]
    return [out.map(lambda x, i=i: np.take(x, min(i, x.shape[axis] - 1), axis)) for i in range(len(step.inputs))]


def _tile(step: Step, out: Reach) -> list[Reach]:
    return [out.over(i for i, times in enumerate(step.eqn.params["reps"]) if times != 1)]


def _split(step: Step, outputs: Sequence[Reach]) -> Reach:
    """Of a `split` or `unstack`, whose outputs lie one after another along an axis of the operand."""
    axis, shapes = step.eqn.params["axis"], [aval.shape for aval in step.output_avals]
    if step.primitive == "unstack":
        outputs = [reach.map(lambda x: np.expand_dims(x, axis)) for reach in outputs]
        shapes = [(*shape[:axis], 1, *shape[axis:]) for shape in shapes]
    ndim = outputs[0].ndim
    long = [max(reach.first.shape[i] for reach in outputs) for i in range(ndim)]
    parts = [
        reach.broadcast([shape[i] if i == axis else long[i] for i in range(ndim)])
        for reach, shape in zip(outputs, shapes, strict=True)
    ]
    return Reach(
        np.concatenate([part.first for part in parts], axis), np.concatenate([part.last for part in parts], axis)
    )


def _dot_general(step: Step, out: Reach) -> list[Reach]:
    contracted, batch = step.eqn.params["dimension_numbers"]
    ndims = [len(aval.shape) for aval in step.input_avals]
    free = [[d for d in range(ndims[k]) if d not in contracted[k] and d not in batch[k]] for k in (0, 1)]
    groups, operands = len(batch[0]), []
    mine = (range(groups, groups + len(free[0])), range(groups + len(free[0]), out.ndim))
    for k in (0, 1):
        # To the operand's axes in the order batch, free, contracted, and then to their places.
        part = out.over(mine[1 - k]).map(lambda x, k=k: np.squeeze(x, tuple(mine[1 - k])))
        order = np.argsort([*batch[k], *free[k], *contracted[k]])
        operands.append(part.map(lambda x, k=k, o=order: x.reshape(*x.shape, *[1] * len(contracted[k])).transpose(o)))
    return operands


def _convolution(step: Step, out: Reach) -> list[Reach]:
    """Along an axis of space where the kernel has one tap that meets every place once, places reach one output each."""
    p, numbers = step.eqn.params, step.eqn.params["dimension_numbers"]
    image, kernel = (aval.shape for aval in step.input_avals)
    if p["batch_group_count"] != 1:
        return [out.everywhere(len(image)), out.everywhere(len(kernel))]

    def single(axis: int) -> bool:
        once = p["window_strides"][axis] == p["lhs_dilation"][axis] == kernel[numbers.rhs_spec[2 + axis]] == 1
        return once and tuple(p["padding"][axis]) == (0, 0)

    joined = [i for axis, i in enumerate(numbers.out_spec[2:]) if not single(axis)]
    order = [numbers.out_spec[numbers.lhs_spec.index(i)] for i in range(out.ndim)]
    part = out.over([numbers.out_spec[1], *joined])
    return [part.map(lambda x: x.transpose(order)), out.everywhere(len(kernel))]


def _gather(step: Step, out: Reach) -> list[Reach]:
    numbers, sizes = step.eqn.params["dimension_numbers"], step.eqn.params["slice_sizes"]
    operand = step.input_avals[0]
    places = [d for d in range(out.ndim) if d not in numbers.offset_dims]
    ndim = len(operand.shape)
    kept = [d for d in range(ndim) if d not in (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)]
    whole = [d for d in kept if sizes[d] == operand.shape[d] and d not in numbers.start_index_map]
    source = {d: numbers.offset_dims[kept.index(d)] for d in whole}
    for d, i in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        source[d] = places[i]
    part = out.over(i for i in range(out.ndim) if i not in source.values())

    def arranged(x: np.ndarray) -> np.ndarray:
        order = sorted(source, key=lambda d: source[d])
        x = x.reshape([x.shape[source[d]] for d in order]).transpose(np.argsort(order))
        return np.expand_dims(x, tuple(d for d in range(ndim) if d not in source))

    looked = out.over(numbers.offset_dims).map(lambda x: np.squeeze(x, tuple(numbers.offset_dims))[..., None])
    return [part.map(arranged), looked]


def _scatter(step: Step, out: Reach) -> list[Reach]:
    return [out, *(out.everywhere(len(aval.shape)) for aval in step.input_avals[1:])]


_RULES: dict[str, Callable[[Step, Reach], list[Reach]]] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(("scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max", "scatter-sub"), _scatter),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "rev": _rev,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "concatenate": _concatenate,
    "stack": _stacked,
    "tile": _tile,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "gather": _gather,
}
