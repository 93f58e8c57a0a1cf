"""Does a model treat the examples of its leading axis one by one? Answered from its jaxpr, before any computation.

Row factors are cheap when example i's outputs depend on example i alone: then each example's rows come from a model
call on that example. The contract of `predict_fn` says so, but BatchNorm in training mode or a collocation residual
assembled from several point sets break it, and believing the contract would give wrong rows. What is not understood
counts as mixing, which costs time and never correctness. The proof has four steps:

1. Guess which leaves of the inputs hold examples: those as long as the outputs.
2. Trace the model with a batch size that occurs nowhere else in its shapes, so that an axis of that size (or a multiple
   of it: batch and time flattened together, batch slowest) is known to be the batch.
3. Follow the axis through every equation that the outputs depend on (`batch_rules.py`). It must arrive first.
4. Compare with the traces at the batch sizes that matter: all must do the same computation with the same numbers.

    tanh(x w) with x (1009, 3)   dot_general: axis 0 of x is free, so axis 0     tanh: axis 0        independent
    x - mean(x, 0)               reduce_sum over axis 0: it works across examples                    mixed

A random value for the whole batch that is made of one key, such as a dropout mask, does not mix examples: each has its
own part. But the model on one example would draw another one; so such draws are collected here, and are arguments of
the model on one example (`ByExample`).

Who asks for it (`statistics`) takes sums over the examples, and what is made of them alone, as constants: the mean and
variance of BatchNorm in training mode. Then examples depend on one another through these only, and the model on one
example gets their values as it gets draws:

    m = mean(h, 0)      reduce_sum over axis 0, div: the same for all examples, made of sums over them: a statistic
    y = h - m           where m meets the examples it is given, and has no derivative
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, Self, TypeVar
from typing import Literal as Either

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal

from curvax.jaxprs import SCAN, ForwardFlow, Name, Path, Program, Step, subjaxprs
from curvax.structure.batch_axes import BatchAxes
from curvax.structure.batch_rules import DECIDES, ELEMENTWISE, RANDOM, REPEATING, RULES, SETS, Axis, Mixed, common
from curvax.structure.replay import traced_program
from curvax.tree import PyTree

_PROBE_SIZES = (1009, 2003, 3001, 4001, 5003)


def examples_independent(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> tuple[bool, str]:
    """Whether row i of `predict(params, inputs)` depends on example i of the inputs alone, and if not, why.

    Leaves of the inputs that all examples share (a grid, position ids) may enter every row. What is random does not
    count: of a value for the whole batch made of one key, each example has its own part.

    Args:
      predict: the model.
      params: parameters (arrays or shapes).
      inputs: inputs (arrays or shapes).

    Returns:
      (True, "") or (False, reason).
    """
    _, reason = example_axes(predict, params, inputs)
    return not reason, reason


def example_axes(
    predict: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    axes: BatchAxes | None = None,
    *,
    sizes: Callable[[int], Sequence[int]] = lambda count: (1,),
) -> tuple[BatchAxes, str]:
    """Which leaves of the inputs hold the examples, so that row i of the outputs depends on their entries i alone.

    Only leaves as long as the outputs can hold them. A leaf of that length by chance, as T position ids are in a batch
    of T sequences, gives itself away: on another number of examples the model does not run, or it pairs the examples
    with the leaf's entries. What is returned is proved for all leaves together, whoever said it.

    Args:
      predict: the model; its one output has the examples on the same axis as the inputs.
      params: parameters (arrays or shapes).
      inputs: inputs (arrays or shapes).
      axes: where the inputs hold the examples, if that is known and to be proved.
      sizes: number of examples -> other numbers of them, on which the model must compute as it does on all; 1, by
        default, where rows are to be made example by example.

    Returns:
      (axes, "") if that is so; else (axes, reason), with the axes of all leaves that are as long as the outputs.
    """
    return ExampleModel.of(predict, params, inputs).examples(axes, sizes)


@dataclasses.dataclass(frozen=True)
class Draw:
    """A value that the whole batch decides: what is random, or a statistic over the examples.

    Attributes:
      single, whole: the step that makes it, in the program on one example and in that on the batch.
      axis: of the step's output over all iterations of scans; batch and what is flattened with it, batch slowest.
        `None` of a statistic, which all examples share.
    """

    single: Path
    whole: Path
    axis: int | None


@dataclasses.dataclass(frozen=True)
class ByExample:
    """A model that treats examples one by one.

    Attributes:
      program: the model on one example; arguments are the leaves of (params, inputs).
      whole: the same on the batch.
      draws: steps of `program` whose results are to be the examples' parts of those of `whole`; statistics come last.
      examples: batch size of `whole`.
      axes: which leaves of the inputs hold the examples, on their first axis; the others are shared.
    """

    program: Program
    whole: Program
    draws: tuple[Draw, ...]
    examples: int
    axes: BatchAxes

    @property
    def statistics(self) -> int:
        """How many statistics over the examples are constants of `program`."""
        return sum(draw.axis is None for draw in self.draws)


def by_example(
    predict: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    axes: BatchAxes | None = None,
    *,
    statistics: bool = False,
) -> ByExample:
    """The programs of a model whose examples do not interact, from shapes alone.

    Args:
      predict, params, inputs: the model and its arguments.
      axes: which leaves of the inputs hold the examples, on their first axis, if that is known.
      statistics: whether examples may interact through sums over them, which are then taken as constants.

    Raises:
      Mixed: the examples interact, or nobody can tell; the text says where.
    """
    model = dataclasses.replace(ExampleModel.of(predict, params, inputs), statistics=statistics)
    axes, reason = model.examples(axes, lambda count: (1,))
    if reason:
        raise Mixed(reason)
    single, (probe, tracker) = model.at(axes, 1), model.followed(axes)
    programs = (single, model.whole, probe)
    steps = zip(*(list(_random_steps(p)) for p in programs), strict=True)
    draws = [Draw(one, all_, tracker.drawn[path]) for one, all_, path in steps if path in tracker.drawn]
    if tracker.statistics is not None:
        steps = zip(*([path for path, _ in _computing(p)] for p in programs), strict=True)
        draws += [Draw(one, all_, None) for one, all_, path in steps if path in tracker.statistics.given]
    return ByExample(single, model.whole, tuple(draws), model.count, axes)


@dataclasses.dataclass(frozen=True)
class ExampleModel:
    """A model whose examples are looked for.

    Attributes:
      predict, params, inputs: the model and the shapes of its arguments.
      whole: its program on these.
      statistics: whether sums over the examples are taken as constants.
    """

    predict: Callable[[PyTree, Any], jax.Array]
    params: PyTree
    inputs: PyTree
    whole: Program
    statistics: bool = False
    _traced: dict[tuple[BatchAxes, int], Program] = dataclasses.field(default_factory=dict)

    @staticmethod
    def of(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: PyTree) -> ExampleModel:
        """Of arrays or shapes."""
        params, inputs = shapes_of((params, inputs))
        return ExampleModel(predict, params, inputs, traced_program(predict, params, inputs))

    @property
    def count(self) -> int:
        """The number of examples."""
        return self.whole.shapes[0][0]

    def examples(self, axes: BatchAxes | None, sizes: Callable[[int], Sequence[int]]) -> tuple[BatchAxes, str]:
        """See `example_axes`."""
        leaves = jax.tree.leaves(self.inputs)
        if not self.whole.shapes[0]:
            return BatchAxes((None,) * len(leaves)), "the outputs have no axis for the examples"
        alike = BatchAxes(tuple(0 if leaf.shape[:1] == (self.count,) else None for leaf in leaves))
        first = alike if axes is None else axes
        if not first.any:
            return first, f"no leaf of the inputs is as long as the outputs, {self.count}{self._joined_sets()}"
        reason = self.refuted(first, sizes)
        if not reason or axes is not None:
            return first, reason
        for guess in self._guesses(alike):
            if not self.refuted(guess, sizes):
                return guess, ""
        return alike, reason

    def _joined_sets(self) -> str:
        """What to write if the outputs are as long as several sets of examples together; empty if they are not."""
        sizes = sorted({leaf.shape[0] for leaf in jax.tree.leaves(self.inputs) if leaf.shape})
        if len(sizes) == 1 and sizes[0] and self.count % sizes[0] == 0:
            sizes *= self.count // sizes[0]
        if len(sizes) < 2 or sum(sizes) != self.count:
            return ""
        shown = " + ".join(map(str, sizes)) if len(sizes) < 5 else f"{len(sizes)} times {sizes[0]}"
        return f", which is {shown}: {SETS}"

    def refuted(self, axes: BatchAxes, sizes: Callable[[int], Sequence[int]]) -> str:
        """Why these axes do not hold the examples; empty if it is proved that they do."""
        try:
            probe, tracker = self.followed(axes)
            others = [(self.count, self.whole), *((size, self.at(axes, size)) for size in sizes(self.count))]
            idle = frozenset() if tracker.statistics is None else _idle(probe, tracker.statistics.made)
            if not all(_alike(other, size, probe, self.probe, idle) for size, other in others):
                return "the model computes differently for different batch sizes"
        except Mixed as mixed:
            return str(mixed)
        return ""

    def followed(self, axes: BatchAxes) -> tuple[Program, _Tracker]:
        """The program on the probe's number of examples, and what followed them to the outputs.

        Raises:
          Mixed: the examples interact, or do not arrive where they should.
        """
        statistics = _Statistics(set(), set()) if self.statistics else None
        probe, tracker = self.at(axes, self.probe), _Tracker(self.probe, {}, statistics)
        outputs = self._arrive(tracker, probe, axes)
        if outputs.lost or outputs.axis != 0:
            raise Mixed(outputs.lost or "the outputs do not carry the example axis first")
        return probe, tracker

    def _arrive(self, tracker: _Tracker, program: Program, axes: BatchAxes) -> _Seen:
        own = [_Seen() if axis is None else _Seen(axis, free=False) for axis in axes.axes]
        (outputs,) = tracker.program(program, [*(_Seen() for _ in jax.tree.leaves(self.params)), *own])
        return outputs

    def _guesses(self, alike: BatchAxes) -> Iterator[BatchAxes]:
        """Sets of leaves whose examples stay apart, and in place, when they are followed through the model.

        They are followed at the batch size that there is, where other axes may be as long: a guess, and no proof.
        """

        def stays(axes: BatchAxes) -> bool:
            try:
                return self._arrive(_Flow(self.count, {}), self.whole, axes).axis == 0
            except Mixed:
                return False

        yield from alike.grown(stays)

    @functools.cached_property
    def probe(self) -> int:
        """A number of examples that no other axis, or product of axes, is a multiple of."""
        return probe_size(self.params, self.inputs)

    def at(self, axes: BatchAxes, size: int) -> Program:
        """The program on another number of examples."""
        if (axes, size) not in self._traced:
            try:
                self._traced[axes, size] = traced_program(self.predict, self.params, axes.resized(self.inputs, size))
            except Exception as error:  # A model refuses a size that it was not written for in whatever way it likes.
                raise Mixed("the model does not accept another batch size") from error
        return self._traced[axes, size]


def shapes_of(values: PyTree) -> PyTree:
    """Shapes and dtypes."""
    return jax.eval_shape(lambda x: x, values)


def _alike(program: Program, size: int, probe: Program, probe_size: int, idle: frozenset[Path]) -> bool:
    """Whether programs on two numbers of examples do the same computation, but for idle steps of the probe."""
    shaped = size == 1 or _same_shapes(program, probe, size, probe_size)
    return shaped and _same_computation(program, probe, idle)


def _idle(program: Program, statistics: set[Path], path: Path = ()) -> frozenset[Path]:
    """The steps that make statistics, and those of whose results nothing else is made: nothing depends on them where
    statistics are given.
    """
    idle: set[Path] = set(statistics)
    busy = {atom for atom in program.results if isinstance(atom, int)}
    for index, step in reversed(list(enumerate(program.steps))):
        here = (*path, index)
        if here not in statistics and any(name in busy for name in step.outputs):
            busy |= {atom for atom in step.inputs if isinstance(atom, int)}
            idle |= frozenset() if step.body is None else _idle(step.body, statistics, here)
        else:
            idle.add(here)
    return frozenset(idle)


def _random_steps(program: Program, path: Path = ()) -> Iterator[Path]:
    """Steps that may draw, in an order that does not depend on the batch size."""
    for index, step in enumerate(program.steps):
        if step.primitive in RANDOM:
            yield (*path, index)
        if step.body is not None:
            yield from _random_steps(step.body, (*path, index))


def probe_size(params: PyTree, inputs: Any) -> int:
    """A number of examples that no axis, or product of axes, of these shapes is a multiple of."""
    shapes = [leaf.shape for leaf in jax.tree.leaves((params, inputs))]
    sizes = [d for shape in shapes for d in shape] + [math.prod(shape) for shape in shapes]
    for size in _PROBE_SIZES:
        if not any(d and d % size == 0 for d in sizes):
            return size
    return _PROBE_SIZES[0]


# Equations that only rearrange: JAX leaves them out where an axis has length one.
REARRANGING = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy slice".split())


def _same_computation(program: Program, probe: Program, idle: frozenset[Path]) -> bool:
    """Whether two traces at different batch sizes do the same computation with the same numbers.

    A model may read its batch size as a number (dividing by it, branching on it); then one example alone is not
    computed as it is within its batch, however independent the equations are. What idle steps of the probe do with it
    does not matter.
    """
    mine, theirs = list(_constants(program)), list(_constants(probe))
    steps, others = list(_computing(program)), list(_computing(probe))
    if len(steps) != len(others) or len(mine) != len(theirs):
        return False
    for (_, step), (path, other) in zip(steps, others, strict=True):
        if step.primitive != other.primitive or (path not in idle and _signature(step) != _signature(other)):
            return False
    return all(map(same_constant, mine, theirs))


def _computing(program: Program, path: Path = ()) -> Iterator[tuple[Path, Step]]:
    """The steps that do not only rearrange, in an order that does not depend on the batch size."""
    for index, step in enumerate(program.steps):
        if step.primitive not in REARRANGING:
            yield (*path, index), step
            for which, body in enumerate(step.bodies):
                yield from _computing(body, (*path, index) if step.body is not None else (*path, index, -1, which))


def _constants(program: Program) -> Iterator[Any]:
    yield from program.constants.values()
    for step in program.steps:
        for body in step.bodies:
            yield from _constants(body)


def _signature(step: Step) -> list[Any]:
    """What a step does, without the bodies that are followed into."""
    inner = [] if step.bodies else [x for jaxpr in subjaxprs(step.eqn.params) for x in jaxpr_signature(jaxpr)]
    return [*equation_signature(step.eqn, step.inputs), *inner]


def jaxpr_signature(jaxpr: Jaxpr) -> Iterator[Any]:
    """What a jaxpr does, whatever the shapes."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in REARRANGING:
            yield from equation_signature(eqn, eqn.invars)
            for inner in subjaxprs(eqn.params):
                yield from jaxpr_signature(inner)


