"""One step: linearize, refresh, solve, transform, search, outcome. The same for every lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.curvature import Evaluation, Linearization, Needs
from curvax.damping import Outcome
from curvax.execute.branch import when
from curvax.execute.directions import Task, restarted, solve
from curvax.execute.entrywise import move
from curvax.execute.state import MethodState
from curvax.kernels import Choice, batched_cholesky_solve, gram_accumulate, tree_cg
from curvax.kernels.diagonal_update import DIAGONAL_UPDATE
from curvax.plan import Assembly, Cadence, Entrywise, Plan, entrywise, flat_vectors, kernel_choices
from curvax.preconditioners import BlockPreconditioner, Identity
from curvax.solvers import Lane, Result, Solution, TreeSpace
from curvax.solvers.base import code
from curvax.telemetry import Metric
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a step comes to.

    Attributes:
      params: trainable parameters after the step: the old ones if it was not taken.
      update: the update that was applied, wide; zero if the step was not taken.
      state: the next state.
      info: the chosen metrics, and "aux" if the model returns one.
    """

    params: PyTree
    update: PyTree
    state: MethodState
    info: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Problem:
    """What a step works on.

    Attributes:
      evaluation: the batch of gradient and loss, with everything the model needs.
      curvature_evaluation: the batch of the curvature, or `None` for the same one.
      gradient: a gradient from outside, or `None` to take the batch's own.
      key: makes the random key of this step's estimators; `None` where there is no randomness.
    """

    evaluation: Evaluation
    curvature_evaluation: Evaluation | None = None
    gradient: PyTree | None = None
    key: Callable[[], jax.Array] | None = None


def propose(assembly: Assembly, plan: Plan, params: PyTree, problem: Problem, state: MethodState) -> Proposal:
    """Runs the planned step at the trainable parameters `params`."""
    choices = kernel_choices(assembly, plan, params, _curvature_batch(problem))
    chosen = {choice.op: choice for choice in choices}
    assembly = dataclasses.replace(
        assembly,
        curvature=assembly.curvature.with_kernels(chosen),
        preconditioner=assembly.preconditioner.with_kernels(chosen),
    )
    at, curved = _linearize(assembly, plan, params, problem)
    gradient = at.gradient if problem.gradient is None else tree.widen(problem.gradient)
    lam = assembly.damping.lam(state.damping)
    preconditioner = _refresh(assembly, plan, params, problem, curved, lam, state)
    step = entrywise(assembly)
    if isinstance(step, Entrywise) and problem.gradient is None:
        choice = chosen[DIAGONAL_UPDATE.name]
        return _in_one_pass(assembly, step, params, at, gradient, lam, preconditioner, state, choice)
    solution = _solve(assembly, plan, choices, problem, curved, gradient, lam, preconditioner, state)
    wide = tree.widen(params)
    update, transform = assembly.transform.update(solution.value, state.transform, wide)
    after = jax.tree.map(lambda p, w, u: (w + u.astype(w.dtype)).astype(p.dtype), params, wide, update)
    outcome = _evaluate(assembly, plan, params, after, problem, at, curved, gradient, update, state.step)
    due = Cadence(_periods(assembly)).due(state.step)
    accepted = outcome.finite & (~(due & outcome.evaluated) | assembly.damping.accepts(outcome))
    following = MethodState(
        step=state.step + 1,
        rejected=state.rejected + (~accepted).astype(jnp.int32),
        damping=assembly.damping.update(state.damping, outcome, due),
        preconditioner=preconditioner,  # keeps itself clean of refreshes that are not finite
        solver=_solver_state(plan, state.solver, solution, jnp.isfinite(at.loss), accepted),
        transform=_keep_if(accepted, transform, state.transform),
        model_state=_keep_if(outcome.finite, at.model_state, state.model_state),
        layout=state.layout,
    )
    info = _info(assembly, state, following, at, solution, gradient, update, lam, outcome, accepted)
    applied = jax.tree.map(lambda u: jnp.where(accepted, u, jnp.zeros_like(u)), update)
    return Proposal(tree.where(accepted, after, params), applied, following, info)


