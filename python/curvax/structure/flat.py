"""A model's jaxpr as one list of equations, and its evaluation with perturbations and recordings along the way.

Reading which parameter enters where is easier when inner `jit` calls are no walls: they are inlined. Every other call
stays one equation, above all `custom_jvp` and `custom_vjp`, whose derivative rules inlining would lose.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from curvax.tree import PyTree

Name: TypeAlias = int
"""A value of the flat program."""

Atom: TypeAlias = Name | Literal

_INLINED = frozenset({"jit", "pjit"})


@dataclasses.dataclass(frozen=True)
class Step:
    """One equation; names and not the equation's own variables say what it reads and writes."""

    eqn: JaxprEqn
    inputs: tuple[Atom, ...]
    outputs: tuple[Name, ...]

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
class Flat:
    """A program without inner `jit` calls: `arguments` and `constants` in, `steps` in order, `results` out."""

    arguments: tuple[Name, ...]
    constants: Mapping[Name, Any]
    steps: tuple[Step, ...]
    results: tuple[Atom, ...]


def flatten(closed: ClosedJaxpr) -> Flat:
    """The flat form of a closed jaxpr."""
    names, constants, steps = itertools.count(), {}, []

    def inline(closed: ClosedJaxpr, arguments: Sequence[Atom]) -> list[Atom]:
        jaxpr = closed.jaxpr
        known: dict[Any, Atom] = dict(zip(jaxpr.invars, arguments, strict=True))
        for variable, value in zip(jaxpr.constvars, closed.consts, strict=True):
            known[variable] = name = next(names)
            constants[name] = value

        def read(atom: Any) -> Atom:
            return atom if isinstance(atom, Literal) else known[atom]

        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if eqn.primitive.name in _INLINED:
                produced = inline(eqn.params["jaxpr"], operands)
            else:
                produced = [next(names) for _ in eqn.outvars]
                steps.append(Step(eqn, tuple(operands), tuple(produced)))
            known.update(zip(eqn.outvars, produced, strict=True))
        return [read(v) for v in jaxpr.outvars]

    arguments = tuple(next(names) for _ in closed.jaxpr.invars)
    results = inline(closed, arguments)
    return Flat(arguments, constants, tuple(steps), tuple(results))


def flat_example(predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any) -> Flat:
    """The flat form of `predict` on a batch of one example; its arguments are the leaves of (params, inputs)."""
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), inputs)
    return flatten(jax.make_jaxpr(predict)(params, one))


def replay(
    flat: Flat, arguments: Sequence[Any], perturbations: Mapping[int, jax.Array], recorded: Mapping[int, int]
) -> tuple[list[Any], dict[int, Any]]:
    """Evaluates a flat program.

    Args:
      flat: the program.
      arguments: values of its arguments.
      perturbations: step -> what to add to that step's first output.
      recorded: step -> which of its operands to record.

    Returns:
      (results, step -> recorded operand).
    """
    values = dict(flat.constants) | dict(zip(flat.arguments, arguments, strict=True))
    records = {}

    def read(atom: Atom) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for index, step in enumerate(flat.steps):
        operands = [read(atom) for atom in step.inputs]
        if index in recorded:
            records[index] = operands[recorded[index]]
        produced = _evaluate(step.eqn, operands)
        if index in perturbations:
            produced[0] = produced[0] + perturbations[index]
        values.update(zip(step.outputs, produced, strict=True))
    return [read(atom) for atom in flat.results], records


def _evaluate(eqn: JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    with eqn.ctx.manager:
        produced = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(produced) if eqn.primitive.multiple_results else [produced]
