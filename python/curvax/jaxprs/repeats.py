"""A program without steps that compute what an earlier step has computed.

Nested derivatives repeat themselves: two second derivatives along two directions evaluate the model twice, and a second
derivative along one direction takes the first one two times. XLA merges such steps, but not for whoever looks at the
program before:

    a = dot x w        a = dot x w
    b = dot x w        c = add a a
    c = add a b
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import numpy as np
from jax.extend.core import Literal

from curvax.jaxprs.programs import Atom, Name, Program, Step


def without_repeats(program: Program) -> Program:
    """The same program with equal steps made one; the bodies of loops and branches stay as they are."""
    names: dict[Name, Name] = {}
    first: dict[Hashable, int] = {}
    steps: list[Step] = []

    def named(atom: Atom) -> Atom:
        return atom if atom is None or isinstance(atom, Literal) else names.get(atom, atom)

    for step in program.steps:
        step = dataclasses.replace(step, inputs=tuple(map(named, step.inputs)))
        key = _key(step)
        if key is None or key not in first:
            if key is not None:
                first[key] = len(steps)
            steps.append(step)
            continue
        earlier = steps[first[key]]
        names.update(zip(step.outputs, earlier.outputs, strict=True))
        # What matters of an operand to either matters to both.
        wanted = tuple(max(pair) for pair in zip(earlier.wanted, step.wanted, strict=True))
        steps[first[key]] = dataclasses.replace(earlier, wanted=wanted)
    results = tuple(map(named, program.results))
    return dataclasses.replace(program, steps=tuple(steps), results=results)


def _key(step: Step) -> Hashable | None:
    """Equal for steps that compute the same; `None` for a step that is not to be merged."""
    if step.bodies or step.eqn.effects:
        return None
    params = tuple(sorted(step.eqn.params.items()))
    key = (step.primitive, tuple(map(_atom, step.inputs)), params)
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _atom(atom: Atom) -> Any:
    if not isinstance(atom, Literal):
        return atom
    value = np.asarray(atom.val)
    return (value.tobytes(), str(value.dtype), value.shape, str(atom.aval))