def equation_signature(eqn: Any, operands: Sequence[Any]) -> Iterator[Any]:
    """What an equation does to these operands, whatever the shapes."""
    yield eqn.primitive.name
    yield from (repr(v.val) for v in operands if isinstance(v, Literal))
    # Exponents, lengths of loops, axes. Shapes, which follow the batch size rightly, are tuples.
    yield from (f"{k}={v}" for k, v in sorted(eqn.params.items()) if isinstance(v, bool | int | float))


def _same_shapes(program: Program, probe: Program, size: int, probe_size: int) -> bool:
    """Whether every axis of every value is as long in both traces, or the same multiple of the batch size."""

    def axis(mine: int, theirs: int) -> bool:
        return mine == theirs or (theirs % probe_size == 0 and mine == theirs // probe_size * size)

    def shapes(step: Step) -> list[tuple[int, ...]]:
        return [aval.shape for aval in step.output_avals if hasattr(aval, "shape")]

    def same(a: Step, b: Step) -> bool:
        if len(shapes(a)) != len(shapes(b)) or len(a.bodies) != len(b.bodies):
            return False
        alike = all(len(x) == len(y) and all(map(axis, x, y)) for x, y in zip(shapes(a), shapes(b), strict=True))
        return alike and all(_same_shapes(x, y, size, probe_size) for x, y in zip(a.bodies, b.bodies, strict=True))

    return len(program.steps) == len(probe.steps) and all(map(same, program.steps, probe.steps))


def same_constant(a: Any, b: Any) -> bool:
    """Whether two constants are surely equal."""
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer) or a.shape != b.shape:
        return False
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


