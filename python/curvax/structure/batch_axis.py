"""Does a model treat the examples of its leading axis one by one? Answered from its jaxpr, before any computation.

Row factors are cheap when example i's outputs depend on example i alone: then each example's rows come from a model
call on that example. The contract of `predict_fn` says so, but BatchNorm in training mode or a collocation residual
assembled from several point sets break it, and believing the contract would give wrong rows. So the batch axis is
followed through every equation that the outputs depend on; what is not understood counts as mixing, which costs time
and never correctness.

The model is traced with a batch size found nowhere else in its shapes, so that an axis of that size (or a multiple of
it: batch and time flattened together, batch slowest) is known to be the batch.

A random value for the whole batch that is made of one key, such as a dropout mask, does not mix examples: each has its
own part. But the model on one example would draw another one; so such draws are found here, and are arguments of the
model on one example (`ByExample`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import Jaxpr, Literal

from curvax.jaxprs import CUSTOM, REMATERIALISED, SCAN, scan_counts, subjaxprs
from curvax.structure.batch_rules import ELEMENTWISE, RANDOM, REPEATING, RULES, Axis, Mixed, common
from curvax.structure.program import Atom, Name, Path, Program, Step, traced_program
from curvax.tree import PyTree

_PROBE_SIZES = (1009, 2003, 3001, 4001, 5003)


def examples_independent(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> tuple[bool, str]:
    """Whether row i of `predict(params, inputs)` depends on example i of the inputs alone, and if not, why.

    What is random does not count: of a value for the whole batch made of one key, each example has its own part.

    Args:
      predict: the model.
      params: parameters (arrays or shapes).
      inputs: inputs with a common leading example axis (arrays or shapes).

    Returns:
      (True, "") or (False, reason).
    """
    try:
        by_example(predict, params, inputs)
    except Mixed as mixed:
        return False, str(mixed)
    return True, ""


@dataclasses.dataclass(frozen=True)
class Draw:
    """A random value for the whole batch.

    Attributes:
      single, whole: the step that makes it, in the program on one example and in that on the batch.
      axis: of the step's output over all iterations of scans; batch and what is flattened with it, batch slowest.
    """

    single: Path
    whole: Path
    axis: int


@dataclasses.dataclass(frozen=True)
class ByExample:
    """A model that treats examples one by one.

    Attributes:
      program: the model on one example; arguments are the leaves of (params, inputs).
      whole: the same on the batch.
      draws: steps of `program` whose results are to be the examples' parts of those of `whole`.
      examples: batch size of `whole`.
    """

    program: Program
    whole: Program
    draws: tuple[Draw, ...]
    examples: int


def by_example(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> ByExample:
    """The programs of a model whose examples do not interact, from shapes alone.

    Raises:
      Mixed: the examples interact, or nobody can tell; the text says where.
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) != 1:
        raise Mixed("the inputs have no common leading example axis")
    size, batch = leaves[0].shape[0], _probe_size(params, inputs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def trace(size: int) -> Program:
        resized = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), inputs)
        return traced_program(predict, shapes, resized)

    try:
        probe, whole, single = trace(batch), trace(size), trace(1)
    except (TypeError, ValueError) as error:
        raise Mixed("the model does not accept another batch size") from error
    alike = _same_computation(whole, probe) and _same_computation(single, probe)
    if not alike or not (size == 1 or _same_shapes(whole, probe, size, batch)):
        raise Mixed("the model computes differently for different batch sizes")
    tracker = _Tracker(batch, {})
    (axis,) = tracker.program(probe, [None] * len(jax.tree.leaves(params)) + [0] * len(leaves), _Where())
    if axis != 0:
        raise Mixed("the outputs do not carry the example axis first")
    steps = zip(*(list(_random_steps(p)) for p in (single, whole, probe)), strict=True)
    draws = tuple(Draw(one, all_, tracker.drawn[path]) for one, all_, path in steps if path in tracker.drawn)
    return ByExample(single, whole, draws, size)


def _random_steps(program: Program, path: Path = ()) -> Iterator[Path]:
    """Steps that may draw, in an order that does not depend on the batch size."""
    for index, step in enumerate(program.steps):
        if step.primitive in RANDOM:
            yield (*path, index)
        if step.body is not None:
            yield from _random_steps(step.body, (*path, index))


def _probe_size(params: PyTree, inputs: Any) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves((params, inputs))]
    sizes = [d for shape in shapes for d in shape] + [math.prod(shape) for shape in shapes]
    for size in _PROBE_SIZES:
        if not any(d and d % size == 0 for d in sizes):
            return size
    return _PROBE_SIZES[0]


# Equations that only rearrange: JAX leaves them out where an axis has length one.
_REARRANGING = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy slice".split())


def _same_computation(program: Program, probe: Program) -> bool:
    """Whether two traces at different batch sizes do the same computation with the same numbers.

    A model may read its batch size as a number (dividing by it, branching on it); then one example alone is not
    computed as it is within its batch, however independent the equations are.
    """
    mine, theirs = list(_constants(program)), list(_constants(probe))
    if list(_signature(program)) != list(_signature(probe)) or len(mine) != len(theirs):
        return False
    return all(map(_same_constant, mine, theirs))


def _constants(program: Program) -> Iterator[Any]:
    yield from program.constants.values()
    for step in program.steps:
        for body in step.bodies:
            yield from _constants(body)


def _signature(program: Program) -> Iterator[Any]:
    for step in program.steps:
        if step.primitive in _REARRANGING:
            continue
        yield from _equation_signature(step.eqn, step.inputs)
        for body in step.bodies:
            yield from _signature(body)
        if not step.bodies:
            for jaxpr in subjaxprs(step.eqn.params):
                yield from _jaxpr_signature(jaxpr)