def _in_one_pass(
    assembly: Assembly,
    step: Entrywise,
    params: PyTree,
    at: Linearization,
    gradient: PyTree,
    lam: jax.Array,
    preconditioner: Any,
    state: MethodState,
    choice: Choice,
) -> Proposal:
    """What `propose` does behind the refresh, for a step whose direction and update nobody else wants to see."""
    sound = jnp.isfinite(at.loss)
    moved = move(step, params, gradient, lam, sound, preconditioner, state.solver, state.transform, choice)
    missing = jnp.full_like(at.loss, jnp.nan)
    outcome = Outcome(moved.finite, jnp.asarray(False), at.loss, missing, missing)
    following = MethodState(
        step=state.step + 1,
        rejected=state.rejected + (~moved.finite).astype(jnp.int32),
        damping=assembly.damping.update(state.damping, outcome, jnp.asarray(False)),
        preconditioner=preconditioner,
        solver=moved.solver,
        transform=_keep_if(moved.finite, moved.transform, state.transform),
        model_state=_keep_if(moved.finite, at.model_state, state.model_state),
        layout=state.layout,
    )
    # The direction is not at hand: telemetry that asks for it, or for the update, takes the other way.
    none = Solution(None, code(Result.CONVERGED), jnp.zeros((), jnp.int32), jnp.zeros((), lam.dtype), None)
    info = _info(assembly, state, following, at, none, gradient, None, lam, outcome, moved.finite)
    update = jax.tree.map(lambda new, old: new.astype(old.dtype) - old, tree.widen(moved.params), tree.widen(params))
    return Proposal(moved.params, update, following, info)


def _keep_if(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b.astype(a.dtype)), new, old)