@dataclasses.dataclass(frozen=True)
class _Where:
    """A program within the model.

    Attributes:
      path: of the step whose body it is; `None` where a replay does not go.
      scans: how many scans are around.
    """

    path: Path | None = ()
    scans: int = 0

    def body(self, index: int, step: Step) -> _Where:
        """The same for the bodies of a step."""
        if self.path is None or step.body is None:
            return _Where(None)
        return _Where((*self.path, index), self.scans + (step.primitive == SCAN))


@dataclasses.dataclass(frozen=True)
class _Seen:
    """What is known of a value.

    Attributes:
      axis: of the examples; `None` if it is the same for all of them.
      free: whether it is made without the inputs.
      lost: why its examples cannot be told from one another, of a value that is free: harmless until it meets them.
      statistic: the step that makes it, of a value that is made of sums over the examples and the same for all of them.
    """

    axis: Axis = None
    free: bool = True
    lost: str = ""
    statistic: Path | None = None

    def join(self, other: _Seen) -> _Seen:
        """What is known of a value that is either of two."""
        if self.statistic != other.statistic:
            raise Mixed("a loop or branch carries a statistic over the examples on")
        if self.axis is not None and other.axis is not None and self.axis != other.axis:
            raise Mixed("a loop or branch moves the example axis")
        axis = self.axis if other.axis is None else other.axis
        return _Seen(axis, self.free and other.free, self.lost or other.lost, self.statistic)

    def shifted(self, by: int) -> _Seen:
        """The same with so many axes more in front."""
        return self if self.axis is None else dataclasses.replace(self, axis=self.axis + by)


