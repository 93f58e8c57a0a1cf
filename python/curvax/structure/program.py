"""A model's jaxpr as nested lists of equations, and its evaluation with perturbations and recordings along the way.

Reading which parameter enters where is easier when inner `jit` calls are no walls: they are inlined. The bodies of
scans and of rematerialised calls stay programs of their own, so that they can be evaluated as what they are. Every
other call stays one equation, above all `custom_jvp` and `custom_vjp`, whose derivative rules inlining would lose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from curvax.jaxprs import scan_counts
from curvax.tree import PyTree

Name: TypeAlias = int
"""A value of a program."""

Atom: TypeAlias = Name | Literal

Path: TypeAlias = tuple[int, ...]
"""A step of a program: its index; for one inside the body of another, that one's path and the index in the body."""

_INLINED = frozenset({"jit", "pjit", "closed_call", "core_call"})
SCAN = "scan"
REMATERIALISED = frozenset({"checkpoint", "remat", "remat2"})


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation; names and not the equation's own variables say what it reads and writes.

    Attributes:
      eqn: the equation.
      inputs, outputs: what it reads and writes.
      body: of a scan or a rematerialised call.
    """

    eqn: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Name, ...]
    body: Program | None = None

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

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
    """A program without inner `jit` calls: `arguments` and `constants` in, `steps` in order, `results` out."""

    arguments: tuple[Name, ...]
    constants: Mapping[Name, Any]
    steps: tuple[Step, ...]
    results: tuple[Atom, ...]


def program(closed: ClosedJaxpr | Jaxpr) -> Program:
    """The program of a jaxpr."""
    names: Iterator[int] = itertools.count()
    constants: dict[Name, Any] = {}
    steps: list[Step] = []

    def inline(jaxpr: Jaxpr, values: Sequence[Any], arguments: Sequence[Atom]) -> list[Atom]:
        known: dict[Any, Atom] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, values, strict=True):
            known[variable] = name = next(names)
            constants[name] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _INLINED:
                inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
                produced = inline(*_open(inner), operands)
            else:
                produced = [next(names) for _ in eqn.outvars]
                steps.append(Step(eqn, tuple(operands), tuple(produced), _body(eqn)))
            known.update(zip(eqn.outvars, produced, strict=True))
        return [read(v) for v in jaxpr.outvars]

    opened, values = _open(closed)
    arguments = tuple(next(names) for _ in opened.invars)
    results = inline(opened, values, arguments)
    return Program(arguments, constants, tuple(steps), tuple(results))


def _open(closed: Any) -> tuple[Jaxpr, Sequence[Any]]:
    return (closed.jaxpr, closed.consts) if isinstance(closed, ClosedJaxpr) else (closed, ())


def _body(eqn: JaxprEqn) -> Program | None:
    if eqn.primitive.name == SCAN or eqn.primitive.name in REMATERIALISED:
        return program(eqn.params["jaxpr"])
    return None


def example_program(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> Program:
    """`predict` on a batch of one example; the arguments are the leaves of (params, inputs)."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    return program(jax.make_jaxpr(predict)(params, one))


Perturbations: TypeAlias = Mapping[Path, jax.Array]
"""What to add to the first output of a step; inside a scan with the scan's axis in front."""

Records: TypeAlias = dict[tuple[Path, int], jax.Array]
"""(step, operand) -> the operand's value; inside a scan with the scan's axis in front."""


def replay(
    program: Program, arguments: Sequence[Any], perturbations: Perturbations, recorded: frozenset[tuple[Path, int]]
) -> tuple[list[Any], Records]:
    """Evaluates a program: (results, recorded operands)."""
    values = dict(program.constants) | dict(zip(program.arguments, arguments, strict=True))
    records: Records = {}

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for index, step in enumerate(program.steps):
        operands = [read(atom) for atom in step.inputs]
        records.update({((index,), i): operands[i] for i in range(len(operands)) if ((index,), i) in recorded})
        inside = {path[1:]: e for path, e in perturbations.items() if path[0] == index and len(path) > 1}
        wanted = frozenset((path[1:], i) for path, i in recorded if path[0] == index and len(path) > 1)
        if step.body is not None and (inside or wanted):
            produced, found = _replay_body(step, operands, inside, wanted)
            records.update({((index, *path), i): value for (path, i), value in found.items()})
        else:
            produced = _evaluate(step.eqn, operands)
        if (index,) in perturbations:
            produced[0] = produced[0] + perturbations[(index,)]
        values.update(zip(step.outputs, produced, strict=True))
    return [read(atom) for atom in program.results], records


def _replay_body(
    step: Step, operands: Sequence[Any], perturbations: Perturbations, recorded: frozenset[tuple[Path, int]]
) -> tuple[list[Any], Records]:
    body, params = step.body, step.eqn.params
    if body is None:
        raise AssertionError("only steps with a body are replayed inside.")
    if step.primitive != SCAN:

        def call(operands: Sequence[Any], perturbations: Perturbations) -> tuple[list[Any], Records]:
            return replay(body, operands, perturbations, recorded)

        return jax.checkpoint(call, prevent_cse=params["prevent_cse"], policy=params["policy"])(
            list(operands), dict(perturbations)
        )
    consts, carried = scan_counts(step.eqn)
    fixed, state, scanned = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]

    def iteration(state: list[Any], given: tuple[list[Any], Perturbations]) -> tuple[list[Any], Any]:
        slices, perturbations = given
        results, records = replay(body, [*fixed, *state, *slices], perturbations, recorded)
        return results[:carried], (results[carried:], records)

    state, (stacked, records) = jax.lax.scan(
        iteration,
        list(state),
        (list(scanned), dict(perturbations)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*state, *stacked], records


def _evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        produced = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(produced) if eqn.primitive.multiple_results else [produced]
