"""The step of the diagonal lane as one pass over the parameters, for the methods whose step is entrywise throughout."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.execute.context import Point, StepContext
from curvax.kernels.diagonal_update import DIAGONAL_UPDATE, UpdateScalars, diagonal_update
from curvax.plan import Entrywise
from curvax.solvers.diagonal import DiagonalState
from curvax.tree import PyTree


class EntrywiseResult(NamedTuple):
    """Parameters and next states of solver and transform, the old ones where the outcome is not `finite`."""

    params: PyTree
    solver: Any
    transform: Any
    finite: jax.Array


def update_in_one_pass(ctx: StepContext, point: Point, step: Entrywise) -> EntrywiseResult:
    """The step behind the refresh in one pass: nothing changes unless loss and new parameters are finite.

    In the order of the formula, entry by entry, with the mean m of the gradients and the diagonal h of `point`:
    m <- b1 m + (1 - b1) g, s = m / denominator(h), clip, weight decay, times the learning rate, parameters.
    """
    solver, scale = ctx.state.solver, point.preconditioner.scale
    dtype, finite_loss = tree.scalar_dtype(ctx.params), jnp.isfinite(point.at.loss)
    mean, count = (solver.mean, solver.count) if isinstance(solver, DiagonalState) else (None, None)
    rate, transform = step.transform.rate(ctx.state.transform, dtype)
    denominator = step.preconditioner.denominator
    fallback = denominator.fallback(scale)
    scalars = UpdateScalars(
        mean_correction=1.0 if count is None else step.solver.correction(count + 1, dtype),
        correction=step.preconditioner.correction(point.preconditioner.count),
        offset=denominator.offset(scale, point.lam.astype(scale.dtype)),
        fallback=jnp.where(fallback > 0, fallback, jnp.ones_like(fallback)),
        weight_decay=step.decay,
        rate=rate,
    )
    params, mean, finite = diagonal_update(
        step.rule,
        scalars,
        point.start.params,
        mean,
        point.preconditioner.average,
        point.gradient,
        sound=finite_loss & ~point.start.undone,
        decay_mask=step.transform.decays(ctx.params),
        implementation=ctx.choices[DIAGONAL_UPDATE.name],
    )
    if count is not None:
        solver = DiagonalState(mean, jnp.where(finite_loss, count + 1, count))
    return EntrywiseResult(params, solver, transform, finite)