class ExampleFact(Protocol):
    """What is known of a value: among other things, which of its axes holds the examples."""

    @property
    def axis(self) -> Axis: ...

    def join(self, other: Self) -> Self: ...

    def shifted(self, by: int) -> Self: ...


FactT = TypeVar("FactT", bound=ExampleFact)


class ExampleFlow(ForwardFlow[FactT]):
    """Follows the examples through a program traced with batch size `batch`, which no other axis has by chance."""

    batch: int

    def join(self, one: FactT, other: FactT) -> FactT:
        return one.join(other)

    def unstack(self, known: FactT) -> FactT:
        if known.axis == 0:
            raise Mixed("scan runs over the examples")
        return known.shifted(-1)

    def stack(self, known: FactT) -> FactT:
        return known.shifted(1)

    def long(self, shape: Sequence[int]) -> list[int]:
        """Axes as long as the batch, or as a multiple of it."""
        return [i for i, d in enumerate(shape) if d and d % self.batch == 0]

    def check_constant(self, where: Program | Step, x: Any) -> None:
        """Raises Mixed for a constant of the program that has an entry for each example."""
        if isinstance(where, Program) and self.long(np.shape(x)):
            raise Mixed("a constant as long as the batch tells examples apart")


@dataclasses.dataclass(frozen=True)
class _Statistics:
    """Steps that make statistics over the examples, and those of them whose results meet the examples."""

    made: set[Path]
    given: set[Path]


