"""Walks: along a program from its arguments, from its results, or until what is known no longer changes."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar
from typing import Literal as Either

from jax.extend.core import Literal

from curvax.jaxprs.calls import COND, CUSTOM, LINEAR_SOLVE, REMATERIALIZED, SCAN, WHILE, bind, loop_counts
from curvax.jaxprs.programs import Atom, Name, Program, Step

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
