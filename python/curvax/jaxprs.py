"""Looking into jaxprs, through JAX's public names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core.primitives import custom_vjp_call_p

from curvax.tree import PyTree

CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
"""Primitives that evaluate their jaxpr and nothing else, whose equations may stand in their place."""

REMATERIALIZED = frozenset({"checkpoint", "remat", "remat2"})
"""The same, but for what is kept for the backward pass."""

CUSTOM = frozenset({"custom_jvp_call", "custom_vjp_call"})
"""The same, but with a derivative of their own."""

SCAN = "scan"


def opened(jaxpr: ClosedJaxpr | Jaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """A jaxpr and the values of its constants, which JAX's releases keep at different places."""
    if isinstance(jaxpr, ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def called(eqn: Any) -> ClosedJaxpr | Jaxpr:
    """The jaxpr of a call (`CALLS`, `REMATERIALIZED`, `CUSTOM`) or the body of a scan."""
    return eqn.params["call_jaxpr"] if "call_jaxpr" in eqn.params else eqn.params["jaxpr"]


def subjaxprs(params: dict[str, Any]) -> Iterator[Jaxpr]:
    """The jaxprs among an equation's parameters (the bodies of scans, conds, calls)."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, Jaxpr):
                yield item


def _holds_custom_vjp(jaxpr: Jaxpr) -> bool:
    return any(
        eqn.primitive is custom_vjp_call_p or any(_holds_custom_vjp(sub) for sub in subjaxprs(eqn.params))
        for eqn in jaxpr.eqns
    )


def uses_custom_vjp(function: Callable[..., Any], *args: PyTree) -> bool:
    """Whether `function` holds a `jax.custom_vjp`, which JAX cannot differentiate in forward mode."""
    return _holds_custom_vjp(jax.make_jaxpr(function)(*args).jaxpr)


def scan_counts(eqn: Any) -> tuple[int, int]:
    """Numbers of constants and of carried values; JAX's releases do not agree on the parameters that hold them.

    What is scanned over, and what is stacked, has one axis more outside of the body.
    """
    body = opened(eqn.params["jaxpr"])[0]
    scanned = _count_deeper(eqn.invars, body.invars)
    carry = len(eqn.outvars) - _count_deeper(eqn.outvars, body.outvars)
    return len(eqn.invars) - scanned - carry, carry


def _count_deeper(outside: Sequence[Any], inside: Sequence[Any]) -> int:
    return sum(a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True))
