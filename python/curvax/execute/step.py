"""One step: linearize, refresh, solve, transform, search, outcome. The same for every lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import RatedUpdate
from curvax.curvature import Evaluation, Linearization, Needs
from curvax.damping import Outcome
from curvax.execute.branch import when
from curvax.execute.directions import Task, restarted, solve
from curvax.execute.entrywise import move
from curvax.execute.state import LastStep, MethodState
from curvax.kernels import Choice, batched_cholesky_solve, gram_accumulate, tree_cg
from curvax.kernels.diagonal_update import DIAGONAL_UPDATE
from curvax.loops import for_loop_body
from curvax.losses.rounding import loss_rounding
from curvax.plan import Assembly, Cadence, Entrywise, Plan, entrywise, flat_vectors, kernel_choices
from curvax.preconditioners import BlockPreconditioner, IdentityPreconditioner
from curvax.solvers import Lane, Solution, TreeSpace
from curvax.solvers.base import solved, unsolved
from curvax.telemetry import Metric
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Proposal:
    """What a step comes to.

    Attributes:
      params: trainable parameters after the step: the old ones if it was not taken, and those before the last step
        where that one is undone.
      update: the update that was applied, in the accumulation dtype; zero if the step was not taken.
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

    @property
    def curvature_batch(self) -> Evaluation:
        """The batch that the curvature is taken on."""
        return self.curvature_evaluation or self.evaluation


@dataclasses.dataclass(frozen=True)
class _Context:
    """Everything that is settled before a step begins.

    Attributes:
      assembly: the modules, with the implementations of their ops chosen.
      plan: the plan for these shapes.
      choices: implementation of each op.
      params: trainable parameters.
      problem: what the step works on.
      state: the state before the step.
    """

    assembly: Assembly
    plan: Plan
    choices: dict[str, Choice]
    params: PyTree
    problem: Problem
    state: MethodState

    @staticmethod
    def of(assembly: Assembly, plan: Plan, params: PyTree, problem: Problem, state: MethodState) -> _Context:
        """With the implementations of all ops chosen."""
        found = kernel_choices(assembly, plan, params, problem.curvature_batch)
        choices = {choice.op: choice for choice in found}
        chosen = dataclasses.replace(
            assembly,
            curvature=assembly.curvature.with_kernels(choices),
            preconditioner=assembly.preconditioner.with_kernels(choices),
        )
        return _Context(chosen, plan, choices, params, problem, state)


@dataclasses.dataclass(frozen=True)
class _Point:
    """What is known at the parameters of a step.

    Attributes:
      at, curved: linearizations on the batches of the gradient and of the curvature; one and the same if the batches
        are.
      gradient: upcast.
      lam: damping.
      preconditioner: its state, refreshed where that was due.
    """

    at: Linearization
    curved: Linearization
    gradient: PyTree
    lam: jax.Array
    preconditioner: Any

    @staticmethod
    def of(ctx: _Context) -> _Point:
        """Linearizes and refreshes."""
        at, curved = _linearize(ctx)
        given = ctx.problem.gradient
        lam = ctx.assembly.damping.lam(ctx.state.damping)
        gradient = at.gradient if given is None else tree.upcast(given)
        return _Point(at, curved, gradient, lam, _refresh(ctx, curved, lam))


def propose(assembly: Assembly, plan: Plan, params: PyTree, problem: Problem, state: MethodState) -> Proposal:
    """Runs the planned step at the trainable parameters `params`."""
    ctx = _Context.of(assembly, plan, params, problem, state)
    point = _Point.of(ctx)
    step = entrywise(ctx.assembly)
    if isinstance(step, Entrywise) and problem.gradient is None:
        return _in_one_pass(ctx, point, step)
    solution = _solve(ctx, point)
    upcast = tree.upcast(params)
    update, transform = ctx.assembly.transform.update(solution.value, state.transform, upcast)
    after = jax.tree.map(lambda p, w, u: (w + u.astype(w.dtype)).astype(p.dtype), params, upcast, update)
    demanded, norm = _demanded(ctx, update)
    outcome = _evaluate(ctx, point, solution, after, demanded, norm)
    due = Cadence(_periods(ctx.assembly)).due(state.step) | demanded
    seen = due & outcome.evaluated
    accepted = outcome.finite & (~seen | ctx.assembly.damping.accepts(outcome))
    undone = _undone(ctx, point)
    following = _following(
        ctx, point, outcome, accepted,
        damping=ctx.assembly.damping.update(state.damping, outcome, due),
        solver=_solver_state(ctx, solution, jnp.isfinite(point.at.loss), accepted),
        transform=_keep_if(accepted, transform, state.transform),
        last=_last_step(ctx, undone, accepted & ~seen),
    )  # fmt: skip
    info = _info(ctx, point, following, solution, update, outcome, accepted)
    kept, back = _where_not_taken(ctx, undone)
    applied = jax.tree.map(lambda u, b: jnp.where(accepted, u, b.astype(u.dtype)), update, back)
    return Proposal(tree.where(accepted, after, kept), applied, following, info)