def _jaxpr_signature(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name not in _REARRANGING:
            yield from _equation_signature(eqn, eqn.invars)
            for inner in subjaxprs(eqn.params):
                yield from _jaxpr_signature(inner)


def _equation_signature(eqn: Any, operands: Sequence[Any]) -> Iterator[Any]:
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


def _same_constant(a: Any, b: Any) -> bool:
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
class _Tracker:
    """Follows the batch axis through a program traced with batch size `batch`; fills `drawn` with the draws' axes."""

    batch: int
    drawn: dict[Path, int]

    def program(self, program: Program, axes: Sequence[Axis], where: _Where) -> list[Axis]:
        """The axes of the results."""
        if any(d and d % self.batch == 0 for value in program.constants.values() for d in np.shape(value)):
            raise Mixed("a constant as long as the batch tells examples apart")
        known: dict[Name, Axis] = dict.fromkeys(program.constants)
        known.update(zip(program.arguments, axes, strict=True))

        def read(atom: Atom) -> Axis:
            return known[atom] if isinstance(atom, int) else None

        for index, step in enumerate(program.steps):
            found = self._step(step, [read(atom) for atom in step.inputs], index, where)
            known.update(zip(step.outputs, found, strict=True))
        return [read(atom) for atom in program.results]

    def _step(self, step: Step, axes: list[Axis], index: int, where: _Where) -> list[Axis]:
        name = step.primitive
        if name in REPEATING:
            return [REPEATING[name](self.batch, step.eqn, axes)]
        if all(axis is None for axis in axes):
            return self._unbatched(step, index, where)
        if name in ELEMENTWISE:
            return [common(name, axes)] * len(step.outputs)
        if name in REMATERIALISED or name in CUSTOM:
            return self.program(step.bodies[0], axes, where.body(index, step))
        if name in _CONTROL:
            return _CONTROL[name](self, step, axes, where.body(index, step))
        if name not in RULES:
            raise Mixed(f"{name} is not followed")
        return [RULES[name](self.batch, step.eqn, axes)] * len(step.outputs)

    def _unbatched(self, step: Step, index: int, where: _Where) -> list[Axis]:
        # A value made without the inputs but as long as the batch tells examples apart.
        long = [i for aval in step.output_avals for i, d in enumerate(aval.shape) if d and d % self.batch == 0]
        if not long:
            return [None] * len(step.outputs)
        if step.primitive not in RANDOM or len(step.outputs) != 1 or len(long) != 1 or where.path is None:
            raise Mixed(f"{step.primitive} makes a value for the whole batch")
        self.drawn[(*where.path, index)] = where.scans + long[0]
        return [long[0]]


def _scan(tracker: _Tracker, step: Step, axes: list[Axis], where: _Where) -> list[Axis]:
    consts, carry = scan_counts(step.eqn)
    scanned = axes[consts + carry :]
    if any(axis == 0 for axis in scanned):
        raise Mixed("scan runs over the examples")
    inner = [None if axis is None else axis - 1 for axis in scanned]
    state = axes[consts : consts + carry]
    for _ in range(carry + 1):
        out = tracker.program(step.bodies[0], [*axes[:consts], *state, *inner], where)
        merged = [_join(a, b) for a, b in zip(state, out[:carry], strict=True)]
        if merged == state:
            return [*state, *(None if axis is None else axis + 1 for axis in out[carry:])]
        state = merged
    raise Mixed("scan moves the example axis")


def _join(a: Axis, b: Axis) -> Axis:
    if a is not None and b is not None and a != b:
        raise Mixed("a loop or branch moves the example axis")
    return b if a is None else a


def _linear_solve(tracker: _Tracker, step: Step, axes: list[Axis], where: _Where) -> list[Axis]:
    counts = step.eqn.params["const_lengths"]
    start = counts.matvec + counts.vecmat
    return tracker.program(step.bodies[0], [*axes[start : start + counts.solve], *axes[sum(counts) :]], where)


def _while(tracker: _Tracker, step: Step, axes: list[Axis], where: _Where) -> list[Axis]:
    cond, body = step.eqn.params["cond_nconsts"], step.eqn.params["body_nconsts"]
    cond_axes, body_axes, state = axes[:cond], axes[cond : cond + body], axes[cond + body :]
    for _ in range(len(state) + 1):
        out = tracker.program(step.bodies[1], [*body_axes, *state], where)
        merged = [_join(a, b) for a, b in zip(state, out, strict=True)]
        if merged == state:
            if tracker.program(step.bodies[0], [*cond_axes, *state], where) != [None]:
                raise Mixed("the length of a while loop depends on the examples")
            return merged
        state = merged
    raise Mixed("while moves the example axis")


def _cond(tracker: _Tracker, step: Step, axes: list[Axis], where: _Where) -> list[Axis]:
    if axes[0] is not None:
        raise Mixed("cond branches on the examples")
    branches = [tracker.program(branch, axes[1:], where) for branch in step.bodies]
    result = branches[0]
    for branch in branches[1:]:
        result = [_join(a, b) for a, b in zip(result, branch, strict=True)]
    return result


def _barrier(_: _Tracker, step: Step, axes: list[Axis], where: _Where) -> list[Axis]:
    del step, where
    return axes


_CONTROL: dict[str, Callable[[_Tracker, Step, list[Axis], _Where], list[Axis]]] = {
    SCAN: _scan,
    "while": _while,
    "cond": _cond,
    "optimization_barrier": _barrier,
    "custom_linear_solve": _linear_solve,
}
