"""How many bytes a program holds at once, read from its jaxpr.

Values live from the equation that makes them to the last one that reads them:

    a = sin x        a
    b = dot a w      a b      a is read here for the last time
    c = tanh b         b c
    d = add c c          c d  the largest line counts

Arguments and constants are not counted, nor what a compiler makes where it is read (`_FUSED`). The bound is close where
large values are results of products, as in models, and too high for long chains of elementwise operations.
"""

from __future__ import annotations

import math
from typing import Any

from jax.extend.core import Jaxpr, Literal

from curvax.jaxprs.calls import CALLS, AnyJaxpr, opened, subjaxprs

_FUSED = frozenset("broadcast_in_dim iota convert_element_type reshape squeeze expand_dims select_n eq".split())


def peak_bytes(jaxpr: AnyJaxpr) -> int:
    """Most bytes alive at once in an evaluation, results included."""
    return _peak(opened(jaxpr)[0])


def _peak(jaxpr: Jaxpr) -> int:
    outside = {*jaxpr.invars, *jaxpr.constvars}
    last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    sizes: dict[Any, int] = {}
    alive = peak = 0
    for index, eqn in enumerate(jaxpr.eqns):
        inner = max((_peak(body) for body in subjaxprs(eqn.params)), default=0)
        for v in eqn.outvars:
            sizes[v] = 0 if eqn.primitive.name in _FUSED or v not in last else _bytes(v.aval)
        made = sum(sizes[v] for v in eqn.outvars)
        # The results of a call are made inside it.
        peak = max(peak, alive + (max(inner, made) if eqn.primitive.name in CALLS else inner + made))
        alive += made
        for v in {v for v in eqn.invars if not isinstance(v, Literal) and v not in outside}:
            if last[v] == index:
                alive -= sizes.pop(v, 0)
    return peak


def _bytes(aval: Any) -> int:
    dtype = getattr(aval, "dtype", None)
    return math.prod(aval.shape) * dtype.itemsize if dtype is not None else 0
