"""One step: linearize, refresh, solve, transform, evaluate, accept. The same for every lane.

    linearize    loss, gradient and curvature products at the parameters        -> Point
    refresh      preconditioner, where its cadence says so                      -> Point
    solve        (C + lam I) s = g in the plan's lane                           -> Solution
    transform    the Optax chain makes an update of s
    length       a bound and a search say how much of it to take                -> Length
    evaluate     loss behind the step and the model's prediction, where due     -> Outcome
    accept       is it finite, does the damping take it                         -> Attempt
    bookkeeping  next state and info                                            -> Proposal

Methods whose step is entrywise from gradient to parameters (Sophia, AdaHessian) do what lies between refresh and
bookkeeping in one pass over the parameters. The next state is made in one place, whichever way the step went.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.chain import RatedUpdate
from curvax.curvature import Linearization, Needs
from curvax.damping import Outcome
from curvax.execute.branch import when
from curvax.execute.context import Attempt, Point, Proposal, StepContext
from curvax.execute.directions import Task, over, solve, solve_scaled, with_residual
from curvax.execute.entrywise import update_in_one_pass
from curvax.execute.sharpness import sharpness_of
from curvax.execute.state import MethodState
from curvax.execute.step_size import Length, bounded_update, length_of, moved, rounding_of
from curvax.execute.undo import judged
from curvax.kernels import tree_cg
from curvax.plan import Assembly, Cadence, Entrywise, entrywise, flat_vectors
from curvax.preconditioners import BlockPreconditioner
from curvax.solvers import Lane, Solution, TreeSpace
from curvax.solvers.base import bounded, solved, unsolved
from curvax.telemetry import Metric
from curvax.tree import PyTree


def propose(ctx: StepContext) -> Proposal[MethodState]:
    """Runs the planned step."""
    # 1. What is known at the parameters.
    point = _point(ctx)
    # 2. Direction, update, and whether it is taken.
    step = entrywise(ctx.assembly)
    if isinstance(step, Entrywise) and ctx.problem.gradient is None:
        attempt = _attempt_in_one_pass(ctx, point, step)
    else:
        attempt = _attempt(ctx, point)
    # 3. Bookkeeping.
    state = _next_state(ctx, point, attempt)
    return Proposal(attempt.params, attempt.applied, state, _info(ctx, point, attempt, state.rejected))


def _point(ctx: StepContext) -> Point:
    """Linearizes and refreshes."""
    at, curved = _linearize(ctx)
    given = ctx.problem.gradient
    gradient = at.gradient if given is None else tree.upcast(given)
    scaling, root = _scaling(ctx, curved)
    damping = ctx.assembly.damping
    started = damping.start(ctx.state.damping, at.loss, lambda: tree.norm(over(root, gradient)))
    lam = damping.lam(started)
    start = judged(ctx, at, gradient)
    return Point(at, curved, gradient, lam, started, scaling, root, _refresh(ctx, curved, lam), start)


def _scaling(ctx: StepContext, curved: Linearization) -> tuple[Any, PyTree | None]:
    """(state of the damping's scaling, D^(1/2))."""
    scaling, state = ctx.assembly.scaling, ctx.state.scaling
    if scaling is None:
        return state, None
    cadence = Cadence((scaling.every,))
    state = when(cadence, ctx.state.step, ctx.plan.mode, lambda: scaling.refresh(state, curved), lambda: state)
    return state, scaling.root(state)


def _attempt(ctx: StepContext, point: Point) -> Attempt:
    """Solve, transform, evaluate, accept: one after another."""
    state, damping = ctx.state, ctx.assembly.damping
    # 1. The direction s, and the update that the Optax chain makes of it.
    point, solution, behind = _direction(ctx, point)
    update, transform = _updated(ctx, point, solution.value)
    # 2. How much of it, as far as a search says.
    length = length_of(ctx, point, update)
    update, after = length.update, moved(ctx.params, length.update)
    # 3. Loss and prediction there, at their cadence or where the damping wants to see this step.
    demanded, norm = _demanded(ctx, point, update)
    outcome = _evaluate(ctx, point, (solution, length), after, demanded, norm)
    if behind is not None and length.searched is None:
        outcome = dataclasses.replace(outcome, loss_after=jnp.where(outcome.evaluated, behind, outcome.loss_after))
    # 4. Taken, if it is finite and, where the damping looks, good enough.
    due = Cadence(_periods(ctx.assembly)).due(state.step) | demanded
    seen = due & outcome.evaluated
    start = point.start
    accepted = outcome.finite & length.descends & ~start.undone & (~seen | damping.accepts(outcome))
    policy = damping.update(point.damping, outcome, due)
    # 5. If it is not taken: keep the old parameters, or go back one more step if the last step is to be undone.
    back = jax.tree.map(jnp.subtract, tree.upcast(start.params), tree.upcast(ctx.params))
    return Attempt(
        params=tree.where(accepted, after, start.params),
        applied=jax.tree.map(lambda u, b: jnp.where(accepted, u, b.astype(u.dtype)), update, back),
        proposed=update,
        lam=point.lam,
        solution=solution,
        outcome=outcome,
        accepted=accepted,
        damping=policy,
        solver=_solver_state(ctx, solution, jnp.isfinite(point.at.loss), (accepted, damping.trusts(policy))),
        transform=_keep_if(accepted, transform, state.transform),
        search=length.state,
        last=start.last(accepted & ~seen & (length.after is None)),
        length=length.searched,
    )


def _updated(ctx: StepContext, point: Point, s: PyTree) -> tuple[PyTree, PyTree]:
    """(update that the Optax chain makes of a direction, within the step bound; the chain's next state)."""
    update, transform = ctx.assembly.transform.update(
        s, ctx.state.transform, tree.upcast(ctx.params),
        value=point.at.loss, grad=point.gradient, value_fn=_loss_of(ctx),
    )  # fmt: skip
    return bounded_update(ctx, point, update), transform


def _direction(ctx: StepContext, point: Point) -> tuple[Point, Solution, jax.Array | None]:
    """(the point with the lam of this step, the direction, the loss behind it where several lam were tried)."""
    damping, plan = ctx.assembly.damping, ctx.plan
    if plan.factors == (1.0,):
        return point, _solve(ctx, point), None
    # 1. All directions by one factorization, or in one Krylov space.
    lams = damping.lams(point.damping, plan.factors)
    several = _solve(ctx, dataclasses.replace(point, lam=lams))
    # 2. The losses behind them in one batched forward pass.
    losses = jax.vmap(lambda s: _loss_of(ctx)(moved(ctx.params, _updated(ctx, point, s)[0])))(several.value)
    # 3. The best of them.
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.full_like(losses, jnp.inf)))
    taken = jax.tree.map(lambda x: x[best], dataclasses.replace(several, state=()))
    solution = dataclasses.replace(taken, state=several.state)
    chosen = dataclasses.replace(point, lam=lams[best], damping=damping.chosen(point.damping, lams[best]))
    solution = with_residual(plan.solver, _task(ctx, chosen), solution, point.root)
    return chosen, solution, losses[best].astype(point.at.loss.dtype)


