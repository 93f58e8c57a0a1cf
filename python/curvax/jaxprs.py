"""The one walker: everything in curvax that reads or evaluates a jaxpr does it through this module.

JAX writes a function as a jaxpr, a list of equations, some of which contain jaxprs themselves. Three parts:

1. *Calls*: which primitives contain a jaxpr, and which operands go into it. A new or renamed primitive of JAX is added
   here and nowhere else; `tests/structure/test_jaxprs.py` fails at one of the installed JAX that is not listed.
2. *Programs*: a jaxpr as a list of steps without plain calls. To read which parameter enters where, an inner `jit` must
   not be in the way, so its equations stand in its place. The bodies of loops, branches and rematerialized calls stay
   programs of their own, to be evaluated as what they are; so do those of `custom_jvp` and `custom_vjp`, whose
   derivative rules would be lost.
3. *Walks*: `evaluate` computes, and asks a hook about every step. A `ForwardFlow` says what is known of each value from
   what is known of the arguments: is it zero, which of its axes holds the examples. `backward` goes from the results to
   the arguments: which values does anybody need, which outputs does an entry reach.

    jaxpr                                          program
    { lambda ; a:f32[3,2] b:f32[5,3]. let          arguments 0 1
        c:f32[5,2] = jit[jaxpr={ x y.              step 0:  2 = dot_general 1 0
          z = dot_general x y }] b a               step 1:  3 = tanh 2
        d:f32[5,2] = tanh c                        results 3
      in (d,) }

A loop is walked until what is known of its state no longer changes. Facts only get weaker when they are joined, so that
ends. An example, for the axis that holds the examples, is a scan over three layers with state h and weights w:

    1. the first iteration sees    h with the examples on axis 0, and w[i] without any
    2. the body gives              h with the examples on axis 0: nothing has changed, so it holds in every iteration

Built on it: `curvax.live` (what outputs depend on), `curvax.loops` (convolutions in loops), `curvax.plan.cost` (what a
program costs), `curvax.layerwise.block_maps` (tangents of blocks) and `curvax.structure` (layers, examples, positions).
"""

from __future__ import annotations

import abc
import dataclasses
import enum
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeAlias, TypeVar
from typing import Literal as Either

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from curvax.tree import PyTree

# Calls

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


# Programs

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


# Walks

V = TypeVar("V")

BARRIER = "optimization_barrier"
"""Returns its operands one by one."""


def forward(
    program: Program,
    arguments: Sequence[V],
    step: Callable[[int, Step, list[V]], Sequence[V]],
    value: Callable[[Program | Step, Name, Any], V],
) -> tuple[list[V], dict[Name, V]]:
    """Goes along a program once; returns what belongs to its results, and to all names.

    Args:
      program: the program.
      arguments: what belongs to its arguments.
      step: (index, step, what belongs to its inputs) -> what belongs to its outputs.
      value: (who reads it, where, a constant) -> what belongs to that. Where is the name of a constant of the program,
        the index of an input of the step that is a literal, or -1 - i for the i-th result. A value that was never
        computed is the constant `None`.
    """
    known: dict[Name, V] = {name: value(program, name, x) for name, x in program.constants.items()}
    known.update(zip(program.arguments, arguments, strict=True))

    def read(atom: Atom, where: Program | Step, place: int) -> V:
        if atom is None or isinstance(atom, Literal):
            return value(where, place, None if atom is None else atom.val)
        return known[atom]

    for index, one in enumerate(program.steps):
        inputs = [read(atom, one, i) for i, atom in enumerate(one.inputs)]
        known.update(zip(one.outputs, step(index, one, inputs), strict=True))
    return [read(atom, program, -1 - i) for i, atom in enumerate(program.results)], known


def evaluate(
    program: Program, arguments: Sequence[Any], step: Callable[[int, Step, list[Any]], Sequence[Any]] | None = None
) -> list[Any]:
    """The results of a program on these arguments.

    Args:
      program: the program.
      arguments: arrays.
      step: evaluates a step; by default each as a whole (`bind`).
    """
    return forward(program, arguments, step or (lambda _, one, inputs: bind(one.eqn, inputs)), _itself)[0]


def _itself(where: Program | Step, place: Name, x: Any) -> Any:
    del where, place
    return x


def backward(
    program: Program,
    results: Sequence[V | None],
    step: Callable[[int, Step, list[V | None]], Sequence[V | None] | None],
    join: Callable[[V, V], V],
) -> list[V | None]:
    """Goes along a program from its end; returns what is asked of its arguments, `None` where nothing is.

    Args:
      program: the program.
      results: what is asked of its results.
      step: (index, step, what is asked of its outputs) -> what it asks of its inputs; `None` if it asks nothing.
      join: two questions about one value as one.
    """
    asked: dict[Name, V] = {}

    def ask(atoms: Sequence[Any], questions: Sequence[V | None]) -> None:
        for atom, question in zip(atoms, questions, strict=True):
            if question is not None and atom is not None and not isinstance(atom, Literal):
                asked[atom] = join(asked[atom], question) if atom in asked else question

    ask(program.results, results)
    for index in reversed(range(len(program.steps))):
        one = program.steps[index]
        questions = step(index, one, [asked.get(name) for name in one.outputs])
        if questions is not None:
            ask(one.inputs, questions)
    return [asked.get(name) for name in program.arguments]


