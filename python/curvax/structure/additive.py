"""Is a scalar function of a batch the sum, or the mean, of its values on the pieces of the batch? Read from its jaxpr.

A loss on a batch that does not fit is added up from pieces. That is right for sums and means over examples, and wrong
for a function that divides by a number of its own batch (unmasked tokens), takes the root of a mean, or pairs examples
with each other; a sum must be added, and a mean averaged. As in `curvax.structure.batch_axis` the examples are followed
through every equation on a number of examples that occurs nowhere else, here beyond the place where they are summed up.

The batch size enters as a number too: a mean divides by it. Numbers are compared between two batch sizes, and one that
is n times as large for n times as many examples has degree 1, its inverse -1. A sum over examples of degree 0 adds up,
as does a constant of degree 1; a sum of degree -1 averages, as does a constant of degree 0. So both have a level, 1 or
0, and what has another is neither.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias
from typing import Literal as Either

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from curvax.jaxprs import LINEAR_SOLVE, Name, Program, Step, subjaxprs
from curvax.structure.batch_axes import BatchAxes, ExampleAxes
from curvax.structure.batch_axis import (
    REARRANGING,
    ExampleFlow,
    equation_signature,
    jaxpr_signature,
    probe_size,
    same_constant,
    shapes_of,
)
from curvax.structure.batch_rules import DECIDES, ELEMENTWISE, RANDOM, REPEATING, RULES, Axis, Mixed, common
from curvax.structure.replay import traced_program
from curvax.tree import PyTree

Loss: TypeAlias = Callable[[PyTree, Any], Sequence[jax.Array]]
"""(params, batch) -> [loss], or [total, weight]."""

_OTHERWISE = "the loss computes differently for different batch sizes"
_PAIR = "let loss_fn return the tuple (total, weight), which are added up before the division"


class Coupled(Mixed):
    """The function does not add up over pieces, wherever the examples are; the text says why, and the mend."""


def additive_axes(
    loss: Loss, params: PyTree, batch: Any, given: BatchAxes | None, sizes: Callable[[int], Sequence[int]], mean: bool
) -> ExampleAxes:
    """Which leaves of a batch hold the examples that a loss adds up over.

    Args:
      loss: the function.
      params, batch: arrays or shapes.
      given: the axes, if the user says them: they are taken at their word where nothing can be shown.
      sizes: number of examples -> those of the pieces; none if the batch is one piece.
      mean: whether a loss is to be the mean of those of the pieces, each weighted with its examples, or their sum.
    """
    search = _Search(loss, shapes_of(params), shapes_of(batch), sizes, mean)
    groups = search.groups() if given is None else [given]
    reason = "no leaf of the batch has an axis of examples"
    for place, alike in enumerate(groups):
        for axes in (alike, *(search.guesses(alike) if given is None else ())):
            try:
                search.prove(axes, guessed=axes is not alike)
                return ExampleAxes(axes)
            except Coupled as coupled:
                return ExampleAxes(axes, str(coupled), str(coupled))
            except Mixed as mixed:
                reason = str(mixed) if place == 0 and axes is alike else reason
    if given is not None:
        return ExampleAxes(given, reason)
    refused = (
        f"{reason}; drop microbatch_size, or say by batch_axes= which axes hold the examples, if every piece is to "
        "count as a batch of its own"
    )
    return ExampleAxes(groups[0] if groups else BatchAxes((None,) * len(jax.tree.leaves(batch))), reason, refused)


@dataclasses.dataclass(frozen=True)
class _Search:
    """A loss whose examples are looked for; attributes as the arguments of `additive_axes`."""

    loss: Loss
    params: PyTree
    batch: PyTree
    sizes: Callable[[int], Sequence[int]]
    mean: bool

    def groups(self) -> list[BatchAxes]:
        """The first axes of leaves that are equally long there, the most leaves first."""
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(self.batch)]
        lengths = [shape[0] for shape in shapes if shape]
        ordered = sorted(dict.fromkeys(lengths), key=lambda n: -lengths.count(n))
        return [BatchAxes(tuple(0 if shape[:1] == (n,) else None for shape in shapes)) for n in ordered]

    def guesses(self, alike: BatchAxes) -> Iterator[BatchAxes]:
        """Sets of leaves over which the loss adds up as far as that is seen at the batch size that there is."""
        program = traced_program(self.loss, self.params, self.batch)

        def adds(axes: BatchAxes) -> bool:
            try:
                _Flow(axes.count(self.batch), {}).program(program, self._given(axes))
            except Mixed:
                return False
            return True

        yield from alike.grown(adds)

    def prove(self, axes: BatchAxes, guessed: bool) -> None:
        """Nothing, if the loss is made of those of pieces along these axes, and depends on them if they are a guess.

        Raises:
          Coupled, Mixed: it is not, or nobody can tell.
        """
        count, probe = axes.count(self.batch), probe_size(self.params, self.batch)
        sizes = self.sizes(count)
        if not sizes:
            return
        program = self._at(axes, probe)
        degrees = _degrees((program, probe), (self._at(axes, count), count), strict=True)
        for size in sizes:
            there = _degrees((program, probe), (self._at(axes, size), size), strict=False)
            if any(degrees[key] != degree for key, degree in there.items()):
                raise Mixed(_OTHERWISE)
        parts = _Adding(probe, degrees).program(program, self._given(axes))
        if guessed and parts[0].kind is not _Kind.TOTAL:
            raise Mixed("the loss does not depend on these examples")
        self._check([part.level for part in parts if not part.zero], len(parts) == 2)

    def _check(self, levels: Sequence[int], pair: bool) -> None:
        if pair and set(levels) - {1}:
            raise Coupled("the total and the weight that loss_fn returns are no sums over the examples: return sums")
        if pair or not levels or levels[0] == (0 if self.mean else 1):
            return
        if levels[0] not in (0, 1):
            raise Coupled(f"loss_fn is neither a sum nor a mean over the examples: {_PAIR}")
        said, meant = ("mean", "sum") if self.mean else ("sum", "mean")
        raise Coupled(f"loss_fn is a {meant} over the examples, and reduction is '{said}': set reduction='{meant}'")

    def _given(self, axes: BatchAxes) -> list[_Part]:
        own = [_Part() if axis is None else _Part(_Kind.EXAMPLE, axis) for axis in axes.axes]
        return [*(_Part() for _ in jax.tree.leaves(self.params)), *own]

    def _at(self, axes: BatchAxes, size: int) -> Program:
        try:
            return traced_program(self.loss, self.params, axes.resized(self.batch, size))
        except Exception as error:  # A function refuses a size that it was not written for in whatever way it likes.
            raise Mixed("the loss does not accept another batch size") from error


_Key: TypeAlias = tuple[int, Name]
"""A number in a program: the identity of who reads it, a step or the program, and where (`curvax.jaxprs.forward`)."""

_Degrees: TypeAlias = Mapping[_Key, int]


def _numbers(program: Program, strict: bool) -> Iterator[tuple[_Key, Any]]:
    """All that a program does, as pairs: a number and where it stands, or something else that is not to differ.

    Equations that only rearrange are left out unless `strict`: JAX leaves them out where an axis has length one.
    """
    for name, value in program.constants.items():
        yield (id(program), name), value
    for step in program.steps:
        if strict or step.primitive not in REARRANGING:
            yield (0, 0), _text(step)
            yield from (((id(step), i), atom.val) for i, atom in enumerate(step.inputs) if isinstance(atom, Literal))
        for body in step.bodies:
            yield from _numbers(body, strict)
    yield from (((id(program), -1 - i), a.val) for i, a in enumerate(program.results) if isinstance(a, Literal))


def _text(step: Step) -> tuple[Any, ...]:
    """What a step does beside its numbers, shapes and bodies."""
    opaque = () if step.bodies else subjaxprs(step.eqn.params)
    return (*equation_signature(step.eqn, ()), *(x for jaxpr in opaque for x in jaxpr_signature(jaxpr)))


def _degrees(mine: tuple[Program, int], other: tuple[Program, int], strict: bool) -> dict[_Key, int]:
    """The degrees of the numbers in a program on some number of examples, by the same program on another number.

    Raises:
      Mixed: the programs differ, or a number changes in another way.
    """
    (program, n), (there, m) = mine, other
    ours, theirs = list(_numbers(program, strict)), list(_numbers(there, strict))
    if len(ours) != len(theirs):
        raise Mixed(_OTHERWISE)
    degrees: dict[_Key, int] = {}
    for (key, a), (_, b) in zip(ours, theirs, strict=True):
        if not isinstance(a, tuple):
            degrees[key] = _degree(a, n, b, m)
        elif a != b:
            raise Mixed(_OTHERWISE)
    return degrees


def _degree(a: Any, n: int, b: Any, m: int) -> int:
    x, y = _scalar(a), _scalar(b)
    if x == y if x is not None else same_constant(a, b):
        return 0
    if x and y:
        for degree in (1, -1):
            if np.isclose(x / y, (n / m) ** degree, rtol=1e-6, atol=0):
                return degree
    raise Mixed("the batch size enters the loss otherwise than as a factor")


def _scalar(value: Any) -> float | None:
    """A real number, if it is one that can be read."""
    if isinstance(value, Tracer) or np.ndim(value):
        return None
    kept = np.asarray(value)
    return float(kept) if kept.dtype.kind in "biuf" or kept.dtype == jnp.bfloat16 else None


class _Kind(enum.Enum):
    """What a value has to do with the examples."""

    SHARED = "the same for all"
    EXAMPLE = "an entry for each"
    TOTAL = "a sum over all"
    # How indexing finds the entry of each example, x[arange(B), labels]: numbers 0 .. B - 1 along an axis; whether
    # these are negative, which is never; what they would be then; and pairs of such a number and another index.
    PLACE = "the number of each"
    NEVER = "whether that is negative"
    ELSEWHERE = "what it is if so"
    PAIRED = "indices, one of them the number of each"


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is known of a value.

    Attributes:
      kind: what it has to do with the examples.
      axis: that holds the examples, if it has one.
      degree: see above.
      zero: whether it is zero, which has every degree.
      column: of `PAIRED` indices, the one that is the number of the example.
    """

    kind: _Kind = _Kind.SHARED
    axis: Axis = None
    degree: int = 0
    zero: bool = False
    column: int = 0

    @property
    def level(self) -> int:
        """1 of what adds up over pieces, 0 of what is averaged."""
        return self.degree + (self.kind is _Kind.TOTAL)

    def shifted(self, by: int) -> _Part:
        """The same with so many axes more in front."""
        return self if self.axis is None else dataclasses.replace(self, axis=self.axis + by)

    def join(self, other: _Part) -> _Part:
        """What is known of a value that is either of two."""
        if self == other or other.zero:
            return self
        if self.zero:
            return other
        if {self.kind, other.kind} == {_Kind.SHARED, _Kind.TOTAL} and self.level == other.level:
            return self if self.kind is _Kind.TOTAL else other
        if {self.kind, other.kind} == {_Kind.SHARED, _Kind.EXAMPLE} and self.degree == other.degree:
            return self if self.kind is _Kind.EXAMPLE else other
        raise Mixed("a loop or branch joins what is of one example with what is not")


