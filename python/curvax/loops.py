"""Functions made fit for XLA's compiler for CPUs, which is slow at two forms of what models and their derivatives do.

Convolutions: they come into the one layout that the fast kernels take only in the outermost computation; in a `while`
or `cond` the kernel gradient and the transposed convolution of reverse mode run 10 to 30 times slower. Here they are
brought into that layout before XLA sees them.

Products that contract several axes, as the gradient of a weight over examples and positions: XLA transposes the left
operand for them, and with it whatever elementwise work makes that operand, against the order of memory. With the axes
merged it takes the operand as it is:

    dW = sum_bt h_bt d_bt^T     dot_general (B, T, n) (B, T, m), axes 0 and 1      a transposed copy of h or d
                                dot_general (B T, n) (B T, m), axis 0              none

Twenty products with the Gauss-Newton matrix of a transformer of 42,000 parameters take half the time, its gradient two
thirds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from curvax.jaxprs import CALLS, AnyJaxpr, Step, bind, bodies, equations_of, evaluate, opened, subjaxprs

F = TypeVar("F", bound=Callable[..., Any])


def for_loop_body(function: F) -> F:
    """`function` with every convolution and product in the form that runs fast, in the body of a loop or outside.

    The function itself where there is nothing to mend. It must be pure and is traced once, at its first call for each
    set of argument shapes.
    """
    if jax.default_backend() != "cpu":
        return function
    traced: dict[Any, tuple[ClosedJaxpr, Any] | None] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((x.shape, jnp.result_type(x)) for x in leaves))
        if key not in traced:
            closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
            traced[key] = (closed, jax.tree.structure(shape)) if _any_slow(closed) else None
        slow = traced[key]
        if slow is None:
            return function(*args)
        closed, out = slow
        return jax.tree.unflatten(out, evaluate(equations_of(closed), leaves, _step))

    return call  # type: ignore[return-value]


def _any_slow(jaxpr: AnyJaxpr) -> bool:
    return any(
        _is_slow(eqn) or any(_any_slow(inner) for inner in subjaxprs(eqn.params)) for eqn in opened(jaxpr)[0].eqns
    )


def _is_slow(eqn: JaxprEqn) -> bool:
    return eqn.primitive.name == "conv_general_dilated" or _contracts_neighbors(eqn)


def _contracts_neighbors(eqn: JaxprEqn) -> bool:
    """Whether it is a product that contracts several axes, side by side in both operands."""
    if eqn.primitive.name != "dot_general" or eqn.params.get("out_sharding") is not None:
        return False
    (contracted, _) = eqn.params["dimension_numbers"]
    return len(contracted[0]) > 1 and all(
        tuple(axes) == tuple(range(axes[0], axes[0] + len(axes))) for axes in contracted
    )


def _step(index: int, step: Step, operands: list[Any]) -> list[Any]:
    """A step in the form that runs fast; calls with nothing to mend stay calls."""
    if step.primitive == "conv_general_dilated":
        return [_channels_last(step.eqn, *operands)]
    if _contracts_neighbors(step.eqn):
        return [_one_contraction(step.eqn, *operands)]
    if step.primitive in CALLS:
        (called,) = bodies(step.eqn)
        if _any_slow(called.jaxpr):
            return evaluate(equations_of(called.jaxpr), operands, _step)
    return bind(step.eqn, operands)


def _one_contraction(eqn: JaxprEqn, left: jax.Array, right: jax.Array) -> jax.Array:
    p = eqn.params
    contracted, batch = p["dimension_numbers"]
    operands, merged, kept = [], [], []
    for x, axes, others in zip((left, right), contracted, batch, strict=True):
        first, last = axes[0], axes[0] + len(axes)
        operands.append(x.reshape(*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:]))
        merged.append((first,))
        kept.append(tuple(i if i < first else i - len(axes) + 1 for i in others))
    numbers = (tuple(merged), tuple(kept))
    left, right = operands
    return jax.lax.dot_general(
        left, right, numbers, precision=p["precision"], preferred_element_type=p["preferred_element_type"]
    )


def _channels_last(eqn: Any, image: jax.Array, kernel: jax.Array) -> jax.Array:
    p, numbers = dict(eqn.params), eqn.params["dimension_numbers"]
    # Specs list the axes of batch (or output feature), feature, and space, in that order.
    batch, feature, *space = numbers.lhs_spec
    features_out, features_in, *window = numbers.rhs_spec
    result = jax.lax.conv_general_dilated(
        jnp.transpose(image, (batch, *space, feature)),
        jnp.transpose(kernel, (*window, features_in, features_out)),
        window_strides=p["window_strides"],
        padding=p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=jax.lax.ConvDimensionNumbers(
            (0, image.ndim - 1, *range(1, image.ndim - 1)),
            (image.ndim - 1, image.ndim - 2, *range(image.ndim - 2)),
            (0, image.ndim - 1, *range(1, image.ndim - 1)),
        ),
        feature_group_count=p["feature_group_count"],
        batch_group_count=p["batch_group_count"],
        precision=p["precision"],
        preferred_element_type=p["preferred_element_type"],
    )
    out_batch, out_feature, *out_space = numbers.out_spec
    order = {out_batch: 0, out_feature: image.ndim - 1, **{axis: 1 + i for i, axis in enumerate(out_space)}}
    return jnp.transpose(result, [order[axis] for axis in range(image.ndim)])
