"""Functions made fit for the body of a loop or branch.

XLA for CPUs brings convolutions into the one layout that its fast kernels take only in the outermost computation; in a
`while` or `cond` the kernel gradient and the transposed convolution of reverse mode run 10 to 30 times slower. Here
they are brought into that layout before XLA sees them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr

from curvax.jaxprs import CALLS, Step, bind, bodies, contains, equations_of, evaluate

F = TypeVar("F", bound=Callable[..., Any])


def for_loop_body(function: F) -> F:
    """`function` with every convolution in channels-last layout; the function itself where there is nothing to mend.

    It must be pure and is traced once more, at its first call for each set of argument shapes.
    """
    if jax.default_backend() != "cpu":
        return function
    traced: dict[Any, tuple[ClosedJaxpr, Any] | None] = {}

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = (structure, tuple((x.shape, jnp.result_type(x)) for x in leaves))
        if key not in traced:
            closed, shape = jax.make_jaxpr(function, return_shape=True)(*args)
            traced[key] = (closed, jax.tree.structure(shape)) if contains(closed, _CONVOLUTION) else None
        convolving = traced[key]
        if convolving is None:
            return function(*args)
        closed, out = convolving
        return jax.tree.unflatten(out, evaluate(equations_of(closed), leaves, _step))

    return call  # type: ignore[return-value]


_CONVOLUTION = frozenset({"conv_general_dilated"})


def _step(index: int, step: Step, operands: list[Any]) -> list[Any]:
    """A step with its convolutions in channels-last layout; calls without any stay calls."""
    if step.primitive in _CONVOLUTION:
        return [_channels_last(step.eqn, *operands)]
    if step.primitive in CALLS:
        (called,) = bodies(step.eqn)
        if contains(called.jaxpr, _CONVOLUTION):
            return evaluate(equations_of(called.jaxpr), operands, _step)
    return bind(step.eqn, operands)


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
