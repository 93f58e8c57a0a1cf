"""Programs: a jaxpr as a list of steps, with plain calls replaced by their equations."""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from curvax.jaxprs.calls import CALLS, REMATERIALIZED, SCAN, AnyJaxpr, bodies, opened

Name: TypeAlias = int | Var
"""A value of a program: a number, or the jaxpr's own variable where nothing was put in place of calls."""

Atom: TypeAlias = Name | Literal | None
"""What a step reads or a program returns; `None` for what does not matter and was never computed."""

Path: TypeAlias = tuple[int, ...]
"""A step of a program: its index; for one inside the body of another, that one's path and the index in the body."""


class Wanted(enum.IntEnum):
    """What of a value matters to the outputs; of two that are joined, the larger (`curvax.live`)."""

    NOTHING = 0
    VALUE = 1
    DERIVATIVE = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation; names and not the equation's own variables say what it reads and writes.

    Attributes:
      eqn: the equation.
      inputs, outputs: what it reads and writes.
      bodies: programs of the jaxprs inside it, as `bodies` lists them.
      operands: which of its inputs the arguments of each body are.
      wanted: what matters of each input; empty where nobody has asked (`curvax.live`).
    """

    eqn: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Name, ...]
    bodies: tuple[Program, ...] = ()
    operands: tuple[tuple[int, ...], ...] = ()
    wanted: tuple[Wanted, ...] = ()

    @functools.cached_property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @functools.cached_property
    def differentiated(self) -> tuple[bool, ...]:
        """For each input whether the outputs of the model have a derivative through it here."""
        return tuple(wanted is Wanted.DERIVATIVE for wanted in self.wanted)

    @property
    def body(self) -> Program | None:
        """The body of a scan or a rematerialized call, whose steps have paths."""
        return self.bodies[0] if self.primitive == SCAN or self.primitive in REMATERIALIZED else None

    @property
    def input_avals(self) -> list[Any]:
        """Shapes and dtypes of what it reads."""
        return [v.aval for v in self.eqn.invars]

    @property
    def output_avals(self) -> list[Any]:
        """Shapes and dtypes of what it writes."""
        return [v.aval for v in self.eqn.outvars]


@dataclasses.dataclass(frozen=True)
class Program:
    """`arguments` and `constants` in, `steps` in order, `results` out.

    Attributes:
      arguments, constants, steps, results: see above.
      shapes: of the results.
      wanted: what matters of each argument; empty where nobody has asked (`curvax.live`).
    """

    arguments: tuple[Name, ...]
    constants: Mapping[Name, Any]
    steps: tuple[Step, ...]
    results: tuple[Atom, ...]
    shapes: tuple[tuple[int, ...], ...]
    wanted: tuple[Wanted, ...] = ()


def program_of(jaxpr: AnyJaxpr) -> Program:
    """The program of a jaxpr: plain calls in place, and the bodies of all other equations as programs."""
    names, constants, steps = itertools.count(), dict[Name, Any](), list[Step]()
    inner = opened(jaxpr)[0]
    arguments = tuple(next(names) for _ in inner.invars)

    def inline(jaxpr: AnyJaxpr, arguments: Sequence[Atom]) -> list[Atom]:
        inner, consts = opened(jaxpr)
        known: dict[Any, Atom] = dict(zip(inner.invars, arguments, strict=True))
        for variable, value in zip(inner.constvars, consts, strict=True):
            known[variable] = name = next(names)
            constants[name] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else known[atom]

        for eqn in inner.eqns:
            operands = tuple(map(read, eqn.invars))
            if eqn.primitive.name in CALLS:
                produced: Sequence[Atom] = inline(bodies(eqn)[0].jaxpr, operands)
            else:
                produced = outputs = tuple(next(names) for _ in eqn.outvars)
                below = bodies(eqn)
                programs = tuple(program_of(body.jaxpr) for body in below)
                steps.append(Step(eqn, operands, outputs, programs, tuple(body.operands for body in below)))
            known.update(zip(eqn.outvars, produced, strict=True))
        return [read(atom) for atom in inner.outvars]

    results = inline(jaxpr, arguments)
    return Program(arguments, constants, tuple(steps), tuple(results), _shapes(inner))


def equations_of(jaxpr: AnyJaxpr) -> Program:
    """The equations of a jaxpr as they stand, calls included; names are its variables, and no step has bodies.

    For an evaluation that looks into few of its calls.
    """
    inner, consts = opened(jaxpr)
    steps = tuple(Step(eqn, tuple(eqn.invars), tuple(eqn.outvars)) for eqn in inner.eqns)
    constants: dict[Name, Any] = dict(zip(inner.constvars, consts, strict=True))
    return Program(tuple(inner.invars), constants, steps, tuple(inner.outvars), _shapes(inner))


def _shapes(jaxpr: Jaxpr) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(getattr(v.aval, "shape", ())) for v in jaxpr.outvars)