def _in_one_pass(ctx: _Context, point: _Point, step: Entrywise) -> Proposal:
    """What `propose` does behind the refresh, for a step whose direction and update nobody else wants to see."""
    state, params, loss = ctx.state, ctx.params, point.at.loss
    moved = move(
        step, params, point.gradient, point.lam, jnp.isfinite(loss), point.preconditioner, state.solver,
        state.transform, ctx.choices[DIAGONAL_UPDATE.name],
    )  # fmt: skip
    missing = jnp.full_like(loss, jnp.nan)
    outcome = Outcome(moved.finite, jnp.asarray(False), loss, missing, missing)
    following = _following(
        ctx, point, outcome, moved.finite,
        damping=ctx.assembly.damping.update(state.damping, outcome, jnp.asarray(False)),
        solver=moved.solver,
        transform=_keep_if(moved.finite, moved.transform, state.transform),
        last=state.last,
    )  # fmt: skip
    # The direction is not at hand: telemetry that asks for it, or for the update, takes the other way.
    none = unsolved(moved.finite, point.lam.dtype)
    info = _info(ctx, point, following, none, None, outcome, moved.finite)
    update = jax.tree.map(lambda new, old: new.astype(old.dtype) - old, tree.upcast(moved.params), tree.upcast(params))
    return Proposal(moved.params, update, following, info)


def _following(
    ctx: _Context,
    point: _Point,
    outcome: Outcome,
    accepted: jax.Array,
    *,
    damping: Any,
    solver: Any,
    transform: Any,
    last: LastStep | None,
) -> MethodState:
    """The next state, from those of the modules."""
    state = ctx.state
    return MethodState(
        step=state.step + 1,
        rejected=state.rejected + (~accepted).astype(jnp.int32),
        damping=damping,
        preconditioner=point.preconditioner,  # keeps itself clean of refreshes that are not finite
        solver=solver,
        transform=transform,
        model_state=_keep_if(outcome.finite, point.at.model_state, state.model_state),
        last=last,
        layout=state.layout,
    )


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


def _linearize(ctx: _Context) -> tuple[Linearization, Linearization]:
    """(linearization of the gradient's batch, linearization of the curvature's batch); one if the batches are one."""
    curvature, problem, needs = ctx.assembly.curvature, ctx.problem, ctx.plan.needs
    own = problem.gradient is None
    if problem.curvature_evaluation is None:
        at = curvature.linearize(ctx.params, problem.evaluation, needs if own else _without_gradient(needs))
        return at, at
    at = curvature.linearize(ctx.params, problem.evaluation, Needs(gradient=own))
    curved = curvature.linearize(ctx.params, problem.curvature_evaluation, _without_gradient(needs))
    if at.batch_fault is not None and curved.batch_fault is not None:
        at = dataclasses.replace(at, batch_fault=jnp.maximum(at.batch_fault, curved.batch_fault))
    return at, curved


def _without_gradient(needs: Needs) -> Needs:
    return dataclasses.replace(needs, gradient=False)