_SUMS = frozenset({"reduce_sum"})
# Of one operand, and linear in it.
_LINEAR = frozenset(
    """neg convert_element_type copy copy_p reshape squeeze expand_dims broadcast_in_dim transpose reduce_sum slice
    dynamic_slice rev real imag reduce_precision name sharding_constraint pvary gather stop_gradient cumsum""".split()
)
_SUMMANDS = frozenset("add add_any sub concatenate select_n stack max min pad".split())


@dataclasses.dataclass(frozen=True)
class _Adding(ExampleFlow[_Part]):
    """Follows the examples of a program on `batch` of them to where they are summed up, and the sums from there."""

    batch: int
    degrees: _Degrees

    # Nobody has shown that a solver is linear in its constants, which a sum over the examples may be.
    opaque = frozenset({LINEAR_SOLVE})

    def value(self, where: Program | Step, place: Name, x: Any) -> _Part:
        self.check_constant(where, x)
        return self._number((id(where), place), x)

    def decides(self, what: Either["branch", "length"], known: _Part) -> None:
        if known.kind is not _Kind.SHARED:
            raise Mixed(DECIDES[what])

    def _number(self, key: _Key, value: Any) -> _Part:
        return _Part(degree=self.degrees.get(key, 0), zero=_scalar(value) == 0)

    def equation(self, index: int, step: Step, known: list[_Part]) -> list[_Part]:
        kinds = {part.kind for part in known}
        if _Kind.TOTAL in kinds:
            return [self._total(step, known)] * len(step.outputs)
        if kinds & {_Kind.PLACE, _Kind.NEVER, _Kind.ELSEWHERE, _Kind.PAIRED}:
            return [self._place(step, known)]
        degree, zero = _degree_of(step.primitive, known), _is_zero(step.primitive, known)
        if _Kind.EXAMPLE in kinds:
            return [self._examples(step, known, degree)] * len(step.outputs)
        return [self._shared(step, degree, zero)] * len(step.outputs)

    def _shared(self, step: Step, degree: int, zero: bool) -> _Part:
        name, long = step.primitive, self.long(step.output_avals[0].shape)
        if name == "iota" and long == [step.eqn.params["dimension"]]:
            return _Part(_Kind.PLACE, long[0])
        if name in RANDOM and len(long) == 1:
            return _Part(_Kind.EXAMPLE, long[0])
        axis = REPEATING[name](self.batch, step.eqn, [None] * len(step.inputs)) if name in REPEATING else None
        if axis is None and any(self.long(aval.shape) for aval in step.output_avals):
            raise Mixed(f"{name} makes a value for the whole batch")
        return _Part(_Kind.SHARED if axis is None else _Kind.EXAMPLE, axis, degree, zero)

    def _examples(self, step: Step, parts: Sequence[_Part], degree: int) -> _Part:
        name, axes, params = step.primitive, [part.axis for part in parts], step.eqn.params
        if name in _SUMS and axes[0] in params["axes"]:
            return _Part(_Kind.TOTAL, degree=degree)
        if name == "dot_general" and tuple(axes) in set(zip(*params["dimension_numbers"][0], strict=True)):
            return _Part(_Kind.TOTAL, degree=degree)
        if name in REPEATING:
            return _Part(_Kind.EXAMPLE, REPEATING[name](self.batch, step.eqn, axes), degree)
        if name in ELEMENTWISE:
            return _Part(_Kind.EXAMPLE, common(name, axes), degree)
        if name not in RULES:
            raise Mixed(f"{name} is not followed")
        return _Part(_Kind.EXAMPLE, RULES[name](self.batch, step.eqn, axes), degree)

    def _place(self, step: Step, parts: Sequence[_Part]) -> _Part:
        """Indexing that brings every example its own entry."""
        name, kinds, axes = step.primitive, [part.kind for part in parts], [part.axis for part in parts]
        if name == "lt" and kinds[0] is _Kind.PLACE and parts[1].zero:
            return _Part(_Kind.NEVER, axes[0])
        if name == "add" and kinds == [_Kind.PLACE, _Kind.SHARED]:
            return _Part(_Kind.ELSEWHERE, axes[0])
        if name == "select_n" and kinds == [_Kind.NEVER, _Kind.PLACE, _Kind.ELSEWHERE]:
            return parts[1]
        if name in _LINEAR and name != "gather" and kinds[0] is _Kind.PLACE:
            rule = REPEATING.get(name) or RULES.get(name)
            return _Part(_Kind.PLACE, axes[0] if rule is None else rule(self.batch, step.eqn, axes))
        if name == "concatenate" and kinds.count(_Kind.PLACE) == 1:
            axis, at = common(name, axes), step.eqn.params["dimension"]
            sizes = [aval.shape[at] for aval in step.input_avals]
            place = kinds.index(_Kind.PLACE)
            if axis != at and sizes[place] == 1 and at == len(step.output_avals[0].shape) - 1:
                return _Part(_Kind.PAIRED, axis, column=sum(sizes[:place]))
        if name == "gather" and kinds == [_Kind.EXAMPLE, _Kind.PAIRED]:
            numbers = step.eqn.params["dimension_numbers"]
            index_axes = [d for d in range(len(step.output_avals[0].shape)) if d not in numbers.offset_dims]
            own = numbers.start_index_map[parts[1].column] == axes[0] in numbers.collapsed_slice_dims
            if own and axes[1] is not None and axes[1] < len(index_axes):
                return _Part(_Kind.EXAMPLE, index_axes[axes[1]], parts[0].degree)
        raise Mixed("iota tells examples apart by their place in the batch")

    def _total(self, step: Step, parts: Sequence[_Part]) -> _Part:
        """A function of a sum over all examples, which must be linear in it."""
        name, totals = step.primitive, [i for i, part in enumerate(parts) if part.kind is _Kind.TOTAL]
        if any(part.kind not in (_Kind.TOTAL, _Kind.SHARED) for part in parts):
            raise Mixed(f"{name} pairs single examples with a sum over all of them")
        if any(self.long(aval.shape) for aval in step.output_avals):
            raise Mixed(f"{name} repeats a sum over all examples for each of them")
        if name == "div" and 1 in totals:
            raise Coupled(f"loss_fn divides by a number that it makes of its batch: {_PAIR}")
        if name in ("mul", "dot_general") and len(totals) == 2:
            raise Coupled(f"loss_fn multiplies sums over its batch with each other: {_PAIR}")
        if name in _SUMMANDS and name not in ("max", "min"):
            return self._sum(name, parts)
        if name in ("mul", "dot_general", "div") or (name in _LINEAR and totals == [0]):
            return _Part(_Kind.TOTAL, degree=_degree_of(name, parts))
        raise Coupled(f"loss_fn is not linear in its examples, by {name} of a sum over its batch: {_PAIR}")

    def _sum(self, name: str, parts: Sequence[_Part]) -> _Part:
        chosen = parts[1:] if name == "select_n" else parts
        if name == "select_n" and parts[0].kind is _Kind.TOTAL:
            raise Coupled(f"loss_fn branches on a number that it makes of its batch: {_PAIR}")
        levels = {part.level for part in chosen if not part.zero}
        if len(levels) > 1:
            raise Coupled("loss_fn adds a mean and a sum: divide both, or none, by the number of examples")
        return _Part(_Kind.TOTAL, degree=levels.pop() - 1 if levels else 0)


