"""Where one equation leaves the axis that holds the examples, or why it combines them.

A rule gets the batch size, the equation and the axes of its operands, at least one of which is not `None`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Axis: TypeAlias = int | None
"""The axis that holds the batch, or `None` if the value does not depend on the inputs."""


class Mixed(Exception):
    """An equation combines examples, or is not understood; the text says which."""


DECIDES = {
    "branch": "cond branches on the examples",
    "length": "the length of a while loop depends on the examples",
}
"""Why control flow must not depend on the examples."""

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul ne neg nextafter not or polygamma
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n shift_left
    shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor
    name sharding_constraint complex zeta igamma_grad_a eq_to le_to lt_to log2 one_minus_square
    pvary bitcast_convert_type random_seed random_fold_in random_clone random_unwrap threefry2x32""".split()
)
_DRAWS = frozenset("random_bits random_split random_gamma".split())
RANDOM = _DRAWS | {"random_fold_in", "random_seed"}
"""Equations that make what is random of a key, or of a number."""
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())
WINDOWS = frozenset(
    """reduce_window_sum reduce_window_max reduce_window_min select_and_scatter_add select_and_gather_add""".split()
)
_SCATTERS = frozenset("scatter scatter-add scatter-mul scatter-min scatter-max scatter-sub".split())
_MATRICES = frozenset("cholesky eig eigh hessenberg householder_product lu qr schur svd tridiagonal".split())


SETS = "give each set a term of its own, loss=curvax.Terms(name=Term(predict_fn, loss), ...)"
"""What to write in the place of a model of several sets of examples."""


def keep(condition: bool, name: str, axis: int) -> int:
    """`axis`, if the condition holds."""
    if not condition:
        raise Mixed(f"{name} works across examples")
    return axis


def first(axes: Sequence[Axis]) -> int:
    """The first axis."""
    return next(axis for axis in axes if axis is not None)


def common(name: str, axes: Sequence[Axis]) -> int:
    """The one axis of all operands that have one."""
    distinct = {axis for axis in axes if axis is not None}
    if len(distinct) != 1:
        raise Mixed(f"{name} pairs examples with each other")
    return distinct.pop()