def _keep_entries(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Like `_keep_if`, and entries that are not finite stay too.

    The loss is at hand before the vectors are, so this fuses into the pass that makes them; whether all of the step is
    finite is known only after another pass over the parameters.
    """

    def keep(a: jax.Array, b: jax.Array) -> jax.Array:
        sound = condition & jnp.isfinite(a) if jnp.issubdtype(a.dtype, jnp.inexact) else condition
        return jnp.where(sound, a, b.astype(a.dtype))

    return jax.tree.map(keep, new, old)


def _periods(assembly: Assembly) -> tuple[int, ...]:
    every = assembly.damping.evaluate_every
    return () if every is None else (every,)


def _linearize(assembly: Assembly, plan: Plan, params: PyTree, problem: Problem) -> tuple[Linearization, Linearization]:
    """(linearization of the gradient's batch, linearization of the curvature's batch); one if the batches are one."""
    curvature, apart = assembly.curvature, problem.curvature_evaluation
    if apart is None:
        needs = plan.needs if problem.gradient is None else dataclasses.replace(plan.needs, gradient=False)
        at = curvature.linearize(params, problem.evaluation, needs)
        return at, at
    at = curvature.linearize(params, problem.evaluation, Needs(gradient=problem.gradient is None))
    curved = curvature.linearize(params, apart, dataclasses.replace(plan.needs, gradient=False))
    if at.batch_fault is not None and curved.batch_fault is not None:
        at = dataclasses.replace(at, batch_fault=jnp.maximum(at.batch_fault, curved.batch_fault))
    return at, curved


def _curvature_batch(problem: Problem) -> Evaluation:
    return problem.curvature_evaluation or problem.evaluation


def _refresh(
    assembly: Assembly,
    plan: Plan,
    params: PyTree,
    problem: Problem,
    curved: Linearization,
    lam: jax.Array,
    state: MethodState,
) -> Any:
    if plan.refresh.never:
        return state.preconditioner

    def refresh() -> Any:
        at = curved
        if plan.refresh_apart:
            at = assembly.curvature.linearize(params, _curvature_batch(problem), plan.refresh_needs)
        if problem.key is None:
            raise ValueError(f"{type(assembly.preconditioner).__name__} draws at random: pass a random key to step.")
        preconditioner = assembly.preconditioner
        if isinstance(preconditioner, BlockPreconditioner):
            return preconditioner.refresh(state.preconditioner, at, problem.key(), lam)
        return preconditioner.refresh(state.preconditioner, at, problem.key())

    return when(plan.refresh, state.step, plan.mode, refresh, lambda: state.preconditioner)


def _solve(
    assembly: Assembly,
    plan: Plan,
    choices: tuple[Choice, ...],
    problem: Problem,
    curved: Linearization,
    gradient: PyTree,
    lam: jax.Array,
    preconditioner: Any,
    state: MethodState,
) -> Solution:
    chosen = {choice.op: choice for choice in choices}
    task = Task(
        at=curved,
        gradient=gradient,
        own_gradient=problem.curvature_evaluation is None and problem.gradient is None,
        lam=lam,
        precondition=None
        if isinstance(assembly.preconditioner, Identity)
        else lambda v: assembly.preconditioner.apply(preconditioner, lam, v),
        space=TreeSpace(
            chosen.get(tree_cg.DOTS.name), chosen.get(tree_cg.CG_UPDATE.name), chosen.get(tree_cg.CG_DIRECTION.name)
        ),
        raveled=flat_vectors(choices, gradient) is not None,
        gram=chosen.get(gram_accumulate.GRAM_ACCUMULATE.name),
        factorise=chosen.get(batched_cholesky_solve.BATCHED_CHOLESKY_SOLVE.name),
    )
    own = state.solver if plan.solver_index is None else state.solver[plan.solver_index]
    return solve(plan.lane or Lane.PARAMETER, plan.solver, task, own)


def _solver_state(plan: Plan, old: Any, solution: Solution, sound: jax.Array, accepted: jax.Array) -> Any:
    following = restarted(plan.solver, solution.state, accepted)
    if plan.solver_index is not None:
        following = tuple(following if i == plan.solver_index else s for i, s in enumerate(old))
    return _keep_entries(sound, following, old)


def _evaluate(
    assembly: Assembly,
    plan: Plan,
    params: PyTree,
    after: PyTree,
    problem: Problem,
    at: Linearization,
    curved: Linearization,
    gradient: PyTree,
    update: PyTree,
    step: jax.Array,
) -> Outcome:
    missing = jnp.full_like(at.loss, jnp.nan)

    def predicted() -> jax.Array:
        product = curved.product
        if plan.predict_apart or product is None:
            needs = Needs(product=True, shared=plan.needs.shared)
            product = assembly.curvature.linearize(params, _curvature_batch(problem), needs).product
        if product is None:
            raise AssertionError("a linearization asked for products has them.")
        wide = jax.tree.map(lambda u, g: u.astype(g.dtype), update, gradient)
        slope, bend = tree.vdot(gradient, wide), tree.vdot(wide, product(wide))
        return -(slope + bend / 2).astype(missing.dtype)

    def loss_after() -> jax.Array:
        return assembly.curvature.value(after, problem.evaluation).astype(missing.dtype)

    finite = tree.all_finite(after) & jnp.isfinite(at.loss)
    return Outcome(
        finite=finite,
        evaluated=plan.evaluate.due(step) & plan.predict.due(step),
        loss=at.loss,
        loss_after=when(plan.evaluate, step, plan.mode, loss_after, lambda: missing),
        predicted=when(plan.predict, step, plan.mode, predicted, lambda: missing),
    )


def _info(
    assembly: Assembly,
    state: MethodState,
    following: MethodState,
    at: Linearization,
    solution: Solution,
    gradient: PyTree,
    update: PyTree | None,
    lam: jax.Array,
    outcome: Outcome,
    accepted: jax.Array,
) -> dict[str, Any]:
    """The chosen metrics; `update` is `None` where neither it nor the direction is at hand."""
    values = {
        Metric.STEP: state.step,
        Metric.LOSS: at.loss,
        Metric.LAM: lam,
        Metric.ACCEPTED: accepted,
        Metric.FINITE: outcome.finite,
        Metric.REJECTED: following.rejected,
        Metric.BATCH_FAULT: jnp.zeros((), jnp.int32) if at.batch_fault is None else at.batch_fault,
        Metric.RESULT: solution.result,
        Metric.ITERATIONS: solution.iterations,
        Metric.RESIDUAL: solution.residual,
        Metric.LOSS_AFTER: outcome.loss_after,
        Metric.PREDICTED: outcome.predicted,
        Metric.ACTUAL: outcome.actual,
        Metric.RHO: outcome.rho,
        Metric.GRADIENT_NORM: tree.norm(gradient),
    }
    if update is not None:
        values |= {Metric.DIRECTION_NORM: tree.norm(solution.value), Metric.UPDATE_NORM: optax.tree.norm(update)}
    info: dict[str, Any] = dict(assembly.telemetry.collect(state.step, values))
    if at.aux is not None:
        info["aux"] = at.aux
    return info