def _loss_of(ctx: StepContext) -> Callable[[PyTree], jax.Array]:
    """params -> loss of the step's batch, for transforms that search along the direction (Optax's line searches)."""

    def loss(params: PyTree) -> jax.Array:
        cast = jax.tree.map(lambda new, old: new.astype(old.dtype), params, ctx.params)
        return ctx.assembly.curvature.value(cast, ctx.problem.evaluation)

    return loss


def _attempt_in_one_pass(ctx: StepContext, point: Point, step: Entrywise) -> Attempt:
    """The same for a step whose direction and update nobody else wants to see."""
    state, loss = ctx.state, point.at.loss
    new = update_in_one_pass(ctx, point, step)
    missing, never = jnp.full_like(loss, jnp.nan), jnp.asarray(False)
    outcome = Outcome(new.finite, never, loss, missing, missing)
    old = tree.upcast(ctx.params)
    return Attempt(
        params=new.params,
        applied=jax.tree.map(lambda a, b: a.astype(b.dtype) - b, tree.upcast(new.params), old),
        proposed=None,
        lam=point.lam,
        solution=unsolved(new.finite, point.lam.dtype),
        outcome=outcome,
        accepted=new.finite,
        damping=ctx.assembly.damping.update(point.damping, outcome, never),
        solver=new.solver,
        transform=_keep_if(new.finite, new.transform, state.transform),
        search=state.search,
        last=point.start.last(new.finite),
        length=None,
    )


def _next_state(ctx: StepContext, point: Point, attempt: Attempt) -> MethodState:
    state = ctx.state
    return dataclasses.replace(
        state,
        step=state.step + 1,
        rejected=state.rejected + (~attempt.accepted).astype(jnp.int32),
        damping=attempt.damping,
        preconditioner=point.preconditioner,  # keeps itself clean of refreshes that are not finite
        solver=attempt.solver,
        transform=attempt.transform,
        scaling=point.scaling,
        search=attempt.search,
        model_state=_keep_if(attempt.outcome.finite, point.at.model_state, state.model_state),
        last=attempt.last,
    )