def _reduction(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis, reduced = first(axes), eqn.params["axes"]
    return keep(axis not in reduced, eqn.primitive.name, axis - sum(r < axis for r in reduced))


def _reshape(batch: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis, shape, out = first(axes), eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if eqn.params["dimensions"] is not None:
        # The axes are permuted before.
        order = tuple(eqn.params["dimensions"])
        axis, shape = order.index(axis), tuple(shape[i] for i in order)
    before = math.prod(shape[:axis])
    for j, size in enumerate(out):
        if math.prod(out[:j]) == before and size % batch == 0:
            return j
    raise Mixed("reshape buries the example axis")


def _transpose(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    return eqn.params["permutation"].index(first(axes))


def _squeeze(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return axis - sum(d < axis for d in eqn.params["dimensions"])


def _expand_dims(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    for d in sorted(eqn.params["dimensions"]):
        axis += d <= axis
    return axis


def _dot_general(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    (contract, batched) = eqn.params["dimension_numbers"]
    ndim = [v.aval.ndim for v in eqn.invars]
    left, right = axes
    if left is not None and right is not None:
        paired = list(zip(*batched, strict=True))
        return keep(
            (left, right) in paired, "dot_general", paired.index((left, right)) if (left, right) in paired else 0
        )
    side = 0 if left is not None else 1
    axis = first(axes)
    keep(axis not in contract[side] and axis not in batched[side], "dot_general", axis)
    free = [d for d in range(ndim[side]) if d not in contract[side] and d not in batched[side]]
    position = len(batched[0]) + free.index(axis)
    if side == 1:
        position += ndim[0] - len(contract[0]) - len(batched[0])
    return position


def _convolution(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    numbers = eqn.params["dimension_numbers"]
    fine = axes[1] is None and axes[0] == numbers.lhs_spec[0] and eqn.params["batch_group_count"] == 1
    return keep(fine, "conv_general_dilated", numbers.out_spec[0])


def _concatenate(batch: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = common("concatenate", axes)
    if axis == eqn.params["dimension"]:
        raise Mixed(f"concatenate joins sets of examples: {SETS}")
    return axis


def _pad(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axes[1] is None and tuple(eqn.params["padding_config"][axis]) == (0, 0, 0), "pad", axis)


def _split(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis != eqn.params["axis"], "split", axis)


def _stack(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = common("stack", axes)
    return axis + (axis >= eqn.params["axis"])


def _unstack(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis != eqn.params["axis"], "unstack", axis - (axis > eqn.params["axis"]))


def _same_extent(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    whole = eqn.invars[0].aval.shape[axis] == eqn.outvars[0].aval.shape[axis]
    return keep(axes[0] is not None and whole and all(a is None for a in axes[1:]), eqn.primitive.name, axis)


def _rev(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis not in eqn.params["dimensions"], "rev", axis)


def _cumulative(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis != eqn.params["axis"], eqn.primitive.name, axis)


def _sort(batch: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = common("sort", axes)
    return keep(axis != eqn.params["dimension"], "sort", axis)


def _top_k(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis != eqn.invars[0].aval.ndim - 1, "top_k", axis)


def _window(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis, p = common(eqn.primitive.name, axes), eqn.params
    shapes = {v.aval.shape[axis] for v in (*eqn.invars, *eqn.outvars) if v.aval.ndim}
    alone = p["window_dimensions"][axis] == 1 and p["window_strides"][axis] == 1 and len(shapes) == 1
    return keep(alone and tuple(p["padding"][axis]) == (0, 0), eqn.primitive.name, axis)


def _gather(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    operand, indices = axes
    out_ndim = eqn.outvars[0].aval.ndim
    index_axes = [d for d in range(out_ndim) if d not in numbers.offset_dims]
    if operand is None and indices is not None:
        return keep(indices < len(index_axes), "gather", index_axes[min(indices, len(index_axes) - 1)])
    if operand is not None and indices is not None:
        pairs = list(zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True))
        return keep((operand, indices) in pairs, "gather", index_axes[indices] if indices < len(index_axes) else 0)
    axis = first(axes)
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    whole = axis not in gone and sizes[axis] == eqn.invars[0].aval.shape[axis] and axis not in numbers.start_index_map
    kept = [d for d in range(eqn.invars[0].aval.ndim) if d not in gone]
    return keep(whole, "gather", numbers.offset_dims[kept.index(axis)] if whole else 0)


def _dynamic_update_slice(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    (operand, update), starts = axes[:2], axes[2:]
    shapes = [v.aval.shape for v in eqn.invars[:2]]
    fits = operand is not None and operand == update and all(axis is None for axis in starts)
    return keep(
        fits and shapes[0][operand] == shapes[1][operand], "dynamic_update_slice", 0 if operand is None else operand
    )


def _scatter(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    numbers, (operand, indices, updates) = eqn.params["dimension_numbers"], axes
    if operand is None or updates is None:
        raise Mixed(f"{eqn.primitive.name} works across examples")
    shape, update_shape = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
    gone = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
    if indices is None:
        # The same places in every example: the batch is a whole axis of the window.
        kept = [d for d in range(len(shape)) if d not in gone]
        window = operand in kept and numbers.update_window_dims[kept.index(operand)] == updates
        free = operand not in numbers.scatter_dims_to_operand_dims and shape[operand] == update_shape[updates]
        return keep(window and free, eqn.primitive.name, operand)
    pairs = list(zip(numbers.operand_batching_dims, numbers.scatter_indices_batching_dims, strict=True))
    scattered = [d for d in range(len(update_shape)) if d not in numbers.update_window_dims]
    fits = (operand, indices) in pairs and indices < len(scattered) and scattered[indices] == updates
    return keep(fits, eqn.primitive.name, operand)


def _drawn(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    """Each key draws for itself."""
    axis = common(eqn.primitive.name, axes)
    return keep(axes[0] is not None and axis < eqn.invars[0].aval.ndim, eqn.primitive.name, axis)


def _wrap(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    """The last axis holds the words of one key."""
    axis = first(axes)
    return keep(axis < eqn.invars[0].aval.ndim - 1, "random_wrap", axis)


def _fft(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = first(axes)
    return keep(axis < eqn.invars[0].aval.ndim - len(eqn.params["fft_lengths"]), "fft", axis)


def _matrices(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    """Decompositions of the matrices in the last two axes."""
    name = eqn.primitive.name
    axis = common(name, axes)
    return keep(all(a is not None for a in axes) and axis < eqn.invars[0].aval.ndim - 2, name, axis)


def _triangular_solve(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    matrix, right = axes
    ndim = eqn.invars[1].aval.ndim
    if right is None:
        raise Mixed("triangular_solve works across examples")
    if matrix is None:
        # Examples are columns (or, from the right, rows) that one matrix acts on.
        return keep(right == (ndim - 1 if eqn.params["left_side"] else ndim - 2), "triangular_solve", right)
    return keep(matrix == right < ndim - 2, "triangular_solve", right)


def _tridiagonal_solve(_: int, eqn: Any, axes: Sequence[Axis]) -> int:
    axis = common("tridiagonal_solve", axes)
    every = all(a is not None for a in axes)
    return keep(every and axis < eqn.invars[-1].aval.ndim - 2, "tridiagonal_solve", axis)


def _fresh(axes: Sequence[int], name: str) -> Axis:
    if len(axes) > 1:
        raise Mixed(f"{name} pairs examples with each other")
    return axes[0] if axes else None


def _broadcast(batch: int, eqn: Any, axes: Sequence[Axis]) -> Axis:
    dimensions, shape = eqn.params["broadcast_dimensions"], eqn.params["shape"]
    if axes[0] is not None:
        return dimensions[axes[0]]
    return _fresh([i for i, d in enumerate(shape) if i not in dimensions and d and d % batch == 0], "broadcast_in_dim")


def _tile(batch: int, eqn: Any, axes: Sequence[Axis]) -> Axis:
    shape, repetitions = eqn.invars[0].aval.shape, eqn.params["reps"]
    if axes[0] is not None:
        return keep(repetitions[axes[0]] == 1, "tile", axes[0])
    long = [i for i, d in enumerate(eqn.outvars[0].aval.shape) if d and d % batch == 0]
    return _fresh([keep(repetitions[i] % batch == 0 or shape[i] == 1, "tile", i) for i in long], "tile")


def _iota(batch: int, eqn: Any, axes: Sequence[Axis]) -> Axis:
    del axes
    long = [i for i, d in enumerate(eqn.params["shape"]) if d and d % batch == 0]
    return _fresh([keep(i != eqn.params["dimension"], "iota", i) for i in long], "iota")


REPEATING: dict[str, Callable[[int, Any, Sequence[Axis]], Axis]] = {
    "broadcast_in_dim": _broadcast,
    "tile": _tile,
    "iota": _iota,
}
"""Equations that may make a value as long as the batch, the same for every example, of one without the batch."""

RULES: dict[str, Callable[[int, Any, Sequence[Axis]], Axis]] = {
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(_SCATTERS, _scatter),
    **dict.fromkeys(_MATRICES, _matrices),
    **dict.fromkeys(_DRAWS, _drawn),
    "random_wrap": _wrap,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "pad": _pad,
    "slice": _same_extent,
    "dynamic_slice": _same_extent,
    "dynamic_update_slice": _dynamic_update_slice,
    "rev": _rev,
    "sort": _sort,
    "top_k": _top_k,
    "gather": _gather,
    "fft": _fft,
    "triangular_solve": _triangular_solve,
    "tridiagonal_solve": _tridiagonal_solve,
}
