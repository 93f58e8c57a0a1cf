"""A model's jaxpr as nested lists of equations, and its evaluation with perturbations and recordings along the way.

Only what the outputs depend on is in it (`curvax.live`). Reading which parameter enters where is easier when inner
`jit` calls are no walls: they are inlined. The bodies of scans and of rematerialized calls stay programs of their own,
so that they can be evaluated as what they are. Every other call stays one equation, above all `custom_jvp` and
`custom_vjp`, whose derivative rules inlining would lose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import JaxprEqn, Literal

from curvax.jaxprs import CALLS, REMATERIALIZED, SCAN, scan_counts
from curvax.live import LiveJaxpr, Wanted, live_part
from curvax.tree import PyTree

Name: TypeAlias = int
"""A value of a program."""

Atom: TypeAlias = Name | Literal | None
"""What a step reads or a program returns; `None` for what does not matter and was never computed."""

Path: TypeAlias = tuple[int, ...]
"""A step of a program: its index; for one inside the body of another, that one's path and the index in the body."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation; names and not the equation's own variables say what it reads and writes.

    Attributes:
      eqn: the equation.
      inputs, outputs: what it reads and writes.
      differentiated: for each input whether the outputs of the model have a derivative through it here.
      bodies: programs inside it, as in `LiveEquation`.
    """

    eqn: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Name, ...]
    differentiated: tuple[bool, ...]
    bodies: tuple[Program, ...] = ()

    @property
    def primitive(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

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
    """A program without inner `jit` calls: `arguments` and `constants` in, `steps` in order, `results` out.

    `shapes` are those of the results.
    """

    arguments: tuple[Name, ...]
    constants: Mapping[Name, Any]
    steps: tuple[Step, ...]
    results: tuple[Atom, ...]
    shapes: tuple[tuple[int, ...], ...]


def program(live: LiveJaxpr) -> Program:
    """The program of a jaxpr's live part."""
    names: Iterator[int] = itertools.count()
    constants: dict[Name, Any] = {}
    steps: list[Step] = []

    def inline(part: LiveJaxpr, arguments: Sequence[Atom]) -> list[Atom]:
        known: dict[Any, Atom] = dict(zip(part.jaxpr.invars, arguments, strict=True))
        read_here = {v for equation in part.equations for v in equation.eqn.invars if not isinstance(v, Literal)}
        for variable, value in zip(part.jaxpr.constvars, part.consts, strict=True):
            if variable in read_here or variable in part.jaxpr.outvars:
                known[variable] = name = next(names)
                constants[name] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else known.get(atom)

        for equation in part.equations:
            eqn = equation.eqn
            operands = [read(v) for v in eqn.invars]
            if eqn.primitive.name in CALLS:
                produced = inline(equation.bodies[0], operands)
            else:
                produced = [next(names) for _ in eqn.outvars]
                differentiated = tuple(wanted is Wanted.DERIVATIVE for wanted in equation.operands)
                bodies = tuple(map(program, equation.bodies))
                steps.append(Step(eqn, tuple(operands), tuple(produced), differentiated, bodies))
            known.update(zip(eqn.outvars, produced, strict=True))
        return [read(v) if wanted else None for v, wanted in zip(part.jaxpr.outvars, part.results, strict=True)]

    arguments = tuple(next(names) for _ in live.jaxpr.invars)
    results = inline(live, arguments)
    shapes = tuple(tuple(getattr(v.aval, "shape", ())) for v in live.jaxpr.outvars)
    return Program(arguments, constants, tuple(steps), tuple(results), shapes)


def traced_program(predict: Callable[[PyTree, Any], PyTree], params: PyTree, inputs: Any) -> Program:
    """`predict` on arrays or shapes, differentiated by the parameters; the arguments are the leaves of both."""
    varying = [True] * len(jax.tree.leaves(params)) + [False] * len(jax.tree.leaves(inputs))
    return program(live_part(jax.make_jaxpr(predict)(params, inputs), varying))


Place: TypeAlias = tuple[Path, int]
"""An operand of a step, or `RESULT`, its first output."""

RESULT = -1

Records: TypeAlias = dict[Place, jax.Array]
"""Values at places; inside a scan with the scan's axis in front."""


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What is done along a replay. Arrays for steps inside a scan have the scan's axis in front.

    Attributes:
      added: what to add to the first output of a step.
      given: what to take for the first output of a step, which is then not evaluated.
      recorded: places whose values are wanted.
    """

    added: Mapping[Path, jax.Array] = dataclasses.field(default_factory=dict)
    given: Mapping[Path, jax.Array] = dataclasses.field(default_factory=dict)
    recorded: frozenset[Place] = frozenset()

    def inside(self, index: int) -> Hooks:
        """What of it concerns the body of a step."""

        def below(values: Mapping[Path, jax.Array]) -> dict[Path, jax.Array]:
            return {path[1:]: x for path, x in values.items() if path[0] == index and len(path) > 1}

        recorded = frozenset((path[1:], i) for path, i in self.recorded if path[0] == index and len(path) > 1)
        return Hooks(below(self.added), below(self.given), recorded)


def replay(program: Program, arguments: Sequence[Any], hooks: Hooks) -> tuple[list[Any], Records]:
    """Evaluates a program: (results, recorded values)."""
    values = dict(program.constants) | dict(zip(program.arguments, arguments, strict=True))
    records: Records = {}

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else None if atom is None else values[atom]

    for index, step in enumerate(program.steps):
        path, operands = (index,), [read(atom) for atom in step.inputs]
        records.update({(path, i): x for i, x in enumerate(operands) if (path, i) in hooks.recorded})
        if path in hooks.given:
            produced = [hooks.given[path]]
        elif step.body is not None:
            produced, found = _replay_body(step, step.body, operands, hooks.inside(index))
            records.update({((index, *inner), i): value for (inner, i), value in found.items()})
        else:
            produced = _evaluate(step.eqn, operands)
        if path in hooks.added:
            produced[0] = produced[0] + hooks.added[path]
        if (path, RESULT) in hooks.recorded:
            records[path, RESULT] = produced[0]
        values.update(zip(step.outputs, produced, strict=True))
    return [read(atom) for atom in program.results], records


def _replay_body(step: Step, body: Program, operands: Sequence[Any], hooks: Hooks) -> tuple[list[Any], Records]:
    params = step.eqn.params

    def run(operands: Sequence[Any], added: Any, given: Any) -> tuple[list[Any], Records]:
        return replay(body, operands, Hooks(added, given, hooks.recorded))

    if step.primitive != SCAN:
        saved = jax.checkpoint(run, prevent_cse=params["prevent_cse"], policy=params["policy"])
        return saved(list(operands), dict(hooks.added), dict(hooks.given))
    consts, carried = scan_counts(step.eqn)
    fixed, scanned = operands[:consts], operands[consts + carried :]
    # What does not matter is `None` all the way, or the scan would carry one structure in and another out.
    state = [None if end is None else x for x, end in zip(operands[consts:], body.results[:carried], strict=False)]

    def iteration(state: list[Any], slices: tuple[list[Any], Any, Any]) -> tuple[list[Any], Any]:
        scanned, added, given = slices
        results, records = run([*fixed, *state, *scanned], added, given)
        return results[:carried], (results[carried:], records)

    state, (stacked, records) = jax.lax.scan(
        iteration,
        state,
        (list(scanned), dict(hooks.added), dict(hooks.given)),
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    return [*state, *stacked], records


def _evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        produced = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(produced) if eqn.primitive.multiple_results else [produced]
