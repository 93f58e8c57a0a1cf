"""How far the update of a step goes: its bound first, then the search along what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.execute.branch import when
from curvax.execute.context import Point, StepContext
from curvax.losses.rounding import loss_rounding
from curvax.plan import Cadence, planned_search
from curvax.search import Line, Searched, StepSearch
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Length:
    """What was found of an update.

    Attributes:
      update: what is judged, and taken if the step is: the bounded update times its step size. Times the largest one
        that was tried if none will do, so that the damping sees how bad that is.
      descends: whether there is a step size that will do.
      after: the loss there, where the search evaluated it on the step's own batch; else `None`.
      searched: what the search found; `None` without one.
      state: the next state of the search.
    """

    update: PyTree
    descends: jax.Array
    after: jax.Array | None = None
    searched: Searched | None = None
    state: jax.Array | None = None


def moved(params: PyTree, update: PyTree) -> PyTree:
    """params + update, added in the accumulation dtype, in the dtypes of `params`."""
    return jax.tree.map(lambda p, w, u: (w + u.astype(w.dtype)).astype(p.dtype), params, tree.upcast(params), update)


def rounding_of(ctx: StepContext, point: Point) -> jax.Array:
    """How far rounding may move the loss: as the curvature knows it, where losses are compared."""
    search = ctx.assembly.search
    compared = ctx.assembly.damping.evaluate_every is not None or (search is not None and search.evaluations > 0)
    own = point.at.rounding if compared else None
    return loss_rounding(point.at.loss) if own is None else own()


def bounded_update(ctx: StepContext, point: Point, update: PyTree) -> PyTree:
    """The update within the step bound."""
    bound = ctx.assembly.step_bound
    return update if bound is None else bound.apply(update, lambda: _along(point, update))


def length_of(ctx: StepContext, point: Point, update: PyTree) -> Length:
    """Searches along an update where the cadence says so."""
    search, state = ctx.assembly.search, ctx.state.search
    if search is None:
        return Length(update, jnp.asarray(True))
    # A search that found nothing is repeated in the next step.
    last = jnp.ones((), point.at.loss.dtype) if state is None else state.astype(point.at.loss.dtype)
    unknown = jnp.full_like(point.at.loss, jnp.nan)
    searched = when(
        Cadence((search.every,)), ctx.state.step, ctx.plan.mode,
        _find(ctx, point, search, update),
        lambda: Searched(last, unknown, unknown),
        None if state is None else state == 0,
    )  # fmt: skip
    descends = searched.step_size > 0
    taken = jnp.where(descends, searched.step_size, jnp.ones_like(searched.step_size))
    own = search.every == 1 and search.evaluations > 0 and ctx.problem.search_evaluation is None
    return Length(
        update=tree.scale(taken, update),
        descends=descends,
        after=searched.after if own else None,
        searched=searched,
        state=None if state is None else searched.step_size.astype(state.dtype),
    )


def _find(ctx: StepContext, point: Point, search: StepSearch, update: PyTree) -> Callable[[], Searched]:
    evaluation = ctx.problem.search_evaluation or ctx.problem.evaluation
    curvature, dtype = ctx.assembly.curvature, point.at.loss.dtype

    def loss_at(size: jax.Array) -> jax.Array:
        return curvature.value(moved(ctx.params, tree.scale(size, update)), evaluation).astype(dtype)

    def bend() -> jax.Array:
        undamped = _along(point, update)
        scaled = update if point.root is None else jax.tree.map(jnp.multiply, update, point.root)
        return undamped + point.lam.astype(undamped.dtype) * tree.vdot(scaled, scaled)

    line = Line(
        loss_at=loss_at,
        loss=point.at.loss if ctx.problem.search_evaluation is None else None,
        dtype=dtype,
        slope=lambda: tree.vdot(point.gradient, update),
        bend=bend,
        rounding=lambda: rounding_of(ctx, point).astype(dtype),
    )

    def find() -> Searched:
        return jax.tree.map(
            lambda x: x.astype(dtype), planned_search(search, curvature, ctx.params, evaluation).find(line)
        )

    return find


def _along(point: Point, update: PyTree) -> jax.Array:
    """u.Cu of the undamped curvature."""
    return point.curved.bend(tree.cast_like(update, point.curved.params_like))
