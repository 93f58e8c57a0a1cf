"""Full and layerwise Gauss-Newton: an inner loop on the linearized model, then a line search (arXiv 2510.09378).

One step from theta0, with delta = theta - theta0 and inner_steps = 3 (the paper's algorithm 1):

    batch  | minibatch 0 | minibatch 1 | minibatch 2 | search batch |
    start       delta = offset of the last step (warm start), or 0
    accumulate  delta <- inner update of delta at minibatch 0, then 1, then 2
    finish      step size a = argmin over {0, 1, ratio, ratio^2, ...} of the search batch's loss at theta0 + a delta
                theta1 = theta0 + a delta, or theta0 if a = 0 or a number is not finite
                offset = theta0 + delta - theta1, where the next inner loop starts
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax import meshes, tree
from curvax.curvature import Evaluation, GaussNewton, SumOfTerms
from curvax.execute import Layout, Proposal, StepInputs
from curvax.kernels._dispatch import Backend, Choice, check_backend, resolve
from curvax.layerwise.inner import InnerSolver
from curvax.layerwise.plan import InnerLoopPlan, plan_for_shapes, plan_without_shapes
from curvax.layerwise.quadratic import InnerProblem
from curvax.layerwise.search import LineSearch
from curvax.layerwise.state import Carry, OuterState, Progress
from curvax.loops import for_loop_body
from curvax.method import AbstractMethod
from curvax.origin import Origin
from curvax.result import Result, code
from curvax.search import Line
from curvax.structure.batch_axes import BatchAxes, Parts
from curvax.telemetry import ALWAYS, SEARCH_METRICS, Metric, MetricRecord, Telemetry
from curvax.tree import PyTree

Info = dict[str, Any]
_STEP_METRICS = (*(record.metric for record in ALWAYS), Metric.LOSS, Metric.STEP_SIZE, Metric.UPDATE_NORM)
_SOLVE_METRICS = (Metric.RESULT, Metric.ITERATIONS, Metric.RESIDUAL)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InnerLoopMethod(AbstractMethod[OuterState, InnerLoopPlan]):
    """A Gauss-Newton method whose step is an inner optimization; made by `full_gn` and `layerwise_gn`.

    The batch of `step` is cut into `parts` equal parts, the inner minibatches in order and then the line search's;
    leaves that all examples share go into all of them. For a batch that does not fit into memory the three parts of
    `step` give the same numbers:

        carry = method.start(params, state)
        for minibatch in minibatches:  # inner_steps of them
            carry = accumulate(carry, minibatch)  # accumulate = jax.jit(method.accumulate, donate_argnums=0)
        params, state, info = method.finish(carry, search_batch)

    Info has `step_size` and `update_norm`; with a line search `search_loss` and `search_loss_after`; with conjugate
    gradients `result`, `iterations` and `residual`. A step that is not taken leaves parameters and inner state as they
    were.

    Attributes:
      problem: what is minimized inside.
      inner: what minimizes it.
      inner_steps: minibatches in a step.
      search: line search, or `None` to take the full step.
      warm_start: the next inner loop starts from where this one ended.
      backend: preferred implementation of kernels.
      telemetry: what `info` has beside that.
      plan: the plan without shapes; `plan_for` has blocks and costs.
    """

    state_type = OuterState
    takes_curvature_batch = False
    takes_gradient = False
    narrows_updates = False  # the state's offset is relative to the very parameters that a step arrives at

    problem: InnerProblem
    inner: InnerSolver
    inner_steps: int
    search: LineSearch | None
    warm_start: bool
    backend: Backend
    telemetry: Telemetry = Telemetry((MetricRecord(Metric.LOSS),))
    plan: InnerLoopPlan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        check_backend(self.backend)
        self.telemetry.check((*_STEP_METRICS, *self._optional_metrics), "this inner loop")
        plan = plan_without_shapes(self.problem, self.inner, self.inner_steps, self.search, self.warm_start)
        object.__setattr__(self, "plan", plan)

    @property
    def curvature(self) -> GaussNewton | SumOfTerms:
        return self.problem.curvature

    @property
    def parts(self) -> int:
        """Into how many equal parts `step` cuts its batch."""
        return self.inner_steps + (0 if self.search is None else self.search.minibatches)

    def _traced_once(self) -> InnerLoopMethod:
        return dataclasses.replace(self, problem=self.problem.traced_once())

    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> OuterState:
        return self._state(params, model_state)

    def _first_state(self, trainable: PyTree, frozen: PyTree, batch: Any, model_state: PyTree) -> OuterState:
        del frozen, batch
        self.problem.blocks(trainable)  # raises where the partition does not cover the parameters
        return self._state(trainable, model_state)

    def _state(self, trainable: PyTree, model_state: PyTree) -> OuterState:
        return OuterState(
            step=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            inner=self.inner.init(tree.upcast(trainable)),
            offset=tree.zeros_like(trainable) if self.warm_start else (),
            model_state=tree.fixed(model_state),
            layout=Layout.of(trainable),
            origin=self.origin,
        )

    @property
    def origin(self) -> Origin:
        return Origin.of(curvature=self.curvature.kind, inner=type(self.inner).__name__)

    def _check_parts(self, state: OuterState, trainable: PyTree) -> None:
        if bool(jax.tree.leaves(state.offset)) != self.warm_start:
            raise ValueError(
                f"warm_start is {self.warm_start} here, and was not where this state was made: set it alike, or pass "
                "what this method's init or last step returned."
            )
        like = jax.eval_shape(self.inner.init, jax.eval_shape(tree.upcast, trainable))
        if jax.tree.structure(like) != jax.tree.structure(state.inner):
            raise ValueError("this state was made with another inner solver: pass what this method's init returned.")

    def _propose(self, inputs: StepInputs[OuterState]) -> Proposal[OuterState]:
        carry = self._begin(inputs)
        minibatches, search_batch = self._cut(inputs.batch, self._axes(carry, inputs.batch))

        @for_loop_body
        def advance(progress: Progress, minibatch: Any) -> Progress:
            return self._advance(carry, progress, minibatch)

        progress, _ = jax.lax.scan(
            lambda p, examples: (advance(p, minibatches.part(examples)), None), carry.progress, minibatches.held
        )
        return self._end(dataclasses.replace(carry, progress=progress), search_batch)

    def start(self, params: PyTree, state: OuterState, rng: jax.Array | None = None) -> Carry:
        """Begins a step in the streaming form; arguments as for `step`."""

        def begin(params: PyTree, state: OuterState, rng: jax.Array | None) -> tuple[Carry]:
            trainable, frozen = self.partition.split(params)
            return (self._begin(self._checked(StepInputs(trainable, frozen, None, state, rng))),)

        trainable = self.partition.split(params)[0]
        like = (meshes.ShardedBy(functools.partial(meshes.sharded_like, params=trainable)),)
        return meshes.automatic(begin, (params, state, rng), like)[0]

    def accumulate(self, carry: Carry, minibatch: Any) -> Carry:
        """One minibatch of the streaming form: one linearization, one inner update. Jit it, donate `carry`.

        Donating takes the parameters and the state that `start` got with it. The schedule counts on `inner_steps`
        minibatches: nothing refuses fewer or more, and those beyond get its last factor, 0 of the cosine.
        """
        meshes.refuse_manual_axes(carry.params, minibatch)

        def advance(carry: Carry, minibatch: Any) -> tuple[Progress]:
            return (self._traced_once()._advance(carry, carry.progress, minibatch),)

        progress = meshes.automatic(advance, (carry, minibatch), (carry.progress,))[0]
        return dataclasses.replace(carry, progress=progress)

    def finish(self, carry: Carry, search_batch: Any = None) -> tuple[PyTree, OuterState, Info]:
        """Ends a step in the streaming form: line search, acceptance, next state.

        Args:
          carry: from `accumulate`.
          search_batch: fresh data of the line search, `None` without one; its examples are cut into the search's
            `minibatches`.

        Returns:
          As for `step`.
        """
        if (search_batch is None) != (self.search is None):
            raise ValueError(
                "the line search needs data of its own: pass search_batch."
                if search_batch is None
                else "there is no line search to use search_batch: pass None, or set line_search."
            )

        def end(carry: Carry, search_batch: Any) -> tuple[PyTree, OuterState, Info]:
            proposal = self._traced_once()._end(carry, search_batch)
            return proposal.params, proposal.state, proposal.info

        params, state, info = meshes.automatic(end, (carry, search_batch), (carry.params, carry.before, None))
        return self.partition.merge(params, carry.frozen), state, info

    def _begin(self, inputs: StepInputs[OuterState]) -> Carry:
        trainable, state = inputs.trainable, inputs.state
        dtype = tree.scalar_dtype(trainable)
        # `before` is kept for a step that is not taken, and no buffer of a donated carry may be in it twice.
        delta, inner, model_state = jax.tree.map(jnp.copy, (state.offset, state.inner, state.model_state))
        progress = Progress(
            delta=delta if self.warm_start else tree.zeros_like(trainable),
            inner=inner,
            index=jnp.zeros((), jnp.int32),
            loss=jnp.zeros((), dtype),
            model_state=model_state,
            result=code(Result.CONVERGED),
            iterations=jnp.zeros((), jnp.int32),
            residual=jnp.zeros((), dtype),
            batch_fault=jnp.zeros((), jnp.int32),
            losses={name: jnp.zeros((), dtype) for name in self.problem.outputs.names},
        )
        key = None if inputs.rng is None else jax.random.fold_in(inputs.rng, state.step)
        return Carry(trainable, inputs.frozen, state, key, progress)

    def _advance(self, carry: Carry, progress: Progress, minibatch: Any) -> Progress:
        trainable, evaluation = carry.params, self._evaluation(carry, progress, minibatch)
        self.problem.outputs.check(trainable, evaluation)
        evaluation = self.problem.prepare(trainable, evaluation)
        problem = self.problem.with_kernels({c.op: c for c in self.kernel_choices(trainable, evaluation)})
        new = self.inner.update(problem, trainable, progress.delta, progress.inner, progress.index, evaluation)
        return Progress(
            delta=new.delta,
            inner=new.state,
            index=progress.index + 1,
            loss=progress.loss + new.loss.astype(progress.loss.dtype),
            model_state=new.model_state,
            result=new.result,
            iterations=new.iterations,
            residual=new.residual.astype(progress.residual.dtype),
            batch_fault=jnp.maximum(progress.batch_fault, self.problem.outputs.batch_fault(trainable, evaluation)),
            losses={
                name: progress.losses[name] + loss.astype(progress.loss.dtype)
                for name, loss in problem.outputs.losses(trainable, evaluation).items()
            },
        )

    def _end(self, carry: Carry, search_batch: Any) -> Proposal[OuterState]:
        progress, before, theta0 = carry.progress, carry.before, carry.params
        # 1. How far to go, and whether to go at all.
        finite = tree.all_finite(progress.delta) & jnp.isfinite(progress.loss)
        finite &= _stays_finite(before.inner, progress.inner)
        size, losses = jnp.ones((), progress.loss.dtype), {}
        if self.search is not None:
            size, losses = self._search(carry, self.search, search_batch)
        accepted = finite & (size > 0)
        # 2. The parameters there, or the old ones, and the states that go with them.
        there = _towards(theta0, progress.delta, size)
        after = tree.where(accepted, there, theta0)
        rejected = before.rejected + (~accepted).astype(jnp.int32)
        inner, model_state = tree.where(
            accepted, (progress.inner, progress.model_state), (before.inner, before.model_state)
        )
        state = dataclasses.replace(
            before,
            step=before.step + 1,
            rejected=rejected,
            inner=inner,
            offset=self._offset(carry, there, accepted),
            model_state=model_state,
        )
        # 3. What is reported of it.
        size = jnp.where(accepted, size, jnp.zeros_like(size))
        values = {
            Metric.STEP: before.step,
            Metric.LOSS: progress.loss / jnp.maximum(progress.index, 1).astype(progress.loss.dtype),
            Metric.ACCEPTED: accepted,
            Metric.FINITE: finite,
            Metric.REJECTED: rejected,
            Metric.BATCH_FAULT: progress.batch_fault,
            Metric.STEP_SIZE: size,
            Metric.UPDATE_NORM: jnp.where(accepted, size * tree.norm(progress.delta).astype(size.dtype), 0),
            Metric.RESULT: progress.result,
            Metric.ITERATIONS: progress.iterations,
            Metric.RESIDUAL: progress.residual,
            **losses,
        }
        info = self.reported.collect(before.step, values)
        count = jnp.maximum(progress.index, 1).astype(progress.loss.dtype)
        info |= self.reported.collect_losses(before.step, {n: loss / count for n, loss in progress.losses.items()})
        return Proposal(after, jax.tree.map(_difference, after, theta0), state, info)

    @property
    def reported(self) -> Telemetry:
        """The telemetry that was asked for, and what an inner loop reports in any case."""
        return self.telemetry.beside(Metric.STEP_SIZE, Metric.UPDATE_NORM, *self._optional_metrics)

    @property
    def _optional_metrics(self) -> tuple[Metric, ...]:
        return (() if self.search is None else SEARCH_METRICS) + (_SOLVE_METRICS if self.inner.reports else ())

    def _plan_for(self, trainable: PyTree, evaluation: Evaluation) -> InnerLoopPlan:
        shapes = jax.eval_shape(lambda: evaluation.batch)
        axes = self.problem.axes(trainable, dataclasses.replace(evaluation, batch=shapes))
        minibatch = jax.eval_shape(lambda b: self._minibatch(*self._cut(b, axes)), shapes)
        evaluation = dataclasses.replace(evaluation, batch=minibatch)
        self.problem.outputs.check(trainable, evaluation)
        choices = self.kernel_choices(trainable, evaluation)
        return plan_for_shapes(self.plan, self.problem, self.search, trainable, evaluation, choices)

    def kernel_choices(self, params: PyTree, evaluation: Evaluation) -> tuple[Choice, ...]:
        """The implementation of each op that the step uses on such a minibatch."""
        wanted = self.problem.outputs.kernels(params, evaluation)
        return tuple(resolve(op, self.backend, request) for op, request in wanted)

    def _axes(self, carry: Carry, batch: Any) -> BatchAxes:
        return self.problem.axes(carry.params, self._evaluation(carry, carry.progress, batch))

    def _cut(self, batch: Any, axes: BatchAxes) -> tuple[Parts, Any]:
        """(inner minibatches, search batch or `None`)."""
        # Each term of a loss has a set of its own, which is cut by itself.
        for examples in axes.sizes(batch) if self.curvature.term_names else (axes.count(batch),):
            if examples == 0 or examples % self.parts:
                search = "" if self.search is None else f" and {self.search.minibatches} of the line search"
                raise ValueError(
                    f"the batch has {examples} examples: give it a multiple of {self.parts} ({self.inner_steps} inner "
                    f"minibatches{search})."
                )
        search_batch = None if self.search is None else axes.share(batch, self.inner_steps, self.parts, self.parts)
        inside = axes.share(batch, 0, self.inner_steps, self.parts)
        return axes.parts(inside, None, self.inner_steps), search_batch

    @staticmethod
    def _minibatch(minibatches: Parts, search_batch: Any) -> Any:
        """The first inner minibatch of what `_cut` returns."""
        del search_batch
        return minibatches.part([x[0] for x in minibatches.held])

    def _evaluation(self, carry: Carry, progress: Progress, batch: Any) -> Evaluation:
        key = None
        if self.curvature.needs_model_key and carry.key is not None:
            key = jax.random.fold_in(carry.key, progress.index)
        return Evaluation(batch, carry.frozen, progress.model_state, key)

    def _search(self, carry: Carry, search: LineSearch, batch: Any) -> tuple[jax.Array, dict[Metric, jax.Array]]:
        """(the best step size, 0 if none improves; losses for info)."""
        theta0, delta = carry.params, carry.progress.delta
        evaluation = self._evaluation(carry, carry.progress, None)
        parts = search.parts(batch, self._axes(carry, batch))
        dtype = carry.progress.loss.dtype

        def loss_at(size: jax.Array) -> jax.Array:
            there = _towards(theta0, delta, size)
            return search.mean_loss(self.problem.outputs.value, there, evaluation, parts).astype(dtype)

        found = search.grid.find(Line(loss_at, None, dtype))
        after = jnp.where(found.step_size > 0, found.after, found.before)
        return found.step_size, {Metric.SEARCH_LOSS: found.before, Metric.SEARCH_LOSS_AFTER: after}

    def _offset(self, carry: Carry, there: PyTree, accepted: jax.Array) -> PyTree:
        """theta0 + delta relative to the new parameters.

        That is what the step size left over, and what rounding to narrower parameters took away. After a step that is
        not taken the next inner loop starts at the parameters.
        """
        if not self.warm_start:
            return ()

        def left(p: jax.Array, d: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(accepted, p.astype(d.dtype) + d - new.astype(d.dtype), jnp.zeros_like(d))

        return jax.tree.map(left, carry.params, carry.progress.delta, there)


def _stays_finite(before: PyTree, after: PyTree) -> jax.Array:
    """False if a leaf of the inner state was finite and no longer is.

    A gradient whose square overflows leaves Adam an infinite second moment and an update of zero, in this step and in
    all that follow. A leaf that starts at infinity, such as a best value so far, may stay there.
    """
    finite = jnp.asarray(True)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        finite &= tree.all_finite(new) | ~tree.all_finite(jnp.asarray(old))
    return finite


def _towards(params: PyTree, delta: PyTree, size: jax.Array) -> PyTree:
    """theta0 + size delta in the dtypes of theta0."""
    return jax.tree.map(lambda p, d: (p.astype(d.dtype) + size.astype(d.dtype) * d).astype(p.dtype), params, delta)


def _difference(new: jax.Array, old: jax.Array) -> jax.Array:
    """Exact: of two bfloat16 numbers float32 holds the difference, so that `optax.apply_updates` arrives at `new`."""
    return tree.upcast(new) - tree.upcast(old)
