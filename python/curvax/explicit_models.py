"""Models that name explicit mesh axes, evaluated where these axes are automatic.

    h = jnp.einsum("bi,ij->bj", x, w, out_sharding=P("data", "model"))      the user's own word
    h = jax.sharding.reshard(h, P("data"))

JAX refuses such words where the axes are automatic, as they are within a step (`curvax.meshes`). So the model is traced
once more where they are explicit, and the program that this leaves is evaluated without the words: XLA's partitioner
goes by the shardings of parameters and batch. Control flow, rematerialized calls and functions with derivatives of
their own stay what they are.

The trace is on a mesh of the same axes with one device along each: whatever its shape, a batch of one example divides.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr
from jax.sharding import AbstractMesh, AxisType

from curvax import meshes
from curvax.jaxprs import (
    CALLS,
    COND,
    CUSTOM_VJP,
    REMATERIALIZED,
    SCAN,
    WHILE,
    AnyJaxpr,
    Step,
    bind,
    bodies,
    equations_of,
    evaluate,
    scan_counts,
    subjaxprs,
)

_WORDS = ("out_sharding", "sharding")
_NOBODYS = "curvax: all devices"
_MOVES = frozenset({"reshard", "sharding_constraint"})


def on_automatic_axes(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a model or a loss, which may name axes that are explicit outside of a step.

    What names none is called as it is.
    """

    @functools.wraps(function, assigned=("__doc__",), updated=())
    def call(*args: Any, **keyword: Any) -> Any:
        door = meshes.entered()
        if door is None:
            return function(*args, **keyword)
        try:
            return function(*args, **keyword)
        except (ValueError, TypeError):
            traced = _traced(door, function, args, keyword)
            if traced is None:
                raise
        closed, structure = traced
        return jax.tree.unflatten(structure, _evaluated(closed, jax.tree.leaves((args, keyword))))

    return call


def _traced(door: meshes.Door, function: Callable[..., Any], args: Any, keyword: Any) -> tuple[ClosedJaxpr, Any] | None:
    """(the program on explicit axes, structure of its results); `None` if it does not run there either."""
    own: Any = door.mesh
    # JAX wants a mesh within another to be of its size: all devices are on an axis that nobody names.
    sizes, names = (*(1 for _ in own.axis_names), own.size), (*own.axis_names, _NOBODYS)
    ones = AbstractMesh(sizes, names, axis_types=(*own.axis_types, AxisType.Auto))
    # Of a model that names a mesh of devices only that one will do.
    for mesh in (ones, own):
        shapes = meshes.typed((args, keyword), mesh)
        try:
            with jax.sharding.use_abstract_mesh(mesh):
                closed, shape = jax.make_jaxpr(lambda a, k: function(*a, **k), return_shape=True)(*shapes)
        except (ValueError, TypeError):
            continue
        return closed, jax.tree.structure(shape)
    return None


def _evaluated(jaxpr: AnyJaxpr, operands: Sequence[Any]) -> list[Any]:
    return evaluate(equations_of(jaxpr), operands, _step)


def _step(index: int, step: Step, operands: list[Any]) -> Sequence[Any]:
    del index
    eqn, name = step.eqn, step.primitive
    if name in _MOVES:
        return [operands[0]]
    if name in CALLS:
        return _evaluated(bodies(eqn)[0].jaxpr, operands)
    rule = _RULES.get(name)
    if rule is not None:
        return rule(step, operands)
    if any(True for _ in subjaxprs(eqn.params)):
        raise ValueError(
            f"the model names explicit mesh axes and has a {name}, which cannot be followed to automatic axes: give "
            "the step arrays on a mesh with axis_types=AxisType.Auto."
        )
    params = {key: None if key in _WORDS else value for key, value in eqn.params.items()}
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _scan(step: Step, operands: list[Any]) -> list[Any]:
    consts, carried = scan_counts(step.eqn)
    params, (body,) = step.eqn.params, bodies(step.eqn)
    fixed, state, scanned = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def iteration(state: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        results = _evaluated(body.jaxpr, [*fixed, *state, *slices])
        return results[:carried], results[carried:]

    rest = {key: params[key] for key in ("length", "reverse", "unroll")}
    state, stacked = jax.lax.scan(iteration, state, scanned, **rest)
    return [*state, *stacked]


def _while(step: Step, operands: list[Any]) -> list[Any]:
    condition, body = bodies(step.eqn)
    state = body.operands[len(body.operands) - len(step.outputs) :]
    of_condition, of_body = (
        [operands[i] for i in part.operands[: len(part.operands) - len(state)]] for part in (condition, body)
    )
    return jax.lax.while_loop(
        lambda at: _evaluated(condition.jaxpr, [*of_condition, *at])[0],
        lambda at: _evaluated(body.jaxpr, [*of_body, *at]),
        [operands[i] for i in state],
    )


def _cond(step: Step, operands: list[Any]) -> list[Any]:
    branches = [functools.partial(lambda jaxpr, *x: _evaluated(jaxpr, x), body.jaxpr) for body in bodies(step.eqn)]
    index = operands[0].astype(jnp.int32)
    return jax.lax.switch(index, branches, *operands[1:])


def _rematerialized(step: Step, operands: list[Any]) -> list[Any]:
    params, (body,) = step.eqn.params, bodies(step.eqn)
    run = functools.partial(_evaluated, body.jaxpr)
    return jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])(operands)