def _refresh(ctx: _Context, curved: Linearization, lam: jax.Array) -> Any:
    plan, state, problem, preconditioner = ctx.plan, ctx.state, ctx.problem, ctx.assembly.preconditioner
    if plan.refresh.never:
        return state.preconditioner

    def refresh() -> Any:
        at = curved
        if plan.refresh_apart:
            at = ctx.assembly.curvature.linearize(ctx.params, problem.curvature_batch, plan.refresh_needs)
        if problem.key is None:
            raise ValueError(f"{type(preconditioner).__name__} draws at random: pass a random key to step.")
        if isinstance(preconditioner, BlockPreconditioner):
            return preconditioner.refresh(state.preconditioner, at, problem.key(), lam)
        return preconditioner.refresh(state.preconditioner, at, problem.key())

    return when(plan.refresh, state.step, plan.mode, refresh, lambda: state.preconditioner)


def _solve(ctx: _Context, point: _Point) -> Solution:
    plan, choices, problem, preconditioner = ctx.plan, ctx.choices, ctx.problem, ctx.assembly.preconditioner
    task = Task(
        at=point.curved,
        gradient=point.gradient,
        own_gradient=problem.curvature_evaluation is None and problem.gradient is None,
        lam=point.lam,
        precondition=None
        if isinstance(preconditioner, IdentityPreconditioner)
        else lambda v: preconditioner.apply(point.preconditioner, point.lam, v),
        space=TreeSpace(
            choices.get(tree_cg.DOTS.name), choices.get(tree_cg.CG_UPDATE.name), choices.get(tree_cg.CG_DIRECTION.name)
        ),
        raveled=flat_vectors(tuple(choices.values()), point.gradient) is not None,
        gram=choices.get(gram_accumulate.GRAM_ACCUMULATE.name),
        factorize=choices.get(batched_cholesky_solve.BATCHED_CHOLESKY_SOLVE.name),
    )
    own = ctx.state.solver if plan.solver_index is None else ctx.state.solver[plan.solver_index]
    return solve(plan.lane or Lane.PARAMETER, plan.solver, task, own)


def _solver_state(ctx: _Context, solution: Solution, sound: jax.Array, accepted: jax.Array) -> Any:
    plan, old = ctx.plan, ctx.state.solver
    following = restarted(plan.solver, solution.state, accepted)
    if plan.solver_index is not None:
        following = tuple(following if i == plan.solver_index else s for i, s in enumerate(old))
    return _keep_entries(sound, following, old)


def _demanded(ctx: _Context, update: PyTree) -> tuple[jax.Array, jax.Array]:
    """(whether the damping wants to see a step that is not due, the length of the update)."""
    if ctx.state.last is None:
        return jnp.asarray(False), jnp.zeros((), tree.scalar_dtype(ctx.params))
    norm = tree.norm(update)
    return ctx.assembly.damping.demands(ctx.state.damping, norm), norm


def _evaluate(
    ctx: _Context, point: _Point, solution: Solution, after: PyTree, demanded: jax.Array, norm: jax.Array
) -> Outcome:
    plan, loss = ctx.plan, point.at.loss
    missing = jnp.full_like(loss, jnp.nan)

    def predicted() -> tuple[jax.Array, jax.Array, jax.Array]:
        """(decrease predicted for what is really added to the parameters, curvature along it, rounding of the loss)."""
        product = point.curved.product
        if plan.predict_apart or product is None:
            needs = Needs(product=True, shared=plan.needs.shared)
            product = ctx.assembly.curvature.linearize(ctx.params, ctx.problem.curvature_batch, needs).product
        if product is None:
            raise AssertionError("a linearization asked for products has them.")
        moved = jax.tree.map(jnp.subtract, tree.upcast(after), tree.upcast(ctx.params))
        moved = jax.tree.map(lambda m, g: m.astype(g.dtype), moved, point.gradient)
        slope, bend, squared = (
            tree.vdot(point.gradient, moved),
            tree.vdot(moved, product(moved)),
            tree.vdot(moved, moved),
        )
        asked = None if ctx.assembly.damping.evaluate_every is None else point.at.rounding
        rounding = loss_rounding(loss) if asked is None else asked()
        return (
            -(slope + bend / 2).astype(missing.dtype),
            (jnp.abs(bend) / squared).astype(missing.dtype),
            rounding.astype(missing.dtype),
        )

    def loss_after() -> jax.Array:
        return ctx.assembly.curvature.value(after, ctx.problem.evaluation).astype(missing.dtype)

    step, mode = ctx.state.step, plan.mode
    unknown = missing, missing, missing
    decrease, curvature, rounding = when(plan.predict, step, mode, predicted, lambda: unknown, demanded)
    return Outcome(
        finite=tree.all_finite(after) & jnp.isfinite(loss),
        evaluated=(plan.evaluate.due(step) & plan.predict.due(step)) | demanded,
        loss=loss,
        loss_after=when(plan.evaluate, step, mode, loss_after, lambda: missing, demanded),
        predicted=decrease,
        rounding=rounding,
        curvature=curvature,
        norm=norm,
        solved=solved(solution.result),
    )