@dataclasses.dataclass(frozen=True)
class _Tracker(ExampleFlow[_Seen]):
    """Says of every value which axis holds the examples.

    Fills `drawn` with the axes of random draws, and `statistics` where these are allowed.
    """

    batch: int
    drawn: dict[Path, int]
    statistics: _Statistics | None = None
    where: _Where = _Where()

    def value(self, where: Program | Step, place: Name, x: Any) -> _Seen:
        self.check_constant(where, x)
        return _Seen()

    def inside(self, index: int, step: Step) -> _Tracker:
        return dataclasses.replace(self, where=self.where.body(index, step))

    def decides(self, what: Either["branch", "length"], known: _Seen) -> None:
        if known.axis is not None or known.lost or known.statistic is not None:
            raise Mixed(known.lost or DECIDES[what])

    def equation(self, index: int, step: Step, known: list[_Seen]) -> list[_Seen]:
        free, lost = all(s.free for s in known), next((s.lost for s in known if s.lost), "")
        try:
            if lost:
                raise Mixed(lost)
            seen = [_Seen(axis, free) for axis in self._axes(step, [s.axis for s in known])]
        except Mixed as mixed:
            if free:
                return self._made(index, step, str(mixed))
            if not self._sums_up(step, known):
                raise
            return self._statistic(index, step, known)
        made = [s.statistic for s in known if s.statistic is not None]
        if self.statistics is None or not made:
            return seen
        if all(s.axis is None for s in seen):
            return self._statistic(index, step, known)
        self.statistics.given.update(made)
        return seen

    def _sums_up(self, step: Step, known: Sequence[_Seen]) -> bool:
        """Whether it is a sum over the examples that may be taken as a constant."""
        allowed = self.statistics is not None and step.primitive == "reduce_sum"
        return allowed and known[0].axis in step.eqn.params["axes"]

    def _statistic(self, index: int, step: Step, known: Sequence[_Seen]) -> list[_Seen]:
        """Of a step that makes a statistic, of one or of a sum over the examples."""
        if self.statistics is None or self.where.path is None or self.where.scans or len(step.outputs) != 1:
            raise Mixed(f"{step.primitive} makes a statistic over the examples where none can be taken as a constant")
        if step.primitive in REARRANGING:
            return [next(s for s in known if s.statistic is not None)]
        path = (*self.where.path, index)
        self.statistics.made.add(path)
        return [_Seen(None, free=False, statistic=path)]

    def _axes(self, step: Step, axes: list[Axis]) -> list[Axis]:
        name = step.primitive
        if name in REPEATING:
            return [REPEATING[name](self.batch, step.eqn, axes)]
        if all(axis is None for axis in axes):
            if any(self.long(aval.shape) for aval in step.output_avals):
                raise Mixed(f"{name} makes a value for the whole batch")
            return [None] * len(step.outputs)
        if name in ELEMENTWISE:
            return [common(name, axes)] * len(step.outputs)
        if name not in RULES:
            raise Mixed(f"{name} is not followed")
        return [RULES[name](self.batch, step.eqn, axes)] * len(step.outputs)

    def _made(self, index: int, step: Step, reason: str) -> list[_Seen]:
        """Without the inputs, but not the same for all examples: what is drawn, each takes its part of."""
        long, where = self.long(step.output_avals[0].shape), self.where
        known = step.primitive in RANDOM and len(step.outputs) == len(long) == 1 and not any(step.differentiated)
        if not known or where.path is None:
            return [_Seen(lost=reason)] * len(step.outputs)
        self.drawn[(*where.path, index)] = where.scans + long[0]
        return [_Seen(long[0])]


class _Flow(_Tracker):
    """Follows the examples where other axes may be as long: what does not come from them is taken to be shared."""

    def value(self, where: Program | Step, place: Name, x: Any) -> _Seen:
        return _Seen()

    def step(self, index: int, step: Step, known: list[_Seen]) -> Sequence[_Seen]:
        if all(s.axis is None for s in known):
            return [_Seen()] * len(step.outputs)
        return super().step(index, step, known)
