"""A model as a program, and its evaluation with perturbations and recordings along the way.

Only what the outputs depend on is in the program (`curvax.live`), and the equations of inner `jit` calls stand in their
place (`curvax.jaxprs`). A replay evaluates it step by step, and `Hooks` say what is done at which step. An example is
y = tanh(a W + b), in which the product has the path (0,):

    step 0   h = a W        recorded: its operand a        the activations
                            added: e of the shape of h     dy/de at e = 0 is the cotangent of h
    step 1   s = h + b
    step 2   y = tanh s
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.jaxprs import COND, SCAN, Path, Program, Step, bind, evaluate, scan_counts
from curvax.live import live_part
from curvax.structure.real_arithmetic import in_real_arithmetic, is_complex_program
from curvax.tree import PyTree


def traced_program(predict: Callable[[PyTree, Any], PyTree], params: PyTree, inputs: Any) -> Program:
    """`predict` on arrays or shapes, differentiated by the parameters; the arguments are the leaves of both.

    Where it goes through complex numbers they are in real arithmetic.
    """
    varying = [True] * len(jax.tree.leaves(params)) + [False] * len(jax.tree.leaves(inputs))
    jaxpr = jax.make_jaxpr(predict)(params, inputs)
    if is_complex_program(jaxpr):
        jaxpr = jax.make_jaxpr(in_real_arithmetic(jaxpr))(*jax.tree.leaves((params, inputs)))
    return live_part(jaxpr, varying)


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
      constant: operands through which no derivative is to pass.
    """

    added: Mapping[Path, jax.Array] = dataclasses.field(default_factory=dict)
    given: Mapping[Path, jax.Array] = dataclasses.field(default_factory=dict)
    recorded: frozenset[Place] = frozenset()
    constant: frozenset[Place] = frozenset()

    def inside(self, index: int) -> Hooks:
        """What of it concerns the body of a step, or a branch of one."""

        def below(values: Mapping[Path, jax.Array]) -> dict[Path, jax.Array]:
            return {path[1:]: x for path, x in values.items() if path[0] == index and len(path) > 1}

        def within(places: frozenset[Place]) -> frozenset[Place]:
            return frozenset((path[1:], i) for path, i in places if path[0] == index and len(path) > 1)

        return Hooks(below(self.added), below(self.given), within(self.recorded), within(self.constant))


def replay(program: Program, arguments: Sequence[Any], hooks: Hooks) -> tuple[list[Any], Records]:
    """Evaluates a program: (results, recorded values)."""
    records: Records = {}

    def evaluated(index: int, step: Step, operands: list[Any]) -> list[Any]:
        path = (index,)
        records.update({(path, i): x for i, x in enumerate(operands) if (path, i) in hooks.recorded})
        operands = [jax.lax.stop_gradient(x) if (path, i) in hooks.constant else x for i, x in enumerate(operands)]
        if path in hooks.given:
            produced = [hooks.given[path]]
        elif step.primitive == COND:
            produced, inside = _replay_branches(step, operands, hooks.inside(index))
            records.update({((index, *inner), i): value for (inner, i), value in inside.items()})
        elif step.body is not None:
            produced, inside = _replay_body(step, step.body, operands, hooks.inside(index))
            records.update({((index, *inner), i): value for (inner, i), value in inside.items()})
        else:
            produced = bind(step.eqn, operands)
        if path in hooks.added:
            produced[0] = produced[0] + hooks.added[path]
        if (path, RESULT) in hooks.recorded:
            records[path, RESULT] = produced[0]
        return produced

    return evaluate(program, arguments, evaluated), records


def _replay_branches(step: Step, operands: Sequence[Any], hooks: Hooks) -> tuple[list[Any], Records]:
    """The branch that is taken; what others were to record is zero."""
    if not (hooks.added or hooks.given or hooks.recorded or hooks.constant):
        return bind(step.eqn, operands), {}
    which, *rest = operands

    def branch(index: int, body: Program) -> Callable[[list[Any]], tuple[list[Any], Records]]:
        def run(operands: list[Any]) -> tuple[list[Any], Records]:
            results, records = replay(body, operands, hooks.inside(index))
            return results, {((index, *path), i): value for (path, i), value in records.items()}

        return run

    runs = [branch(index, body) for index, body in enumerate(step.bodies)]
    like: Records = {}
    for run in runs:
        like |= jax.eval_shape(run, rest)[1]

    def filled(run: Callable[[list[Any]], tuple[list[Any], Records]]) -> Callable[..., tuple[list[Any], Records]]:
        def with_all(operands: list[Any]) -> tuple[list[Any], Records]:
            results, records = run(operands)
            return results, {place: records.get(place, jnp.zeros(x.shape, x.dtype)) for place, x in like.items()}

        return with_all

    return jax.lax.switch(which, [filled(run) for run in runs], rest)


def _replay_body(step: Step, body: Program, operands: Sequence[Any], hooks: Hooks) -> tuple[list[Any], Records]:
    params = step.eqn.params

    def run(operands: Sequence[Any], added: Any, given: Any) -> tuple[list[Any], Records]:
        return replay(body, operands, Hooks(added, given, hooks.recorded, hooks.constant))

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
