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
from curvax.tree import PyTree

_PROBE_SIZES = (1009, 2003, 3001, 4001, 5003)

# The state of a value: the axis that holds the batch, or None if it does not depend on the inputs.
_Axis = int | None


class _Mixed(Exception):
    """An equation combines examples, or is not understood; the text says which."""


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
    axes: list[_Axis] = [None] * len(jax.tree.leaves(params)) + [0] * len(leaves)
    try:
        (axis,) = _Tracker(batch).closed(closed, axes)
    except _Mixed as mixed:
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
        for sub in subjaxprs(eqn.params):
            yield from _signature(sub)


def _same_shapes(jaxpr: Jaxpr, probe: Jaxpr, size: int, probe_size: int) -> bool:
    """Whether every axis of every value is as long in both traces, or the same multiple of the batch size."""
    if len(jaxpr.eqns) != len(probe.eqns):
        return False

    def axis(mine: int, theirs: int) -> bool:
        return mine == theirs or (theirs % probe_size == 0 and mine == theirs // probe_size * size)

    def shapes(eqn: Any) -> list[tuple[int, ...]]:
        return [v.aval.shape for v in eqn.outvars if hasattr(v.aval, "shape")]

    for a, b in zip(jaxpr.eqns, probe.eqns, strict=True):
        for mine, theirs in zip(shapes(a), shapes(b), strict=True):
            if len(mine) != len(theirs) or not all(map(axis, mine, theirs)):
                return False
        inner = list(zip(subjaxprs(a.params), subjaxprs(b.params), strict=True))
        if not all(_same_shapes(x, y, size, probe_size) for x, y in inner):
            return False
    return True


def _same_constant(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tracer) or isinstance(b, Tracer) or a.shape != b.shape:
        return False
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))


