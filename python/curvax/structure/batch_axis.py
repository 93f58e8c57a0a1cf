"""Does a model treat the examples of its leading axis one by one? Answered from its jaxpr, before any computation.

Row factors are cheap when example i's outputs depend on example i alone: then each example's rows come from a model
call on that example. The contract of `predict_fn` says so, but BatchNorm in training mode, dropout masks drawn for the
whole batch or a collocation residual assembled from several point sets break it, and believing the contract would give
wrong rows. So the batch axis is followed through every equation; what is not understood counts as mixing, which costs
time and never correctness.

The model is traced with a batch size found nowhere else in its shapes, so that an axis of that size (or a multiple of
it: batch and time flattened together, batch slowest) is known to be the batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

from curvax.jaxprs import scan_counts, subjaxprs
from curvax.structure.batch_rules import ELEMENTWISE, REPEATING, RULES, Axis, Mixed, common
from curvax.tree import PyTree

_PROBE_SIZES = (1009, 2003, 3001, 4001, 5003)


def examples_independent(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> tuple[bool, str]:
    """Whether row i of `predict(params, inputs)` depends on example i of the inputs alone, and if not, why.

    Args:
      predict: the model.
      params: parameters (arrays or shapes).
      inputs: inputs with a common leading example axis (arrays or shapes).

    Returns:
      (True, "") or (False, reason).
    """
    leaves = jax.tree.leaves(inputs)
    if not leaves or any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) != 1:
        return False, "the inputs have no common leading example axis"
    batch = _probe_size(params, inputs)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)

    def trace(size: int) -> ClosedJaxpr:
        resized = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape[1:]), x.dtype), inputs)
        return jax.make_jaxpr(predict)(shapes, resized)

    try:
        closed, whole, single = trace(batch), trace(leaves[0].shape[0]), trace(1)
    except (TypeError, ValueError):
        return False, "the model does not accept another batch size"
    alike = _same_computation(whole, closed) and _same_computation(single, closed)
    size = leaves[0].shape[0]
    if not alike or not (size == 1 or _same_shapes(whole.jaxpr, closed.jaxpr, size, batch)):
        return False, "the model computes differently for different batch sizes"
    axes: list[Axis] = [None] * len(jax.tree.leaves(params)) + [0] * len(leaves)
    try:
        (axis,) = _Tracker(batch).closed(closed, axes)
    except Mixed as mixed:
        return False, str(mixed)
    return (True, "") if axis == 0 else (False, "the outputs do not carry the example axis first")


def _probe_size(params: PyTree, inputs: Any) -> int:
    shapes = [leaf.shape for leaf in jax.tree.leaves((params, inputs))]
    sizes = [d for shape in shapes for d in shape] + [math.prod(shape) for shape in shapes]
    for size in _PROBE_SIZES:
        if not any(d and d % size == 0 for d in sizes):
            return size
    return _PROBE_SIZES[0]


# Equations that only rearrange: JAX leaves them out where an axis has length one.
_REARRANGING = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy slice".split())


def _same_computation(closed: ClosedJaxpr, probe: ClosedJaxpr) -> bool:
    """Whether two traces at different batch sizes do the same computation with the same numbers.

    A model may read its batch size as a number (dividing by it, branching on it); then one example alone is not
    computed as it is within its batch, however independent the equations are.
    """
    mine, theirs = list(_signature(closed.jaxpr)), list(_signature(probe.jaxpr))
    if mine != theirs or len(closed.consts) != len(probe.consts):
        return False
    return all(_same_constant(a, b) for a, b in zip(closed.consts, probe.consts, strict=True))


def _signature(jaxpr: Jaxpr) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _REARRANGING:
            continue
        yield eqn.primitive.name
        yield from (repr(v.val) for v in eqn.invars if isinstance(v, Literal))
        # Exponents, lengths of loops, axes. Shapes, which follow the batch size rightly, are tuples.
        yield from (f"{k}={v}" for k, v in sorted(eqn.params.items()) if isinstance(v, bool | int | float))
        for body in _bodies(eqn):
            yield from _signature(body)


def _bodies(eqn: Any) -> list[Jaxpr]:
    """The jaxprs inside an equation that its outputs are computed by; derivatives may take others."""
    if eqn.primitive.name == "custom_linear_solve":
        return [eqn.params["jaxprs"].solve.jaxpr]
    return list(subjaxprs(eqn.params))


def _same_shapes(jaxpr: Jaxpr, probe: Jaxpr, size: int, probe_size: int) -> bool:
    """Whether every axis of every value is as long in both traces, or the same multiple of the batch size."""
    if len(jaxpr.eqns) != len(probe.eqns):
        return False

    def axis(mine: int, theirs: int) -> bool:
        return mine == theirs or (theirs % probe_size == 0 and mine == theirs // probe_size * size)

    def shapes(eqn: Any) -> list[tuple[int, ...]]:
        return [v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape")]

    for a, b in zip(jaxpr.eqns, probe.eqns, strict=True):
        if len(a.outvars) != len(b.outvars):
            return False
        for mine, theirs in zip(shapes(a), shapes(b), strict=True):
            if len(mine) != len(theirs) or not all(map(axis, mine, theirs)):
                return False
        inner = list(zip(_bodies(a), _bodies(b), strict=True))
        if not all(_same_shapes(x, y, size, probe_size) for x, y in inner):
            return False
    return True


def _same_constant(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer) or a.shape != b.shape:
        return False
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


_CALLS = frozenset(
    "jit pjit remat2 checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_lin".split()
)


@dataclasses.dataclass(frozen=True)
class _Tracker:
    """Follows the batch axis through a jaxpr traced with batch size `batch`."""

    batch: int

    def closed(self, closed: ClosedJaxpr | Jaxpr, axes: Sequence[Axis]) -> list[Axis]:
        return self.jaxpr(closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed, axes)

    def jaxpr(self, jaxpr: Jaxpr, axes: Sequence[Axis]) -> list[Axis]:
        constants: list[Any] = [v.aval for v in jaxpr.constvars]
        if any(d and d % self.batch == 0 for aval in constants for d in aval.shape):
            raise Mixed("a constant as long as the batch tells examples apart")
        known: dict[Var, Axis] = dict.fromkeys(jaxpr.constvars)
        known.update(zip(jaxpr.invars, axes, strict=True))

        def read(atom: Any) -> Axis:
            return None if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, axes: list[Axis]) -> list[Axis]:
        name = eqn.primitive.name
        if name in REPEATING:
            return [REPEATING[name](self.batch, eqn, axes)]
        if all(axis is None for axis in axes):
            return self._unbatched(eqn)
        if name in ELEMENTWISE:
            return [common(name, axes)] * len(eqn.outvars)
        if name in _CALLS:
            return self._call(eqn, axes)
        if name in _CONTROL:
            return _CONTROL[name](self, eqn, axes)
        if name not in RULES:
            raise Mixed(f"{name} is not followed")
        return [RULES[name](self.batch, eqn, axes)] * len(eqn.outvars)

    def _unbatched(self, eqn: Any) -> list[Axis]:
        # A value made without the inputs but as long as the batch (a dropout mask, an index) tells examples apart.
        if any(d and d % self.batch == 0 for v in eqn.outvars for d in v.aval.shape):
            raise Mixed(f"{eqn.primitive.name} makes a value for the whole batch")
        return [None] * len(eqn.outvars)

    def _call(self, eqn: Any, axes: list[Axis]) -> list[Axis]:
        inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if not isinstance(inner, ClosedJaxpr | Jaxpr):
            raise Mixed(f"{eqn.primitive.name} is not followed")
        return self.closed(inner, axes)


def _scan(tracker: _Tracker, eqn: Any, axes: list[Axis]) -> list[Axis]:
    p = eqn.params
    consts, carry = scan_counts(eqn)
    scanned = axes[consts + carry :]
    if any(axis == 0 for axis in scanned):
        raise Mixed("scan runs over the examples")
    inner = [None if axis is None else axis - 1 for axis in scanned]
    state = axes[consts : consts + carry]
    for _ in range(carry + 1):
        out = tracker.closed(p["jaxpr"], [*axes[:consts], *state, *inner])
        merged = [_join(a, b) for a, b in zip(state, out[:carry], strict=True)]
        if merged == state:
            return [*state, *(None if axis is None else axis + 1 for axis in out[carry:])]
        state = merged
    raise Mixed("scan moves the example axis")


def _join(a: Axis, b: Axis) -> Axis:
    if a is not None and b is not None and a != b:
        raise Mixed("a loop or branch moves the example axis")
    return b if a is None else a


def _linear_solve(tracker: _Tracker, eqn: Any, axes: list[Axis]) -> list[Axis]:
    """The outputs are those of the function that solves; the others are for derivatives."""
    counts, solve = eqn.params["const_lengths"], eqn.params["jaxprs"].solve
    total = sum(counts)
    start = counts.matvec + counts.vecmat
    return tracker.closed(solve, [*axes[start : start + counts.solve], *axes[total:]])


def _while(tracker: _Tracker, eqn: Any, axes: list[Axis]) -> list[Axis]:
    p = eqn.params
    cond, body = p["cond_nconsts"], p["body_nconsts"]
    cond_axes, body_axes, state = axes[:cond], axes[cond : cond + body], axes[cond + body :]
    for _ in range(len(state) + 1):
        out = tracker.closed(p["body_jaxpr"], [*body_axes, *state])
        merged = [_join(a, b) for a, b in zip(state, out, strict=True)]
        if merged == state:
            if tracker.closed(p["cond_jaxpr"], [*cond_axes, *state]) != [None]:
                raise Mixed("the length of a while loop depends on the examples")
            return merged
        state = merged
    raise Mixed("while moves the example axis")


def _cond(tracker: _Tracker, eqn: Any, axes: list[Axis]) -> list[Axis]:
    if axes[0] is not None:
        raise Mixed("cond branches on the examples")
    branches = [tracker.closed(branch, axes[1:]) for branch in eqn.params["branches"]]
    result = branches[0]
    for branch in branches[1:]:
        result = [_join(a, b) for a, b in zip(result, branch, strict=True)]
    return result


def _barrier(_: _Tracker, eqn: Any, axes: list[Axis]) -> list[Axis]:
    del eqn
    return axes


_CONTROL: dict[str, Callable[[_Tracker, Any, list[Axis]], list[Axis]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "optimization_barrier": _barrier,
    "custom_linear_solve": _linear_solve,
}