class _Flow(_Adding):
    """Follows the examples where other axes may be as long: what does not come from them is taken to be shared."""

    def long(self, shape: Sequence[int]) -> list[int]:
        del shape
        return []

    def equation(self, index: int, step: Step, known: list[_Part]) -> list[_Part]:
        if all(part.kind is _Kind.SHARED for part in known):
            return [_Part()] * len(step.outputs)
        return super().equation(index, step, known)

    def _number(self, key: _Key, value: Any) -> _Part:
        # Degrees are not at hand, and a sum joined with anything else that is shared is let pass.
        return _Part(zero=True)


def _degree_of(name: str, parts: Sequence[_Part]) -> int:
    counted = [part.degree for part in (parts[1:] if name == "select_n" else parts) if not part.zero]
    if not any(part.degree for part in parts):
        return 0
    if name in ("mul", "dot_general"):
        return sum(counted)
    if name == "div":
        return (0 if parts[0].zero else parts[0].degree) - parts[1].degree
    if name in _LINEAR or (name in _SUMMANDS and len(set(counted)) == 1):
        return counted[0]
    raise Mixed(f"the batch size enters the loss through {name}")


def _is_zero(name: str, parts: Sequence[_Part]) -> bool:
    return name in _LINEAR and all(part.zero for part in parts)