_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or polygamma
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    optimization_barrier name sharding_constraint""".split()
)
_REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
_CALLS = frozenset(
    "jit pjit remat2 checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_lin".split()
)
_WINDOWS = frozenset("reduce_window_sum reduce_window_max reduce_window_min".split())


@dataclasses.dataclass(frozen=True)
class _Tracker:
    """Follows the batch axis through a jaxpr traced with batch size `batch`."""

    batch: int

    def closed(self, closed: ClosedJaxpr | Jaxpr, axes: Sequence[_Axis]) -> list[_Axis]:
        return self.jaxpr(closed.jaxpr if isinstance(closed, ClosedJaxpr) else closed, axes)

    def jaxpr(self, jaxpr: Jaxpr, axes: Sequence[_Axis]) -> list[_Axis]:
        constants: list[Any] = [v.aval for v in jaxpr.constvars]
        if any(d and d % self.batch == 0 for aval in constants for d in aval.shape):
            raise _Mixed("a constant as long as the batch tells examples apart")
        known: dict[Var, _Axis] = dict.fromkeys(jaxpr.constvars)
        known.update(zip(jaxpr.invars, axes, strict=True))

        def read(atom: Any) -> _Axis:
            return None if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            known.update(zip(eqn.outvars, self._equation(eqn, [read(v) for v in eqn.invars]), strict=True))
        return [read(v) for v in jaxpr.outvars]

    def _equation(self, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
        name = eqn.primitive.name
        if name == "broadcast_in_dim":
            return [self._broadcast(eqn, axes[0])]
        if all(axis is None for axis in axes):
            return self._unbatched(eqn)
        if name in _ELEMENTWISE:
            return self._elementwise(eqn, axes)
        if name in _CALLS:
            return self._call(eqn, axes)
        rule = _RULES.get(name)
        if rule is None:
            raise _Mixed(f"{name} is not followed")
        result = rule(self, eqn, axes)
        return result if isinstance(result, list) else [result] * len(eqn.outvars)

    def _unbatched(self, eqn: Any) -> list[_Axis]:
        # A value made without the inputs but as long as the batch (a dropout mask, an index) tells examples apart.
        if any(d and d % self.batch == 0 for v in eqn.outvars for d in v.aval.shape):
            raise _Mixed(f"{eqn.primitive.name} makes a value for the whole batch")
        return [None] * len(eqn.outvars)

    def _broadcast(self, eqn: Any, axis: _Axis) -> _Axis:
        dimensions = eqn.params["broadcast_dimensions"]
        if axis is not None:
            return dimensions[axis]
        shape = eqn.params["shape"]
        # Constant along the new axis: the same for every example, so it may stand for a batched value.
        fresh = [i for i, d in enumerate(shape) if i not in dimensions and d and d % self.batch == 0]
        if len(fresh) > 1:
            raise _Mixed("broadcast_in_dim pairs examples with each other")
        return fresh[0] if fresh else None

    def _elementwise(self, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
        axis = self._common(eqn.primitive.name, axes)
        return [axis] * len(eqn.outvars)

    def _common(self, name: str, axes: Sequence[_Axis]) -> int:
        found = {axis for axis in axes if axis is not None}
        if len(found) != 1:
            raise _Mixed(f"{name} pairs examples with each other")
        return found.pop()

    def _call(self, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
        inner = eqn.params.get("call_jaxpr", eqn.params.get("jaxpr"))
        if not isinstance(inner, ClosedJaxpr | Jaxpr):
            raise _Mixed(f"{eqn.primitive.name} is not followed")
        return self.closed(inner, axes)


def _keep(condition: bool, name: str, axis: int) -> int:
    if not condition:
        raise _Mixed(f"{name} works across examples")
    return axis


def _reduction(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis, reduced = _first(axes), eqn.params["axes"]
    return _keep(axis not in reduced, eqn.primitive.name, axis - sum(r < axis for r in reduced))


def _first(axes: Sequence[_Axis]) -> int:
    return next(axis for axis in axes if axis is not None)


def _reshape(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis, shape, out = _first(axes), eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    before = math.prod(shape[:axis])
    for j, size in enumerate(out):
        if math.prod(out[:j]) == before and size % tracker.batch == 0:
            return j
    raise _Mixed("reshape buries the example axis")


def _transpose(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    return eqn.params["permutation"].index(_first(axes))


def _squeeze(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    return axis - sum(d < axis for d in eqn.params["dimensions"])


def _expand_dims(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    for d in sorted(eqn.params["dimensions"]):
        axis += d <= axis
    return axis


def _dot_general(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    (contract, batched) = eqn.params["dimension_numbers"]
    ndim = [v.aval.ndim for v in eqn.invars]
    left, right = axes
    if left is not None and right is not None:
        paired = list(zip(*batched, strict=True))
        return _keep(
            (left, right) in paired, "dot_general", paired.index((left, right)) if (left, right) in paired else 0
        )
    side = 0 if left is not None else 1
    axis = _first(axes)
    _keep(axis not in contract[side] and axis not in batched[side], "dot_general", axis)
    free = [d for d in range(ndim[side]) if d not in contract[side] and d not in batched[side]]
    position = len(batched[0]) + free.index(axis)
    if side == 1:
        position += ndim[0] - len(contract[0]) - len(batched[0])
    return position


def _convolution(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    numbers = eqn.params["dimension_numbers"]
    fine = axes[1] is None and axes[0] == numbers.lhs_spec[0] and eqn.params["batch_group_count"] == 1
    return _keep(fine, "conv_general_dilated", numbers.out_spec[0])


def _concatenate(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = tracker._common("concatenate", axes)
    return _keep(axis != eqn.params["dimension"], "concatenate", axis)


def _pad(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    return _keep(axes[1] is None and tuple(eqn.params["padding_config"][axis]) == (0, 0, 0), "pad", axis)


def _same_extent(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    whole = eqn.invars[0].aval.shape[axis] == eqn.outvars[0].aval.shape[axis]
    return _keep(axes[0] is not None and whole and all(a is None for a in axes[1:]), eqn.primitive.name, axis)


def _rev(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    return _keep(axis not in eqn.params["dimensions"], "rev", axis)


def _cumulative(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    return _keep(axis != eqn.params["axis"], eqn.primitive.name, axis)


def _sort(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = tracker._common("sort", axes)
    return _keep(axis != eqn.params["dimension"], "sort", axis)


def _top_k(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis = _first(axes)
    return _keep(axis != eqn.invars[0].aval.ndim - 1, "top_k", axis)


def _window(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    axis, p = _first(axes), eqn.params
    alone = p["window_dimensions"][axis] == 1 and p["window_strides"][axis] == 1
    return _keep(alone and tuple(p["padding"][axis]) == (0, 0), eqn.primitive.name, axis)


def _gather(_: _Tracker, eqn: Any, axes: list[_Axis]) -> int:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = axes
    out_ndim = eqn.outvars[0].aval.ndim
    index_axes = [d for d in range(out_ndim) if d not in numbers.offset_dims]
    if operand is None and indices is not None:
        return _keep(indices < len(index_axes), "gather", index_axes[min(indices, len(index_axes) - 1)])
    if operand is not None and indices is not None:
        pairs = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
        return _keep((operand, indices) in pairs, "gather", index_axes[indices] if indices < len(index_axes) else 0)
    axis = _first(axes)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = axis not in gone and sizes[axis] == eqn.invars[0].aval.shape[axis] and axis not in numbers.start_index_map
    kept = [d for d in range(eqn.invars[0].aval.ndim) if d not in gone]
    return _keep(whole, "gather", numbers.offset_dims[kept.index(axis)] if whole else 0)


def _scan(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
    p = eqn.params
    consts, carry = scan_counts(eqn)
    scanned = axes[consts + carry :]
    if any(axis == 0 for axis in scanned):
        raise _Mixed("scan runs over the examples")
    inner = [None if axis is None else axis - 1 for axis in scanned]
    state = axes[consts : consts + carry]
    for _ in range(carry + 1):
        out = tracker.closed(p["jaxpr"], [*axes[:consts], *state, *inner])
        merged = [_join(a, b) for a, b in zip(state, out[:carry], strict=True)]
        if merged == state:
            return [*state, *(None if axis is None else axis + 1 for axis in out[carry:])]
        state = merged
    raise _Mixed("scan moves the example axis")


def _join(a: _Axis, b: _Axis) -> _Axis:
    if a is not None and b is not None and a != b:
        raise _Mixed("a loop or branch moves the example axis")
    return b if a is None else a


def _while(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
    p = eqn.params
    cond, body = p["cond_nconsts"], p["body_nconsts"]
    cond_axes, body_axes, state = axes[:cond], axes[cond : cond + body], axes[cond + body :]
    for _ in range(len(state) + 1):
        out = tracker.closed(p["body_jaxpr"], [*body_axes, *state])
        merged = [_join(a, b) for a, b in zip(state, out, strict=True)]
        if merged == state:
            if tracker.closed(p["cond_jaxpr"], [*cond_axes, *state]) != [None]:
                raise _Mixed("the length of a while loop depends on the examples")
            return merged
        state = merged
    raise _Mixed("while moves the example axis")


def _cond(tracker: _Tracker, eqn: Any, axes: list[_Axis]) -> list[_Axis]:
    if axes[0] is not None:
        raise _Mixed("cond branches on the examples")
    branches = [tracker.closed(branch, axes[1:]) for branch in eqn.params["branches"]]
    result = branches[0]
    for branch in branches[1:]:
        result = [_join(a, b) for a, b in zip(result, branch, strict=True)]
    return result


_RULES: dict[str, Callable[[_Tracker, Any, list[_Axis]], _Axis | list[_Axis]]] = {
    **dict.fromkeys(_REDUCTIONS, _reduction),
    **dict.fromkeys(_CUMULATIVE, _cumulative),
    **dict.fromkeys(_WINDOWS, _window),
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "pad": _pad,
    "slice": _same_extent,
    "dynamic_slice": _same_extent,
    "rev": _rev,
    "sort": _sort,
    "top_k": _top_k,
    "gather": _gather,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
