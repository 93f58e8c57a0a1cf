"""Floating-point operations, bytes and memory, counted on jaxprs: an estimate that knows loops.

XLA's own analysis counts the body of a while loop once; here a scan counts as often as it runs. Matrix products and
convolutions are counted exactly, every other equation as one operation per element of its result. Bytes count operands
and results of matrix products and convolutions and the results of everything else, as if XLA fused each elementwise
chain into its consumer's single pass. Launches count what XLA does not fuse: contractions and convolutions, each with
one fused loop behind it, reductions and other equations that are not elementwise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from curvax.jaxprs import COND, SCAN, Program, subjaxprs
from curvax.live import live_part
from curvax.work import Cost as Cost

_FREE = frozenset("broadcast_in_dim reshape squeeze expand_dims transpose copy convert_element_type slice iota".split())
# Updated in place: the part alone moves, read and written.
_IN_PLACE = {"dynamic_update_slice": 1, "scatter": 2, "scatter-add": 2, "scatter_add": 2}
_UNFUSED = frozenset(
    """reduce_sum reduce_max reduce_min reduce_prod argmax argmin sort gather scatter scatter-add scatter_add cumsum
    cholesky triangular_solve eigh dynamic_update_slice concatenate""".split()
)
# A contraction, and the loop that is fused from what follows it.
_CONTRACTION_LAUNCHES = 2.0


def nbytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) in a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "dtype"))


def trace(function: Callable[..., Any], *args: Any) -> Cost:
    """Flops and bytes of `function` on arguments given as arrays or shapes, without what its results do not need."""
    return of_program(jax.make_jaxpr(function)(*args))


def of_program(jaxpr: ClosedJaxpr) -> Cost:
    """Flops and bytes of a program, without what its results do not need."""
    return _program_cost(live_part(jaxpr, [False] * len(jaxpr.in_avals)))


def residual_bytes(function: Callable[..., Any], params: Any, *args: Any) -> int:
    """Bytes that reverse mode in `params` keeps between forward and backward pass of `function(params, *args)`."""
    pullback = jax.eval_shape(lambda p, rest: jax.vjp(lambda q: function(q, *rest), p)[1], params, args)
    return nbytes(pullback)


def _program_cost(program: Program) -> Cost:
    return _sum(_equation_cost(step.eqn, list(map(_program_cost, step.bodies))) for step in program.steps)


def _jaxpr_cost(jaxpr: Jaxpr) -> Cost:
    """Of a jaxpr inside an equation that nobody follows values into."""
    return _sum(_equation_cost(eqn, []) for eqn in jaxpr.eqns)


def _equation_cost(eqn: Any, bodies: list[Cost]) -> Cost:
    """The cost of an equation, whose bodies cost so much if anyone looked."""
    name, params = eqn.primitive.name, eqn.params
    inner = bodies or [_jaxpr_cost(jaxpr) for jaxpr in subjaxprs(params)]
    if name == SCAN:
        return _sum(inner).times(params["length"])
    if name == COND:
        return max(inner, key=lambda c: c.flops)
    if inner:
        return inner[0] if name == "custom_jvp_call" else _sum(inner)
    results = float(
        sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.outvars if hasattr(v.aval, "dtype"))
    )
    if name == "dot_general":
        return Cost(_dot_flops(eqn), _operand_bytes(eqn) + results, results, _CONTRACTION_LAUNCHES)
    if name == "conv_general_dilated":
        flops = _conv_flops(eqn)
        traffic = _operand_bytes(eqn) + results
        return Cost(flops, traffic, results, _CONTRACTION_LAUNCHES, convolution=flops)
    if name == "transpose" and len(eqn.params["permutation"]) > 2:
        # Matrix products take a transposed matrix as it is; other rearrangements are copies.
        return Cost(0.0, 2.0 * results, results, 1.0)
    if name in _FREE:
        return Cost(memory=results)
    if name in _IN_PLACE:
        part = eqn.invars[_IN_PLACE[name]].aval
        return Cost(0.0, 2.0 * math.prod(part.shape) * part.dtype.itemsize, results, 1.0)
    entries = sum(math.prod(v.aval.shape) for v in eqn.outvars if hasattr(v.aval, "shape"))
    return Cost(float(entries), float(results), results, 1.0 if name in _UNFUSED else 0.0)


def _sum(costs: Iterable[Cost]) -> Cost:
    return functools.reduce(Cost.__add__, costs, Cost())


def _operand_bytes(eqn: Any) -> float:
    return float(sum(math.prod(v.aval.shape) * v.aval.dtype.itemsize for v in eqn.invars))


def _dot_flops(eqn: Any) -> float:
    (contract, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[d] for d in contract)
    return 2.0 * depth * math.prod(eqn.outvars[0].aval.shape)


def _conv_flops(eqn: Any) -> float:
    kernel = eqn.invars[1].aval.shape
    numbers = eqn.params["dimension_numbers"]
    features_out = kernel[numbers.rhs_spec[0]]
    per_output = math.prod(kernel) / max(features_out, 1)
    # A dilated input is mostly zeros: as many products as the undilated transpose has.
    dilation = math.prod(eqn.params["lhs_dilation"])
    return 2.0 * per_output * math.prod(eqn.outvars[0].aval.shape) / dilation