class ForwardFlow(abc.ABC, Generic[V]):
    """What is known of every value of a program, from what is known of its arguments.

    A subclass says what an equation makes of what is known (`equation`), what constants are (`value`) and how two
    facts about one value are joined (`join`); control flow is handled here.
    """

    opaque: frozenset[str] = frozenset()
    """Primitives with bodies that are taken as one equation instead of being followed into."""

    @abc.abstractmethod
    def equation(self, index: int, step: Step, known: list[V]) -> Sequence[V]:
        """What is known of the outputs of a step that nobody follows into."""

    @abc.abstractmethod
    def value(self, where: Program | Step, place: Name, x: Any) -> V:
        """What is known of a constant, as in `forward`."""

    @abc.abstractmethod
    def join(self, one: V, other: V) -> V:
        """What is known of a value that is either of two."""

    def unstack(self, known: V) -> V:
        """What an iteration of a scan sees of what is scanned over, without its first axis."""
        return known

    def stack(self, known: V) -> V:
        """What is known of the results of all iterations, with the axis of the iterations in front."""
        return known

    def decides(self, what: Either["branch", "length"], known: V) -> None:
        """Called with what is known of the number that chooses a branch, or ends a loop; raises if that must not be."""

    def inside(self, index: int, step: Step) -> ForwardFlow[V]:
        """The flow for the bodies of a step."""
        del index, step
        return self

    def program(self, program: Program, arguments: Sequence[V]) -> list[V]:
        """What is known of the results."""
        return self.names(program, arguments)[0]

    def names(self, program: Program, arguments: Sequence[V]) -> tuple[list[V], dict[Name, V]]:
        """What is known of the results, and of all names."""
        return forward(program, arguments, self.step, self.value)

    def step(self, index: int, step: Step, known: list[V]) -> Sequence[V]:
        """What is known of the outputs of a step."""
        rule = None if step.primitive in self.opaque else _CONTROL.get(step.primitive)
        return self.equation(index, step, known) if rule is None else rule(self.inside(index, step), step, known)

    def body(self, step: Step, which: int, known: Sequence[V]) -> list[V]:
        """What is known of the results of a body of a step, from what is known of the step's inputs."""
        return self.program(step.bodies[which], [known[i] for i in step.operands[which]])

    def joined(self, one: Sequence[V], other: Sequence[V]) -> list[V]:
        """`join` of several values."""
        return [self.join(a, b) for a, b in zip(one, other, strict=True)]

    def state(self, step: Step, known: Sequence[V]) -> list[V]:
        """The inputs of a loop as they are known in every iteration."""
        return self._settled(step, known)[0]

    def _settled(self, step: Step, known: Sequence[V]) -> tuple[list[V], list[V]]:
        """(inputs as every iteration sees them, results of the body)."""
        start, carried = loop_counts(step.eqn)
        state, last = slice(start, start + carried), len(step.bodies) - 1
        known = [*known[: state.stop], *map(self.unstack, known[state.stop :])]
        while True:
            results = self.body(step, last, known)
            joined = self.joined(known[state], results[:carried])
            if joined == known[state]:
                return known, results
            known[state] = joined


def _call(flow: ForwardFlow[Any], step: Step, known: list[Any]) -> list[Any]:
    return flow.body(step, 0, known)


def _scan(flow: ForwardFlow[Any], step: Step, known: list[Any]) -> list[Any]:
    start, carried = loop_counts(step.eqn)
    inside, results = flow._settled(step, known)
    return [*inside[start : start + carried], *map(flow.stack, results[carried:])]


def _while(flow: ForwardFlow[Any], step: Step, known: list[Any]) -> list[Any]:
    inside = flow.state(step, known)
    (more,) = flow.body(step, 0, inside)
    flow.decides("length", more)
    return inside[loop_counts(step.eqn)[0] :]


def _cond(flow: ForwardFlow[Any], step: Step, known: list[Any]) -> list[Any]:
    flow.decides("branch", known[0])
    results = [flow.body(step, which, known) for which in range(len(step.bodies))]
    joined = results[0]
    for other in results[1:]:
        joined = flow.joined(joined, other)
    return joined


def _barrier(flow: ForwardFlow[Any], step: Step, known: list[Any]) -> list[Any]:
    del flow, step
    return known


_CONTROL: Mapping[str, Callable[[ForwardFlow[Any], Step, list[Any]], list[Any]]] = {
    **dict.fromkeys(REMATERIALIZED | CUSTOM | {LINEAR_SOLVE}, _call),
    SCAN: _scan,
    WHILE: _while,
    COND: _cond,
    BARRIER: _barrier,
}
