"""What of a function its outputs depend on, and through which equations derivatives pass, read from its jaxpr.

A jaxpr holds more than that. A model that calls `jax.vjp` or `jax.jvp` leaves the value that it did not ask for, aux
and a new running mean are computed beside the outputs, and a target network is there for its value alone. Whoever reads
a jaxpr to learn how parameters or examples enter reads `live_part`, in which dead equations do not occur and each
operand says whether a derivative is taken through it.

Two passes. Forward, each value is zero, or steady (no derivative passes through it), or varies with the arguments that
one differentiates by. Backward from the outputs, each value is not wanted, or wanted for itself, or for its derivative:
an equation is dead if nobody wants its results, and a derivative passes where a value that varies is wanted for it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvax.jaxprs import CALLS, CUSTOM, REMATERIALIZED, SCAN, called, opened, scan_counts


class Kind(enum.IntEnum):
    """What a value is to derivatives; of two that are joined, the larger."""

    ZERO = 0
    STEADY = 1
    VARYING = 2


class Wanted(enum.IntEnum):
    """What of a value matters to the outputs; of two that are joined, the larger."""

    NOTHING = 0
    VALUE = 1
    DERIVATIVE = 2


@dataclasses.dataclass(frozen=True)
class LiveEquation:
    """An equation that outputs depend on.

    Attributes:
      eqn: the equation.
      operands: what matters of each operand.
      results: what matters of each result.
      bodies: the live parts of the jaxprs that compute its results: of a call its jaxpr, of a `scan` its body, of a
        `while` condition and body, of a `cond` all branches, of a linear solve its solver; empty for other equations.
    """

    eqn: JaxprEqn
    operands: tuple[Wanted, ...]
    results: tuple[Wanted, ...]
    bodies: tuple[LiveJaxpr, ...] = ()


@dataclasses.dataclass(frozen=True)
class LiveJaxpr:
    """A jaxpr without what its outputs do not depend on.

    Attributes:
      jaxpr, consts: the whole of it, and the values of its constants.
      equations: those that are live, in order.
      arguments: what matters of each argument.
      results: what matters of each output.
    """

    jaxpr: Jaxpr
    consts: tuple[Any, ...]
    equations: tuple[LiveEquation, ...]
    arguments: tuple[Wanted, ...]
    results: tuple[Wanted, ...]


def live_part(jaxpr: ClosedJaxpr | Jaxpr, varying: Sequence[bool]) -> LiveJaxpr:
    """The live part of a function's jaxpr.

    Args:
      jaxpr: of the function.
      varying: for each argument whether derivatives are taken with respect to it.
    """
    kinds = [Kind.VARYING if v else Kind.STEADY for v in varying]
    return _live(jaxpr, kinds, [Wanted.DERIVATIVE] * len(opened(jaxpr)[0].outvars))


# No derivative passes: the results jump, or are cut off on purpose.
_FLAT = frozenset("stop_gradient sign floor ceil round nextafter bitcast_convert_type is_finite".split())
# Zero if one factor is.
_PRODUCTS = frozenset("mul dot_general conv_general_dilated".split())
# Zero if all floating-point operands are.
_LINEAR = frozenset(
    """add add_any sub neg reshape broadcast_in_dim transpose squeeze expand_dims convert_element_type copy copy_p slice
    rev reduce_sum cumsum real imag conj reduce_precision stop_gradient concatenate select_n pad dynamic_slice gather
    dynamic_update_slice scatter-add scatter_add split tile stack unstack reduce_window_sum name pvary""".split()
)


def _inexact(atom: Any) -> bool:
    dtype = getattr(atom.aval, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact)


def _constant_kind(value: Any) -> Kind:
    """Arrays are not looked into: it would cost as much as they are long."""
    known = not isinstance(value, Tracer) and np.ndim(value) == 0 and jnp.issubdtype(jnp.result_type(value), jnp.number)
    return Kind.ZERO if known and not np.any(np.asarray(value)) else Kind.STEADY


def _kinds(jaxpr: Jaxpr, consts: Sequence[Any], given: Sequence[Kind]) -> dict[Var, Kind]:
    """The forward pass."""
    kinds = dict(zip(jaxpr.constvars, map(_constant_kind, consts), strict=True))
    kinds.update(zip(jaxpr.invars, given, strict=True))
    for eqn in jaxpr.eqns:
        kinds.update(zip(eqn.outvars, _equation_kinds(eqn, _read_kinds(kinds, eqn.invars)), strict=True))
    return kinds


def _read_kinds(kinds: dict[Var, Kind], atoms: Sequence[Any]) -> list[Kind]:
    return [_constant_kind(atom.val) if isinstance(atom, Literal) else kinds[atom] for atom in atoms]


def _result_kinds(jaxpr: ClosedJaxpr | Jaxpr, given: Sequence[Kind]) -> list[Kind]:
    inner, consts = opened(jaxpr)
    return _read_kinds(_kinds(inner, consts, given), inner.outvars)


def _equation_kinds(eqn: JaxprEqn, kinds: list[Kind]) -> list[Kind]:
    name = eqn.primitive.name
    if name in CALLS or name in REMATERIALIZED:
        return _result_kinds(called(eqn), kinds)
    if name in _LOOPS:
        return _LOOPS[name](eqn, kinds)
    if name == "optimization_barrier":
        return kinds
    floating = [kind for kind, atom in zip(kinds, eqn.invars, strict=True) if _inexact(atom)]
    if (name in _PRODUCTS and Kind.ZERO in kinds) or (name == "div" and kinds[0] is Kind.ZERO):
        return [Kind.ZERO]
    if name in _LINEAR and set(floating or kinds) == {Kind.ZERO}:
        return [Kind.ZERO] * len(eqn.outvars)
    varies = Kind.VARYING in floating and name not in _FLAT
    return [Kind.VARYING if varies and _inexact(v) else Kind.STEADY for v in eqn.outvars]


def _scan_kinds(eqn: JaxprEqn, kinds: list[Kind]) -> list[Kind]:
    consts, carried = scan_counts(eqn)
    fixed, state, scanned = kinds[:consts], kinds[consts : consts + carried], kinds[consts + carried :]
    while True:
        results = _result_kinds(called(eqn), [*fixed, *state, *scanned])
        joined = _join(state, results[:carried])
        if joined == state:
            return [*state, *results[carried:]]
        state = joined


def _while_kinds(eqn: JaxprEqn, kinds: list[Kind]) -> list[Kind]:
    cond, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    fixed, state = kinds[cond : cond + body], kinds[cond + body :]
    while True:
        joined = _join(state, _result_kinds(eqn.params["body_jaxpr"], [*fixed, *state]))
        if joined == state:
            return state
        state = joined


def _cond_kinds(eqn: JaxprEqn, kinds: list[Kind]) -> list[Kind]:
    first, *others = (_result_kinds(branch, kinds[1:]) for branch in eqn.params["branches"])
    for other in others:
        first = _join(first, other)
    return first


def _join(a: Sequence[Kind], b: Sequence[Kind]) -> list[Kind]:
    return [max(x, y) for x, y in zip(a, b, strict=True)]


_LOOPS: dict[str, Callable[[JaxprEqn, list[Kind]], list[Kind]]] = {
    SCAN: _scan_kinds,
    "while": _while_kinds,
    "cond": _cond_kinds,
}


def _live(jaxpr: ClosedJaxpr | Jaxpr, given: Sequence[Kind], results: Sequence[Wanted]) -> LiveJaxpr:
    """The backward pass.

    Args:
      jaxpr: of a function.
      given: kinds of its arguments.
      results: what matters of its outputs.
    """
    inner, consts = opened(jaxpr)
    kinds = _kinds(inner, consts, given)
    wanted: dict[Var, Wanted] = {}

    def want(atoms: Sequence[Any], needs: Sequence[Wanted]) -> None:
        for atom, need in zip(atoms, needs, strict=True):
            if not isinstance(atom, Literal):
                wanted[atom] = max(wanted.get(atom, Wanted.NOTHING), min(need, _most(kinds[atom])))

    want(inner.outvars, results)
    found: list[LiveEquation] = []
    for eqn in reversed(inner.eqns):
        needs = [wanted.get(v, Wanted.NOTHING) for v in eqn.outvars]
        if any(needs):
            found.append(_live_equation(eqn, _read_kinds(kinds, eqn.invars), needs))
            want(eqn.invars, found[-1].operands)
    arguments = tuple(wanted.get(v, Wanted.NOTHING) for v in inner.invars)
    return LiveJaxpr(inner, tuple(consts), tuple(reversed(found)), arguments, tuple(results))


def _most(kind: Kind) -> Wanted:
    """The most that can matter of a value of this kind."""
    return Wanted.DERIVATIVE if kind is Kind.VARYING else Wanted.VALUE


def _live_equation(eqn: JaxprEqn, kinds: list[Kind], needs: list[Wanted]) -> LiveEquation:
    name = eqn.primitive.name
    if name in CALLS or name in REMATERIALIZED:
        body = _live(called(eqn), kinds, needs)
        return LiveEquation(eqn, body.arguments, tuple(needs), (body,))
    if name == SCAN:
        return _live_scan(eqn, kinds, needs)
    # All others are evaluated as a whole, and so need all of their operands.
    if name == "optimization_barrier":
        operands = tuple(max(need, Wanted.VALUE) for need in needs)
    else:
        passing = Wanted.DERIVATIVE if Wanted.DERIVATIVE in needs else Wanted.VALUE
        operands = tuple(
            min(passing, _most(kind)) if _inexact(atom) else Wanted.VALUE
            for kind, atom in zip(kinds, eqn.invars, strict=True)
        )
    return LiveEquation(eqn, operands, tuple(needs), tuple(_bodies(eqn, kinds, needs)))


def _bodies(eqn: JaxprEqn, kinds: list[Kind], needs: list[Wanted]) -> list[LiveJaxpr]:
    name, params = eqn.primitive.name, eqn.params
    if name in CUSTOM:
        return [_live(called(eqn), kinds, needs)]
    if name == "cond":
        return [_live(branch, kinds[1:], needs) for branch in params["branches"]]
    if name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        state = _while_kinds(eqn, kinds)
        return [
            _live(params["cond_jaxpr"], [*kinds[:cond], *state], [Wanted.VALUE]),
            _live(params["body_jaxpr"], [*kinds[cond : cond + body], *state], [_most(kind) for kind in state]),
        ]
    if name == "custom_linear_solve":
        # The outputs are those of the function that solves; the others are for derivatives.
        counts, solve = params["const_lengths"], params["jaxprs"].solve
        start = counts.matvec + counts.vecmat
        return [_live(solve, [*kinds[start : start + counts.solve], *kinds[sum(counts) :]], needs)]
    return []


def _live_scan(eqn: JaxprEqn, kinds: list[Kind], needs: list[Wanted]) -> LiveEquation:
    """What is carried matters if the last one of it does, or if an iteration needs it for what matters."""
    consts, carried = scan_counts(eqn)
    state = _scan_kinds(eqn, kinds)[:carried]
    given = [*kinds[:consts], *state, *kinds[consts + carried :]]
    ends = [min(need, _most(kind)) for need, kind in zip(needs[:carried], state, strict=True)]
    while True:
        body = _live(called(eqn), given, [*ends, *needs[carried:]])
        starts = body.arguments[consts : consts + carried]
        joined = [max(a, b) for a, b in zip(ends, starts, strict=True)]
        if joined == ends:
            operands = (*body.arguments[:consts], *ends, *body.arguments[consts + carried :])
            return LiveEquation(eqn, operands, (*ends, *needs[carried:]), (body,))
        ends = joined