def _keep_if(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b.astype(a.dtype)), new, old)


def _keep_entries(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Like `_keep_if`, and entries that are not finite stay too.

    The loss is at hand before the vectors are, so this fuses into the pass that makes them; whether all of the step is
    finite is known only after another pass over the parameters.
    """

    def keep(a: jax.Array, b: jax.Array) -> jax.Array:
        new_entry = condition & jnp.isfinite(a) if jnp.issubdtype(a.dtype, jnp.inexact) else condition
        return jnp.where(new_entry, a, b.astype(a.dtype))

    return jax.tree.map(keep, new, old)


def _periods(assembly: Assembly) -> tuple[int, ...]:
    every = assembly.damping.evaluate_every
    return () if every is None else (every,)


def _linearize(ctx: StepContext) -> tuple[Linearization, Linearization]:
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


def _refresh(ctx: StepContext, curved: Linearization, lam: jax.Array) -> Any:
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


def _task(ctx: StepContext, point: Point) -> Task:
    choices, problem, preconditioner = ctx.choices, ctx.problem, ctx.assembly.preconditioner
    return Task(
        at=point.curved,
        gradient=point.gradient,
        own_gradient=problem.curvature_evaluation is None and problem.gradient is None,
        lam=point.lam,
        radius=ctx.assembly.damping.radius(point.damping),
        precondition=None
        if preconditioner.is_identity
        else lambda v: preconditioner.apply(point.preconditioner, point.lam, v),
        space=TreeSpace(
            choices.get(tree_cg.DOTS.name), choices.get(tree_cg.CG_UPDATE.name), choices.get(tree_cg.CG_DIRECTION.name)
        ),
        raveled=flat_vectors(tuple(choices.values()), point.gradient) is not None,
        choices=choices,
        acceleration=ctx.assembly.acceleration,
    )


def _solve(ctx: StepContext, point: Point) -> Solution:
    plan, task = ctx.plan, _task(ctx, point)
    own = ctx.state.solver if plan.solver_index is None else ctx.state.solver[plan.solver_index]
    if point.root is None:
        return solve(plan.lane or Lane.PARAMETER, plan.solver, task, own)
    return solve_scaled(point.root, lambda scaled: solve(plan.lane or Lane.PARAMETER, plan.solver, scaled, own), task)


def _solver_state(ctx: StepContext, solution: Solution, finite: jax.Array, verdict: tuple[jax.Array, jax.Array]) -> Any:
    """The next state; `verdict` is whether the step was accepted and whether momentum can be trusted."""
    plan, old = ctx.plan, ctx.state.solver
    new = plan.solver.restarted(solution.state, *verdict)
    if plan.solver_index is not None:
        new = tuple(new if i == plan.solver_index else s for i, s in enumerate(old))
    return _keep_entries(finite, new, old)


def _demanded(ctx: StepContext, point: Point, update: PyTree) -> tuple[jax.Array, jax.Array]:
    """(whether the damping wants to see a step that is not due, the length of the update)."""
    if ctx.assembly.damping.evaluate_every in (None, 1):
        return jnp.asarray(False), jnp.zeros((), tree.scalar_dtype(ctx.params))
    norm = tree.norm(update)
    return ctx.assembly.damping.demands(point.damping, norm), norm


def _evaluate(
    ctx: StepContext, point: Point, made: tuple[Solution, Length], after: PyTree, demanded: jax.Array, norm: jax.Array
) -> Outcome:
    plan, loss, (solution, length) = ctx.plan, point.at.loss, made
    missing = jnp.full_like(loss, jnp.nan)

    def predicted() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(decrease predicted for what is really added to the parameters, curvature along it, its square, rounding)."""
        curved = point.curved
        if plan.predict_apart or curved.product is None:
            needs = Needs(product=True, shared=plan.needs.shared)
            curved = ctx.assembly.curvature.linearize(ctx.params, ctx.problem.curvature_batch, needs)
        change = jax.tree.map(jnp.subtract, tree.upcast(after), tree.upcast(ctx.params))
        change = jax.tree.map(lambda c, g: c.astype(g.dtype), change, point.gradient)
        slope, bend = tree.vdot(point.gradient, change), curved.bend(change)
        scaled = change if point.root is None else jax.tree.map(jnp.multiply, change, point.root)
        squared = tree.vdot(scaled, scaled)
        return (
            -(slope + bend / 2).astype(missing.dtype),
            (jnp.abs(bend) / squared).astype(missing.dtype),
            squared.astype(missing.dtype),
            rounding_of(ctx, point).astype(missing.dtype),
        )

    def loss_after() -> jax.Array:
        if length.after is not None:
            return length.after.astype(missing.dtype)
        return ctx.assembly.curvature.value(after, ctx.problem.evaluation).astype(missing.dtype)

    step, mode = ctx.state.step, plan.mode
    unknown = missing, missing, missing, missing
    decrease, curvature, squared, rounding = when(plan.predict, step, mode, predicted, lambda: unknown, demanded)
    behind = when(plan.evaluate, step, mode, loss_after, lambda: missing, demanded)
    return Outcome(
        finite=tree.all_finite(after) & jnp.isfinite(loss),
        evaluated=(plan.evaluate.due(step) & plan.predict.due(step)) | demanded,
        loss=loss,
        # Where no parameter changes, neither does the loss, whatever two programs make of it.
        loss_after=jnp.where(squared == 0, loss, behind),
        predicted=decrease,
        rounding=rounding,
        curvature=curvature,
        shown=curvature + 2 * (decrease - (loss - behind)) / squared,
        norm=norm,
        descends=length.descends,
        step_size=1.0 if length.searched is None else length.searched.step_size,
        shortened=_shortened(ctx, length),
        solved=solved(solution.result),
        at_boundary=bounded(solution.result),
    )


def _shortened(ctx: StepContext, length: Length) -> bool | jax.Array:
    """Whether the search took less than the full step because that would not do."""
    search = ctx.assembly.search
    if search is None or length.searched is None or not search.takes_first:
        return False
    return length.descends & (length.searched.step_size < 1)


def _info(ctx: StepContext, point: Point, attempt: Attempt, rejected: jax.Array) -> dict[str, Any]:
    """The chosen metrics."""
    solution, outcome, update = attempt.solution, attempt.outcome, attempt.proposed
    radius = ctx.assembly.damping.radius(point.damping)
    values = {
        Metric.STEP: ctx.state.step,
        Metric.LOSS: point.at.loss,
        Metric.LAM: attempt.lam,
        Metric.RADIUS: Metric.RADIUS.missing() if radius is None else radius,
        Metric.ACCEPTED: attempt.accepted,
        Metric.FINITE: outcome.finite,
        Metric.REJECTED: rejected,
        Metric.BATCH_FAULT: jnp.int32(0) if point.at.batch_fault is None else point.at.batch_fault,
        Metric.UNDONE: point.start.undone,
        Metric.RESULT: solution.result,
        Metric.ITERATIONS: solution.iterations,
        Metric.RESIDUAL: solution.residual,
        Metric.LOSS_AFTER: outcome.loss_after,
        Metric.PREDICTED: outcome.predicted,
        Metric.ACTUAL: outcome.actual,
        Metric.RHO: outcome.rho,
        Metric.GRADIENT_NORM: tree.norm(point.gradient),
        Metric.LEARNING_RATE: _learning_rate(ctx),
        Metric.SHARPNESS: sharpness_of(ctx, point),
        Metric.REFRESHES_REJECTED: getattr(point.preconditioner, "rejected", Metric.REFRESHES_REJECTED.missing()),
    }
    if solution.acceleration is not None:
        values |= {Metric.ACCELERATION: solution.acceleration}
    if attempt.length is not None:
        taken = jnp.where(attempt.accepted, attempt.length.step_size, 0)
        values |= {Metric.STEP_SIZE: taken, Metric.SEARCH_LOSS: attempt.length.before}
        after = jnp.where(attempt.length.step_size > 0, attempt.length.after, attempt.length.before)
        values |= {Metric.SEARCH_LOSS_AFTER: after}
    if update is not None:
        values |= {Metric.DIRECTION_NORM: tree.norm(solution.value), Metric.UPDATE_NORM: optax.tree.norm(update)}
    info: dict[str, Any] = dict(ctx.assembly.reported.collect(ctx.state.step, values))
    if point.at.losses is not None:
        info |= ctx.assembly.reported.collect_losses(ctx.state.step, point.at.losses)
    if point.at.aux is not None:
        info["aux"] = point.at.aux
    return info


def _learning_rate(ctx: StepContext) -> jax.Array:
    transform = ctx.assembly.transform
    if not isinstance(transform, RatedUpdate):
        return Metric.LEARNING_RATE.missing()
    return -transform.rate(ctx.state.transform, tree.scalar_dtype(ctx.params))[0]
