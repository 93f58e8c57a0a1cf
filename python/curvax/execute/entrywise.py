"""The step of the diagonal lane as one pass over the parameters, for the methods whose step is entrywise throughout."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels._dispatch import Choice
from curvax.kernels.diagonal_update import UpdateScalars, diagonal_update
from curvax.plan.entrywise import Entrywise
from curvax.preconditioners.ema_diagonal import EmaDiagonalState
from curvax.solvers.diagonal import DiagonalState
from curvax.tree import PyTree


class Move(NamedTuple):
    """Where a step has led: parameters, next states of solver and transform, and whether it was taken."""

    params: PyTree
    solver: Any
    transform: Any
    finite: jax.Array


def move(
    step: Entrywise,
    params: PyTree,
    gradient: PyTree,
    lam: jax.Array,
    sound: jax.Array,
    diagonal: EmaDiagonalState,
    solver: DiagonalState | tuple[()],
    transform: Any,
    choice: Choice,
) -> Move:
    """Mean, denominator, clip, weight decay, learning rate and parameters; nothing moves unless the outcome is finite.

    Args:
      step: the modules.
      params: trainable parameters.
      gradient: upcast.
      lam: damping.
      sound: whether the step may be taken at all.
      diagonal, solver, transform: states of the modules; the first is already refreshed.
      choice: of the op's implementation.
    """
    dtype = tree.scalar_dtype(params)
    mean, count = (solver.mean, solver.count) if isinstance(solver, DiagonalState) else (None, None)
    rate, following = step.transform.rate(transform, dtype)
    scale, denominator = diagonal.scale, step.preconditioner.denominator
    fallback = denominator.fallback(scale)
    scalars = UpdateScalars(
        mean_correction=1.0 if count is None else step.solver.correction(count + 1, dtype),
        correction=step.preconditioner.correction(diagonal.count),
        offset=denominator.offset(scale, lam.astype(scale.dtype)),
        fallback=jnp.where(fallback > 0, fallback, jnp.ones_like(fallback)),
        weight_decay=step.decay,
        rate=rate,
    )
    new, mean, finite = diagonal_update(
        step.rule,
        scalars,
        params,
        mean,
        diagonal.average,
        gradient,
        sound=sound,
        decay_mask=step.transform.decays(params),
        implementation=choice,
    )
    if count is not None:
        solver = DiagonalState(mean, jnp.where(sound, count + 1, count))
    return Move(new, solver, following, finite)
