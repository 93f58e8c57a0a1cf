"""Which diagonal methods do their whole step, from gradient to parameters, in one pass: `diagonal_update`."""

from __future__ import annotations

import dataclasses
import math

import jax

from curvax.chain import EntrywiseUpdate, entrywise_update
from curvax.kernels.diagonal_update import UpdateRule
from curvax.numbers import is_known
from curvax.plan.assembly import Assembly
from curvax.preconditioners import EntrywiseInverse
from curvax.solvers import EntrywiseMean
from curvax.telemetry import Metric


@dataclasses.dataclass(frozen=True)
class Entrywise:
    """A step that is entrywise throughout: what its modules say of themselves, its weight decay and its rule."""

    solver: EntrywiseMean
    preconditioner: EntrywiseInverse
    transform: EntrywiseUpdate
    decay: jax.Array | float
    rule: UpdateRule


def entrywise(assembly: Assembly) -> Entrywise | str:
    """The step as one pass, or the reason why its parts must run one after another."""
    solver, preconditioner = assembly.solver.entrywise, assembly.preconditioner.entrywise
    if solver is None:
        return "the direction is not that of the diagonal lane"
    denominator = None if preconditioner is None else preconditioner.denominator.rule
    if preconditioner is None or denominator is None:
        return "the preconditioner is none that diagonal_update knows"
    transform = entrywise_update(assembly.transform)
    if transform is None:
        return "the transform is a chain of its own, or clips by norm or keeps momentum"
    if assembly.step_bound is not None or assembly.search is not None:
        return "step bound and search look at the whole update"
    decay = transform.constant_decay
    if decay is None:
        return "weight decay is a schedule"
    if assembly.damping.evaluate_every is not None:
        return "the damping may reject the step after looking at its loss"
    wanted = [r.metric for r in assembly.telemetry.records if r.metric in _NEEDS_PARTS]
    if wanted:
        return f"{wanted[0].value} is recorded, which the step in one pass does not show"
    clip = math.inf if transform.clip_value is None else transform.clip_value
    if not is_known(solver.beta1):
        return "beta1 is traced"
    return Entrywise(solver, preconditioner, transform, decay, UpdateRule(denominator, float(solver.beta1), clip))


_NEEDS_PARTS = frozenset(m for m in Metric if m.evaluates or m.predicts) | {Metric.DIRECTION_NORM, Metric.UPDATE_NORM}
