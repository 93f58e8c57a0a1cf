"""Full and layerwise Gauss-Newton: an inner loop on the linearized model, then a line search (arXiv 2510.09378)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Evaluation
from curvax.execute import Layout
from curvax.kernels._dispatch import Backend, Choice, resolve
from curvax.keys import check_key
from curvax.layerwise.inner import InnerSolver
from curvax.layerwise.plan import InnerLoopPlan, plan_for_shapes, plan_without_shapes
from curvax.layerwise.quadratic import InnerProblem
from curvax.layerwise.search import LineSearch
from curvax.layerwise.state import Carry, OuterState, Progress
from curvax.loops import for_loop_body
from curvax.result import Result, code
from curvax.structure.batch_axes import BatchAxes, Parts
from curvax.tree import PyTree

Info = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class InnerLoopMethod:
    """A Gauss-Newton method whose step is an inner optimization; made by `full_gn` and `layerwise_gn`.

        state = method.init(params)
        params, state, info = jax.jit(method.step)(params, batch, state)

    or, for a batch that does not fit into memory, the same numbers from the three parts of `step`:

        carry = method.start(params, state)
        for minibatch in minibatches:  # inner_steps of them
            carry = accumulate(carry, minibatch)  # accumulate = jax.jit(method.accumulate, donate_argnums=0)
        params, state, info = method.finish(carry, search_batch)

    Attributes:
      problem: what is minimized inside.
      inner: what minimizes it.
      inner_steps: minibatches in a step.
      search: line search, or `None` to take the full step.
      warm_start: the next inner loop starts from where this one ended.
      backend: preferred implementation of kernels.
      plan: the plan without shapes; `plan_for` has blocks and costs.
    """

    problem: InnerProblem
    inner: InnerSolver
    inner_steps: int
    search: LineSearch | None
    warm_start: bool
    backend: Backend
    plan: InnerLoopPlan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        plan = plan_without_shapes(self.problem, self.inner, self.inner_steps, self.search, self.warm_start)
        object.__setattr__(self, "plan", plan)

    def __repr__(self) -> str:
        return f"<curvax.layerwise.InnerLoopMethod, {self.plan.explain().splitlines()[0]}>"

    @property
    def parts(self) -> int:
        """Into how many equal parts `step` cuts its batch."""
        return self.inner_steps + (0 if self.search is None else self.search.minibatches)

    def init(self, params: PyTree, *, model_state: PyTree = None) -> OuterState:
        """The state before the first step.

        Args:
          params: the parameters, or `jax.ShapeDtypeStruct`s.
          model_state: mutable model state, for models with `has_state`.

        Raises:
          ValueError: there is nothing to train, the partition does not cover the parameters, or `model_state` and
            `has_state` disagree.
          TypeError: a leaf of the parameters is not a real array.
        """
        trainable, _ = self.problem.curvature.partition.split(params)
        if not jax.tree.leaves(trainable):
            raise ValueError("there are no trainable parameters: every leaf is frozen or not floating point.")
        self.problem.blocks(trainable)
        if self.problem.curvature.has_state != (model_state is not None):
            raise ValueError(
                "has_state=True and init(params, model_state=...) go together: "
                + ("pass model_state." if model_state is None else "set has_state=True.")
            )
        return self._state(trainable, model_state)

    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> OuterState:
        """The state of a tree without leaves, as `Method.init_empty` for `optax.tree.map_params`."""
        return self._state(params, model_state)

    def _state(self, trainable: PyTree, model_state: PyTree) -> OuterState:
        return OuterState(
            step=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            inner=self.inner.init(tree.upcast(trainable)),
            offset=tree.zeros_like(trainable) if self.warm_start else (),
            model_state=tree.fixed(model_state),
            layout=Layout.of(trainable),
        )

    def step(
        self, params: PyTree, batch: Any, state: OuterState, rng: jax.Array | None = None
    ) -> tuple[PyTree, OuterState, Info]:
        """One step. Pure: jit it, scan it, donate `params` and `state`.

        Args:
          params: parameters, laid out as for `init`.
          batch: mapping of arrays, whose examples are cut into `parts` equal parts: the inner minibatches in order,
            then the line search's. Leaves that all examples share go into all of them.
          state: from `init` or the last step.
          rng: random key for models that take one; folded with step and minibatch.

        Returns:
          (params, state, info). A step that is not taken, because of a number that is not finite or because no
          candidate of the line search is better, returns parameters and inner state as they were. Info holds
          "step" (steps before this one), "loss" (mean over the minibatches at theta0), "accepted", "finite" (loss, step
          and inner state are), "rejected" (steps not taken so far), "batch_fault" (what is wrong with the values of the
          batch, a `curvax.losses.BatchFault`), "step_size" and "update_norm"; with a line search
          "search_loss" and "search_loss_after" (on its data, before and after the step); with conjugate gradients
          "result", "iterations" and "residual".

        Raises:
          ValueError, TypeError, KeyError: batch, state or parameters do not fit; one sentence with the mend.
        """
        carry = self.start(params, state, rng)
        minibatches, search_batch = self._cut(batch, self._axes(carry, batch))

        @for_loop_body
        def advance(progress: Progress, minibatch: Any) -> Progress:
            return self._advance(carry, progress, minibatch)

        progress, _ = jax.lax.scan(
            lambda p, held: (advance(p, minibatches.part(held)), None), carry.progress, minibatches.held
        )
        return self.finish(dataclasses.replace(carry, progress=progress), search_batch)

    def start(self, params: PyTree, state: OuterState, rng: jax.Array | None = None) -> Carry:
        """Begins a step in the streaming form; arguments as for `step`."""
        if not isinstance(state, OuterState):
            raise TypeError(f"the state is a {type(state).__name__}: pass what init or the last step returned.")
        trainable, _ = self.problem.curvature.partition.split(params)
        state.layout.check(trainable)
        if bool(jax.tree.leaves(state.offset)) != self.warm_start:
            raise ValueError(
                f"warm_start is {self.warm_start} here, and was not where this state was made: set it alike, or pass "
                "what this method's init or last step returned."
            )
        like = jax.eval_shape(self.inner.init, jax.eval_shape(tree.upcast, trainable))
        if jax.tree.structure(like) != jax.tree.structure(state.inner):
            raise ValueError("this state was made with another inner solver: pass what this method's init returned.")
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
        )
        if rng is not None:
            check_key("rng", rng)
        key = None if rng is None else jax.random.fold_in(rng, state.step)
        return Carry(params, state, key, progress)

    def accumulate(self, carry: Carry, minibatch: Any) -> Carry:
        """One minibatch of the streaming form: one linearization, one inner update. Jit it, donate `carry`.

        Donating takes the parameters and the state that `start` got with it. The schedule counts on `inner_steps`
        minibatches: nothing refuses fewer or more, and those beyond get its last factor, 0 of the cosine.
        """
        return dataclasses.replace(carry, progress=self._advance(carry, carry.progress, minibatch))

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
        progress, before = carry.progress, carry.before
        trainable, frozen = self.problem.curvature.partition.split(carry.params)
        finite = tree.all_finite(progress.delta) & jnp.isfinite(progress.loss)
        finite &= _stays_finite(before.inner, progress.inner)
        size, extra = jnp.ones((), progress.loss.dtype), {}
        if self.search is not None:
            size, extra = self._searched(carry, search_batch, trainable)
        accepted = finite & (size > 0)
        moved = _moved(trainable, progress.delta, size)
        after = tree.where(accepted, moved, trainable)
        rejected = before.rejected + (~accepted).astype(jnp.int32)
        kept = tree.where(accepted, (progress.inner, progress.model_state), (before.inner, before.model_state))
        state = OuterState(
            step=before.step + 1,
            rejected=rejected,
            inner=kept[0],
            offset=self._offset(trainable, progress.delta, moved, accepted),
            model_state=kept[1],
            layout=before.layout,
        )
        size = jnp.where(accepted, size, jnp.zeros_like(size))
        info = {
            "step": before.step,
            "loss": progress.loss / jnp.maximum(progress.index, 1).astype(progress.loss.dtype),
            "accepted": accepted,
            "finite": finite,
            "rejected": rejected,
            "batch_fault": progress.batch_fault,
            "step_size": size,
            "update_norm": jnp.where(accepted, size * tree.norm(progress.delta).astype(size.dtype), 0),
            **extra,
        }
        if self.inner.reports:
            info |= {"result": progress.result, "iterations": progress.iterations, "residual": progress.residual}
        return self.problem.curvature.partition.merge(after, frozen), state, info

    def plan_for(self, params: PyTree, batch: Any, *, model_state: PyTree = None) -> InnerLoopPlan:
        """The plan for these shapes, with blocks, kernels and costs; nothing is computed.

        Args:
          params, batch: arrays or `jax.ShapeDtypeStruct`s; the batch as for `step`.
          model_state: as for `init`.
        """
        trainable, frozen = self.problem.curvature.partition.split(params)
        key = jax.random.key(0) if self.problem.curvature.needs_model_key else None
        shapes = jax.eval_shape(lambda: batch)
        axes = self.problem.axes(trainable, Evaluation(shapes, frozen, model_state, key))
        minibatch = jax.eval_shape(lambda b: self._minibatch(*self._cut(b, axes)), shapes)
        evaluation = Evaluation(minibatch, frozen, model_state, key)
        self.problem.outputs.check(trainable, evaluation)
        choices = self.kernel_choices(trainable, evaluation)
        return plan_for_shapes(self.plan, self.problem, self.search, trainable, evaluation, choices)

    def kernel_choices(self, params: PyTree, evaluation: Evaluation) -> tuple[Choice, ...]:
        """The implementation of each op that the step uses on such a minibatch."""
        wanted = self.problem.outputs.kernels(params, evaluation)
        return tuple(resolve(op, self.backend, request) for op, request in wanted)

    def _axes(self, carry: Carry, batch: Any) -> BatchAxes:
        trainable, evaluation = self._evaluation(carry, carry.progress, batch)
        return self.problem.axes(trainable, evaluation)

    def _cut(self, batch: Any, axes: BatchAxes) -> tuple[Parts, Any]:
        """(inner minibatches, search batch or `None`)."""
        examples = axes.count(batch)
        if examples == 0 or examples % self.parts:
            search = "" if self.search is None else f" and {self.search.minibatches} of the line search"
            raise ValueError(
                f"the batch has {examples} examples: give it a multiple of {self.parts} ({self.inner_steps} inner "
                f"minibatches{search})."
            )
        each = examples // self.parts
        inside = each * self.inner_steps
        search_batch = None if self.search is None else axes.slice(batch, inside, examples)
        return axes.parts(batch, each, self.inner_steps), search_batch

    @staticmethod
    def _minibatch(minibatches: Parts, search_batch: Any) -> Any:
        """The first inner minibatch of what `_cut` returns."""
        del search_batch
        return minibatches.part([x[0] for x in minibatches.held])

    def _advance(self, carry: Carry, progress: Progress, minibatch: Any) -> Progress:
        trainable, evaluation = self._evaluation(carry, progress, minibatch)
        self.problem.outputs.check(trainable, evaluation)
        evaluation = self.problem.prepare(trainable, evaluation)
        problem = self.problem.with_kernels({c.op: c for c in self.kernel_choices(trainable, evaluation)})
        found = self.inner.update(problem, trainable, progress.delta, progress.inner, progress.index, evaluation)
        return Progress(
            delta=found.delta,
            inner=found.state,
            index=progress.index + 1,
            loss=progress.loss + found.loss.astype(progress.loss.dtype),
            model_state=found.model_state,
            result=found.result,
            iterations=found.iterations,
            residual=found.residual.astype(progress.residual.dtype),
            batch_fault=jnp.maximum(progress.batch_fault, self.problem.outputs.batch_fault(trainable, evaluation)),
        )

    def _evaluation(self, carry: Carry, progress: Progress, batch: Any) -> tuple[PyTree, Evaluation]:
        trainable, frozen = self.problem.curvature.partition.split(carry.params)
        key = None
        if self.problem.curvature.needs_model_key and carry.key is not None:
            key = jax.random.fold_in(carry.key, progress.index)
        return trainable, Evaluation(batch, frozen, progress.model_state, key)

    def _searched(self, carry: Carry, search_batch: Any, trainable: PyTree) -> tuple[jax.Array, Info]:
        """(the best step size, 0 if none improves; losses for info)."""
        if self.search is None:
            raise AssertionError("only a method with a line search searches.")
        progress = carry.progress
        _, evaluation = self._evaluation(carry, progress, None)
        parts = self.search.parts(search_batch, self._axes(carry, search_batch))
        sizes = self.search.step_sizes(progress.loss.dtype)
        losses = self.search.losses(
            self.problem.outputs.value, lambda s: _moved(trainable, progress.delta, s), sizes, evaluation, parts
        )
        # A loss of minus infinity is no better than one of plus infinity or NaN.
        best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
        return sizes[best], {"search_loss": losses[0], "search_loss_after": losses[best]}

    def _offset(self, trainable: PyTree, delta: PyTree, moved: PyTree, accepted: jax.Array) -> PyTree:
        """theta0 + delta relative to the new parameters.

        That is what the step size left over, and what rounding to narrower parameters took away. After a step that is
        not taken the next inner loop starts at the parameters.
        """
        if not self.warm_start:
            return ()

        def left(p: jax.Array, d: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(accepted, p.astype(d.dtype) + d - new.astype(d.dtype), jnp.zeros_like(d))

        return jax.tree.map(left, trainable, delta, moved)


def _stays_finite(before: PyTree, after: PyTree) -> jax.Array:
    """False if a leaf of the inner state was finite and no longer is.

    A gradient whose square overflows leaves Adam an infinite second moment and an update of zero, in this step and in
    all that follow. A leaf that starts at infinity, such as a best value so far, may stay there.
    """
    finite = jnp.asarray(True)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        finite &= tree.all_finite(new) | ~tree.all_finite(jnp.asarray(old))
    return finite


def _moved(params: PyTree, delta: PyTree, size: jax.Array) -> PyTree:
    """theta0 + size delta in the dtypes of theta0."""
    return jax.tree.map(lambda p, d: (p.astype(d.dtype) + size.astype(d.dtype) * d).astype(p.dtype), params, delta)
