"""Calls: which primitives contain a jaxpr, and which operands of the equation go into it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from curvax.tree import PyTree

AnyJaxpr: TypeAlias = ClosedJaxpr | Jaxpr
"""A jaxpr with or without the values of its constants; JAX's releases do not agree on where they keep which."""

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Calls that evaluate their jaxpr and do nothing else: its equations may stand in their place."""

REMATERIALIZED = frozenset({"checkpoint", "remat", "remat2"})
"""Calls that are evaluated again in the backward pass instead of keeping what that needs."""

CUSTOM_VJP = "custom_vjp_call"
CUSTOM = frozenset({"custom_jvp_call", CUSTOM_VJP})
"""Calls with derivative rules of their own, which would be lost if their equations stood in their place."""

SCAN, WHILE, COND, LINEAR_SOLVE = "scan", "while", "cond", "custom_linear_solve"

SHARDED = frozenset({"shard_map"})
"""Calls whose jaxpr sees a device's part of the arrays. Shapes outside say nothing about those inside: nobody follows
values into them, and an evaluation takes the equation as a whole."""


@dataclasses.dataclass(frozen=True)
class Body:
    """A jaxpr inside an equation.

    Attributes:
      jaxpr: the jaxpr.
      operands: which operands of the equation are its arguments, in their order. Of a loop these are the arguments of
        the first iteration; what is scanned over has one axis less inside.
    """

    jaxpr: AnyJaxpr
    operands: tuple[int, ...]


def bodies(eqn: JaxprEqn) -> tuple[Body, ...]:
    """The jaxprs that compute an equation's results, into which values can be followed; none for other equations.

    Of a `while` these are the condition and the body, of a `cond` the branches, of a linear solve the function that
    solves (the others are for derivatives), of every other call its only jaxpr.
    """
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name in CALLS or name in REMATERIALIZED or name in CUSTOM or name == SCAN:
        return (Body(_jaxpr(params), tuple(range(count))),)
    if name == WHILE:
        start, state = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
        return (
            Body(params["cond_jaxpr"], (*range(start), *range(state, count))),
            Body(params["body_jaxpr"], (*range(start, state), *range(state, count))),
        )
    if name == COND:
        return tuple(Body(branch, tuple(range(1, count))) for branch in params["branches"])
    if name == LINEAR_SOLVE:
        lengths = params["const_lengths"]
        start = lengths.matvec + lengths.vecmat
        return (Body(params["jaxprs"].solve, (*range(start, start + lengths.solve), *range(sum(lengths), count))),)
    return ()


def _jaxpr(params: Mapping[str, Any]) -> AnyJaxpr:
    """The jaxpr of an equation with one; JAX's releases do not agree on the parameter's name."""
    return params["call_jaxpr"] if "call_jaxpr" in params else params["jaxpr"]


def opened(jaxpr: AnyJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and the values of its constants."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def subjaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
    """All jaxprs among an equation's parameters, those of primitives that are not listed here included."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def contains(jaxpr: AnyJaxpr, primitives: frozenset[str]) -> bool:
    """Whether an equation of the jaxpr, or of any jaxpr inside it, is one of these primitives."""
    return any(
        eqn.primitive.name in primitives or any(contains(inner, primitives) for inner in subjaxprs(eqn.params))
        for eqn in opened(jaxpr)[0].eqns
    )


def uses_custom_vjp(function: Callable[..., Any], *args: PyTree) -> bool:
    """Whether `function` contains a `jax.custom_vjp`, which JAX cannot differentiate in forward mode."""
    return contains(jax.make_jaxpr(function)(*args), frozenset({CUSTOM_VJP}))


def scan_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """Numbers of constants and of carried values; JAX's releases do not agree on the parameters that hold them.

    What is scanned over, and what is stacked, has one axis more outside of the body.
    """
    body = opened(eqn.params["jaxpr"])[0]
    scanned = _count_deeper(eqn.invars, body.invars)
    carry = len(eqn.outvars) - _count_deeper(eqn.outvars, body.outvars)
    return len(eqn.invars) - scanned - carry, carry


def loop_counts(eqn: JaxprEqn) -> tuple[int, int]:
    """Of a `scan` or `while`: which operand is the first that is carried, and how many are."""
    if eqn.primitive.name == SCAN:
        return scan_counts(eqn)
    return eqn.params["cond_nconsts"] + eqn.params["body_nconsts"], len(eqn.outvars)


def _count_deeper(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))


def bind(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """The results of an equation on these operands, evaluated as a whole."""
    with eqn.ctx.manager:
        results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]
