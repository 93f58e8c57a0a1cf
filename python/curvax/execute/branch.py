"""Work that only some steps need."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax

from curvax import tree
from curvax.loops import for_loop_body
from curvax.plan.assembly import PlanMode
from curvax.requirements import Cadence

T = TypeVar("T")


def when(
    cadence: Cadence,
    step: jax.Array,
    mode: PlanMode,
    work: Callable[[], T],
    otherwise: Callable[[], T],
    demanded: jax.Array | None = None,
) -> T:
    """`work()` at the steps that are due, and where it is `demanded`; `otherwise()` at the others.

    Planned, the work and everything it makes live inside a branch that other steps do not enter. With the plan off it
    runs in every step and its result is thrown away.
    """
    if cadence.never:
        return otherwise()
    if cadence.always:
        return work()
    due = cadence.due(step) if demanded is None else cadence.due(step) | demanded
    if mode is PlanMode.OFF:
        return tree.where(due, work(), otherwise())
    return jax.lax.cond(due, for_loop_body(work), otherwise)