def _types(step: Step) -> list[jax.ShapeDtypeStruct]:
    """What the operands of a step are on the axes that it was traced on."""
    return [jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for v in step.input_avals]


def _on_its_own_axes(step: Step, function: Callable[..., Any], *shapes: Any) -> tuple[ClosedJaxpr, Any]:
    """(a program, the structure of its results), traced where the step was."""
    mesh: Any = next((x.sharding.mesh for x in _types(step) if not x.sharding.mesh.empty), None)
    if mesh is None:
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*shapes)
    else:
        with jax.sharding.use_abstract_mesh(mesh):
            closed, shape = jax.make_jaxpr(function, return_shape=True)(*shapes)
    return closed, shape


def _smooth(step: Step) -> list[bool]:
    """Which operands have derivatives."""
    return [jnp.issubdtype(v.dtype, jnp.inexact) for v in step.input_avals]


def _split(step: Step, values: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """(those of the operands with derivatives, the others)."""
    pairs = list(zip(values, _smooth(step), strict=True))
    return [x for x, smooth in pairs if smooth], [x for x, smooth in pairs if not smooth]


def _joined(step: Step, smooth: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The inverse of `_split`."""
    first, rest = iter(smooth), iter(others)
    return [next(first if own else rest) for own in _smooth(step)]


def _custom_jvp(step: Step, operands: list[Any]) -> list[Any]:
    (body,), types = bodies(step.eqn), _split(step, _types(step))

    @jax.custom_jvp
    def call(smooth: list[Any], others: list[Any]) -> list[Any]:
        return _evaluated(body.jaxpr, _joined(step, smooth, others))

    @call.defjvp
    def rule(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
        def forward(smooth: Any, others: Any, along: Any) -> Any:
            return jax.jvp(lambda x: bind(step.eqn, _joined(step, x, others)), (smooth,), (along,))

        closed, shape = _on_its_own_axes(step, forward, *types, types[0])
        flat = _evaluated(closed, jax.tree.leaves((*primals, tangents[0])))
        values, along = jax.tree.unflatten(jax.tree.structure(shape), flat)
        return values, along

    return call(*_split(step, operands))


def _custom_vjp(step: Step, operands: list[Any]) -> list[Any]:
    (body,), types = bodies(step.eqn), _split(step, _types(step))
    kept: dict[str, Any] = {}

    @jax.custom_vjp
    def call(smooth: list[Any], others: list[Any]) -> list[Any]:
        return _evaluated(body.jaxpr, _joined(step, smooth, others))

    def forward(smooth: list[Any], others: list[Any]) -> tuple[list[Any], list[Any]]:
        def both(smooth: Any, others: Any) -> Any:
            return jax.vjp(lambda x: bind(step.eqn, _joined(step, x, others)), smooth)

        closed, kept["shape"] = _on_its_own_axes(step, both, *types)
        kept["types"] = [jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=v.sharding) for v in closed.out_avals]
        flat = _evaluated(closed, [*smooth, *others])
        return flat[: len(step.outputs)], [flat[len(step.outputs) :], others]

    def backward(kept_values: list[Any], cotangents: list[Any]) -> tuple[Any, Any]:
        residuals, others = kept_values
        results, structure = len(step.outputs), jax.tree.structure(kept["shape"][1])

        def pull(residuals: Any, cotangents: Any) -> Any:
            return jax.tree.unflatten(structure, residuals)(cotangents)[0]

        closed, _ = _on_its_own_axes(step, pull, kept["types"][results:], kept["types"][:results])
        zeros = [np.zeros(x.shape, jax.dtypes.float0) for x in others]
        return _evaluated(closed, [*residuals, *cotangents]), zeros

    call.defvjp(forward, backward)
    return call(*_split(step, operands))


_RULES: dict[str, Callable[[Step, list[Any]], list[Any]]] = {
    SCAN: _scan,
    WHILE: _while,
    COND: _cond,
    **dict.fromkeys(REMATERIALIZED, _rematerialized),
    "custom_jvp_call": _custom_jvp,
    CUSTOM_VJP: _custom_vjp,
}