def _undone(ctx: _Context, point: _Point) -> jax.Array | None:
    """Whether the last step is to be undone; `None` for methods that see all of their steps, or none.

    A step that was taken unseen may have led to where the loss, or its gradient, is no finite number, and from there no
    step leads away. It is undone if the same batch is fine at the parameters before it; else the batch is at fault.
    """
    last = ctx.state.last
    if last is None:
        return None
    broken = ~(jnp.isfinite(point.at.loss) & tree.all_finite(point.gradient))

    def fine_before() -> jax.Array:
        return jnp.isfinite(ctx.assembly.curvature.value(last.before, ctx.problem.evaluation))

    return jax.lax.cond(last.unseen & broken, for_loop_body(fine_before), lambda: jnp.asarray(False))


def _last_step(ctx: _Context, undone: jax.Array | None, unseen: jax.Array) -> LastStep | None:
    last = ctx.state.last
    if last is None or undone is None:
        return None
    return LastStep(tree.where(undone, last.before, ctx.params), unseen)


def _where_not_taken(ctx: _Context, undone: jax.Array | None) -> tuple[PyTree, PyTree]:
    """(parameters if the step is not taken, what that adds to them): the old ones, or those before an undone step."""
    last, params = ctx.state.last, ctx.params
    if last is None or undone is None:
        return params, tree.zeros_like(params)
    kept = tree.where(undone, last.before, params)
    return kept, jax.tree.map(jnp.subtract, tree.upcast(kept), tree.upcast(params))


def _info(
    ctx: _Context,
    point: _Point,
    following: MethodState,
    solution: Solution,
    update: PyTree | None,
    outcome: Outcome,
    accepted: jax.Array,
) -> dict[str, Any]:
    """The chosen metrics; `update` is `None` where neither it nor the direction is at hand."""
    values = {
        Metric.STEP: ctx.state.step,
        Metric.LOSS: point.at.loss,
        Metric.LAM: point.lam,
        Metric.ACCEPTED: accepted,
        Metric.FINITE: outcome.finite,
        Metric.REJECTED: following.rejected,
        Metric.BATCH_FAULT: jnp.int32(0) if point.at.batch_fault is None else point.at.batch_fault,
        Metric.RESULT: solution.result,
        Metric.ITERATIONS: solution.iterations,
        Metric.RESIDUAL: solution.residual,
        Metric.LOSS_AFTER: outcome.loss_after,
        Metric.PREDICTED: outcome.predicted,
        Metric.ACTUAL: outcome.actual,
        Metric.RHO: outcome.rho,
        Metric.GRADIENT_NORM: tree.norm(point.gradient),
        Metric.LEARNING_RATE: _learning_rate(ctx),
        Metric.REFRESHES_REJECTED: getattr(point.preconditioner, "rejected", Metric.REFRESHES_REJECTED.missing()),
    }
    if update is not None:
        values |= {Metric.DIRECTION_NORM: tree.norm(solution.value), Metric.UPDATE_NORM: optax.tree.norm(update)}
    info: dict[str, Any] = dict(ctx.assembly.reported.collect(ctx.state.step, values))
    if point.at.aux is not None:
        info["aux"] = point.at.aux
    return info


def _learning_rate(ctx: _Context) -> jax.Array:
    transform = ctx.assembly.transform
    if not isinstance(transform, RatedUpdate):
        return Metric.LEARNING_RATE.missing()
    return -transform.rate(ctx.state.transform, tree.scalar_dtype(ctx.params))[0]
