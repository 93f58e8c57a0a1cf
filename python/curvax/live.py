"""What of a function its outputs depend on, and through which equations derivatives pass, read from its jaxpr.

A jaxpr contains more than that. A model that calls `jax.vjp` or `jax.jvp` leaves the value that it did not ask for, aux
and a new running mean are computed beside the outputs, and a target network is there for its value alone. Whoever reads
a jaxpr to learn how parameters or examples enter reads `live_part`, in which dead equations do not occur and each
operand says whether a derivative is taken through it.

Two passes:

1. Forward, each value is zero, or steady (no derivative passes through it), or varies with the arguments that one
   differentiates by.
2. Backward from the outputs, each value is not wanted, or wanted for itself, or for its derivative: an equation is dead
   if nobody wants its results, and a derivative passes where a value that varies is wanted for it.

    outputs: sin(w) * stop_gradient(cos(w)), differentiated by w

    step              1. kind of the result    2. wanted of the operands
    a = sin w         varying                  w: derivative
    b = cos w         varying                  w: value
    c = stop b        steady                   b: value
    d = mul a c       varying                  a: derivative, c: value
    e = tanh w        varying                  dead: nobody reads it
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from curvax.jaxprs import (
    BARRIER,
    COND,
    CUSTOM,
    LINEAR_SOLVE,
    REMATERIALIZED,
    SCAN,
    WHILE,
    AnyJaxpr,
    Atom,
    ForwardFlow,
    Name,
    Program,
    Step,
    Wanted,
    backward,
    loop_counts,
    program_of,
)


class Kind(enum.IntEnum):
    """What a value is to derivatives; of two that are joined, the larger."""

    ZERO = 0
    STEADY = 1
    VARYING = 2


def live_part(jaxpr: AnyJaxpr, varying: Sequence[bool]) -> Program:
    """The program of a function without what its outputs do not depend on.

    Args:
      jaxpr: of the function.
      varying: for each argument whether derivatives are taken with respect to it.

    Returns:
      The program, whose steps and arguments say what is `wanted` of them.
    """
    program = program_of(jaxpr)
    kinds = [Kind.VARYING if v else Kind.STEADY for v in varying]
    return _live(program, kinds, [Wanted.DERIVATIVE] * len(program.results))


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


class _Kinds(ForwardFlow[Kind]):
    """The forward pass."""

    # Derivative rules of their own may pass a derivative where the equations inside do not.
    opaque = CUSTOM | {LINEAR_SOLVE}

    def value(self, where: Program | Step, place: Name, x: Any) -> Kind:
        return _constant_kind(x)

    def join(self, one: Kind, other: Kind) -> Kind:
        return max(one, other)

    def equation(self, index: int, step: Step, known: list[Kind]) -> list[Kind]:
        name, outputs = step.primitive, step.eqn.outvars
        floating = [kind for kind, atom in zip(known, step.eqn.invars, strict=True) if _inexact(atom)]
        if (name in _PRODUCTS and Kind.ZERO in known) or (name == "div" and known[0] is Kind.ZERO):
            return [Kind.ZERO]
        if name in _LINEAR and set(floating or known) == {Kind.ZERO}:
            return [Kind.ZERO] * len(outputs)
        varies = Kind.VARYING in floating and name not in _FLAT
        return [Kind.VARYING if varies and _inexact(v) else Kind.STEADY for v in outputs]


_KINDS = _Kinds()


def _live(program: Program, kinds: Sequence[Kind], results: Sequence[Wanted]) -> Program:
    """The backward pass.

    Args:
      program: the program of a function.
      kinds: of its arguments.
      results: what matters of its results.
    """
    _, known = _KINDS.names(program, kinds)

    def kind(atom: Atom) -> Kind:
        return _constant_kind(atom.val) if isinstance(atom, Literal) else known[atom]  # type: ignore[index]

    def bounded(kinds: Sequence[Kind], wanted: Sequence[Wanted]) -> list[Wanted]:
        return [w if kind is Kind.VARYING else min(w, Wanted.VALUE) for kind, w in zip(kinds, wanted, strict=True)]

    steps: list[Step] = []

    def step(index: int, step: Step, asked: list[Wanted | None]) -> list[Wanted] | None:
        del index
        needs = [Wanted.NOTHING if need is None else need for need in asked]
        if not any(needs):
            return None
        kinds = list(map(kind, step.inputs))
        steps.append(_live_step(step, kinds, needs))
        return bounded(kinds, steps[-1].wanted)

    asked = backward(program, bounded(list(map(kind, program.results)), results), step, max)
    ends = tuple(atom if wanted else None for atom, wanted in zip(program.results, results, strict=True))
    wanted = tuple(Wanted.NOTHING if need is None else need for need in asked)
    return _without_holes(dataclasses.replace(program, steps=tuple(reversed(steps)), results=ends, wanted=wanted))


def _without_holes(program: Program) -> Program:
    """The program without constants that no step reads, and with `None` for values that are no longer computed."""
    constants = program.constants
    if constants:
        reads = (program.results, *(step.inputs for step in program.steps))
        read = {atom for atoms in reads for atom in atoms if not isinstance(atom, Literal)}
        constants = {name: value for name, value in constants.items() if name in read}
    computed = {*program.arguments, *constants, *(name for step in program.steps for name in step.outputs)}

    def atoms(of: Sequence[Atom]) -> tuple[Atom, ...]:
        return tuple([a if isinstance(a, Literal) or a in computed else None for a in of])

    def step(one: Step) -> Step:
        inputs = atoms(one.inputs)
        return one if inputs == one.inputs else dataclasses.replace(one, inputs=inputs)

    return dataclasses.replace(
        program, constants=constants, steps=tuple(map(step, program.steps)), results=atoms(program.results)
    )


def _most(kind: Kind) -> Wanted:
    """The most that can matter of a value of this kind."""
    return Wanted.DERIVATIVE if kind is Kind.VARYING else Wanted.VALUE


def _live_step(step: Step, kinds: list[Kind], needs: list[Wanted]) -> Step:
    """The step with what matters of its inputs, and with the live parts of its bodies."""
    if step.primitive in REMATERIALIZED:
        body = _live(step.bodies[0], kinds, needs)
        return dataclasses.replace(step, bodies=(body,), wanted=body.wanted)
    if step.primitive == SCAN:
        return _live_scan(step, kinds, needs)
    # All others are evaluated as a whole, and so need all of their operands.
    if step.primitive == BARRIER:
        wanted = tuple(max(need, Wanted.VALUE) for need in needs)
    else:
        passing = Wanted.DERIVATIVE if Wanted.DERIVATIVE in needs else Wanted.VALUE
        wanted = tuple(
            min(passing, _most(kind)) if _inexact(atom) else Wanted.VALUE
            for kind, atom in zip(kinds, step.eqn.invars, strict=True)
        )
    return dataclasses.replace(step, bodies=tuple(_live_bodies(step, kinds, needs)), wanted=wanted)


def _live_bodies(step: Step, kinds: list[Kind], needs: list[Wanted]) -> list[Program]:
    """Of a step that is evaluated as a whole."""
    if step.primitive == WHILE:
        kinds = _KINDS.state(step, kinds)
        results = [[Wanted.VALUE], [_most(kind) for kind in kinds[loop_counts(step.eqn)[0] :]]]
    elif step.primitive == COND or step.primitive in CUSTOM or step.primitive == LINEAR_SOLVE:
        results = [needs] * len(step.bodies)
    else:
        return []
    return [
        _live(body, [kinds[i] for i in operands], wanted)
        for body, operands, wanted in zip(step.bodies, step.operands, results, strict=True)
    ]


def _live_scan(step: Step, kinds: list[Kind], needs: list[Wanted]) -> Step:
    """What is carried matters if the last one of it does, or if an iteration needs it for what matters."""
    consts, carried = loop_counts(step.eqn)
    given = _KINDS.state(step, kinds)
    state = slice(consts, consts + carried)
    ends = [min(need, _most(kind)) for need, kind in zip(needs[:carried], given[state], strict=True)]
    while True:
        body = _live(step.bodies[0], given, [*ends, *needs[carried:]])
        joined = [max(a, b) for a, b in zip(ends, body.wanted[state], strict=True)]
        if joined == ends:
            wanted = (*body.wanted[:consts], *ends, *body.wanted[consts + carried :])
            return dataclasses.replace(step, bodies=(body,), wanted=wanted)
        ends = joined
