"""Any Optax optimizer under the face of all methods, so that a comparison is one loop over methods.

    method = curvax.first_order(optax.adam(1e-3), predict_fn=predict, loss=curvax.losses.SoftmaxCrossEntropy())
    state = method.init(params)
    params, state, info = jax.jit(method.step)(params, batch, state)

One step is one gradient and one update of the optimizer. It is the inverse of `curvax.as_gradient_transformation`,
which puts a method behind Optax's face.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, final

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.curvature import Curvature, Evaluation, Hessian, Linearization, LossFunction, Needs, Terms, in_pieces
from curvax.execute import AbstractState, Layout, Proposal, StepInputs, check_part
from curvax.keywords import spread
from curvax.losses import Loss
from curvax.method import AbstractMethod, StepKeys
from curvax.methods.options import LossRecordOptions, ModelOptions
from curvax.optimizers.memory import total_bytes
from curvax.origin import Origin
from curvax.plan import Cost
from curvax.plan.cost import trace
from curvax.plan.plan import bytes_text, flops_text
from curvax.state_version import STATE_VERSION
from curvax.telemetry import ALWAYS, Metric, MetricRecord, Telemetry
from curvax.tree import PyTree

_METRICS = (*(record.metric for record in ALWAYS), Metric.LOSS, Metric.GRADIENT_NORM, Metric.UPDATE_NORM)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FirstOrderState(AbstractState):
    """State of a first-order method.

    Attributes:
      step, rejected: steps so far, and those of them that were not taken, int32.
      transform: the Optax optimizer's state, over upcast trainable parameters.
      model_state: mutable model state (BatchNorm statistics), or `None`.
      layout: what parameters the state belongs to; static.
      origin: that a first-order method made it; static.
      version: of the form of the state; static.
    """

    step: jax.Array
    rejected: jax.Array
    transform: Any
    model_state: PyTree
    layout: Layout = dataclasses.field(metadata={"static": True})
    origin: Origin = dataclasses.field(metadata={"static": True})
    version: int = dataclasses.field(default=STATE_VERSION, metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class FirstOrderPlan:
    """What a step does: a gradient and an update.

    Attributes:
      loss: what is differentiated.
      cost: predicted work of the gradient; `None` without shapes.
      state_bytes: what the optimizer keeps; `None` without shapes. `curvax.optimizers.state_bytes` has it by leaf.
    """

    loss: str
    cost: Cost | None = None
    state_bytes: int | None = None

    def explain(self) -> str:
        """The plan as text."""
        lines = [
            "plan: lane first order, an Optax optimizer",
            f"  gradient of the loss of the {self.loss}, in every step",
        ]
        if self.cost is not None:
            lines.append(f"  gradient {flops_text(self.cost.flops)}, {bytes_text(self.cost.bytes)} moved")
        if self.state_bytes is not None:
            lines.append(f"  state of the optimizer {bytes_text(self.state_bytes)}")
        return "\n".join(lines)


@final
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FirstOrder(AbstractMethod[FirstOrderState, FirstOrderPlan]):
    """A gradient and an update of an Optax optimizer; made by `first_order`.

    The optimizer sees gradients and parameters upcast to float32 or wider. A step that is not finite is not taken, as
    with every method. Optimizers with a line search get `value`, `grad` and `value_fn` on the step's batch.

    Attributes:
      objective: the loss with its model, as a curvature operator of which nothing but loss and gradient is used.
      transform: the optimizer.
      reuses_gradient: whether value and gradient come from the optimizer's state, where a line search left them.
      telemetry: what `info` has.
      plan: the plan without shapes; `plan_for` has costs.
    """

    state_type = FirstOrderState
    takes_curvature_batch = False

    objective: Curvature
    transform: optax.GradientTransformationExtraArgs
    reuses_gradient: bool = False
    telemetry: Telemetry = Telemetry((MetricRecord(Metric.LOSS),))
    plan: FirstOrderPlan = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.telemetry.check(_METRICS, "a first-order method")
        object.__setattr__(self, "plan", FirstOrderPlan(self.objective.name))

    @property
    def curvature(self) -> Curvature:
        return self.objective

    def _traced_once(self) -> FirstOrder:
        return dataclasses.replace(self, objective=self.objective.traced_once())

    def init_empty(self, params: PyTree, *, model_state: PyTree = None) -> FirstOrderState:
        return self._first_state(params, None, None, model_state)

    def _first_state(self, trainable: PyTree, frozen: PyTree, batch: Any, model_state: PyTree) -> FirstOrderState:
        del frozen, batch
        return FirstOrderState(
            step=jnp.zeros((), jnp.int32),
            rejected=jnp.zeros((), jnp.int32),
            transform=self.transform.init(tree.upcast(trainable)),
            model_state=tree.fixed(model_state),
            layout=Layout.of(trainable),
            origin=self.origin,
        )

    @property
    def origin(self) -> Origin:
        # What optimizer it is is said by the tree of its state, which `_check_parts` compares.
        return Origin.of(method="first order")

    def _check_parts(self, state: FirstOrderState, trainable: PyTree) -> None:
        like = jax.eval_shape(self.transform.init, jax.eval_shape(tree.upcast, trainable))
        check_part("transform", state.transform, like)

    def _plan_for(self, trainable: PyTree, evaluation: Evaluation) -> FirstOrderPlan:
        self.objective.check(trainable, evaluation)

        def gradient(p: PyTree, e: Evaluation) -> PyTree:
            return self.objective.linearize(p, e, Needs(gradient=True)).gradient

        kept = total_bytes(self.transform, jax.eval_shape(tree.upcast, trainable))
        return dataclasses.replace(self.plan, cost=trace(gradient, trainable, evaluation), state_bytes=kept)

    def _propose(self, inputs: StepInputs[FirstOrderState]) -> Proposal[FirstOrderState]:
        state, params = inputs.state, inputs.trainable
        keys = StepKeys.of(inputs.rng, state.step)
        evaluation = self.evaluation(inputs.batch, inputs.frozen, state.model_state, keys)
        self.objective.check(params, evaluation)

        # 1. Loss and gradient, and the optimizer's update.
        def value_fn(p: PyTree, batch: Any = None, rng: jax.Array | None = None) -> jax.Array:
            del batch, rng  # Optax hands on what it does not use itself
            return self.objective.value(tree.cast_like(p, params), evaluation)

        point, upcast = tree.upcast(params), tree.upcast
        at = self._linearize(params, evaluation, state)
        gradient = at.gradient if inputs.gradient is None else upcast(inputs.gradient)
        extra = {"value": at.loss, "grad": gradient, "value_fn": value_fn, "batch": inputs.batch, "rng": inputs.rng}
        update, transform = self.transform.update(gradient, state.transform, point, **extra)
        # 2. Where it leads, if everything is finite.
        after = tree.cast_like(optax.apply_updates(point, update), params)
        accepted = tree.all_finite(after) & jnp.isfinite(at.loss)
        rejected = state.rejected + (~accepted).astype(jnp.int32)
        params, transform, model_state = tree.where(
            accepted, (after, transform, at.model_state), (params, state.transform, state.model_state)
        )
        update = tree.where(accepted, update, tree.zeros_like(update))
        after_step = dataclasses.replace(
            state, step=state.step + 1, rejected=rejected, transform=transform, model_state=model_state
        )
        # 3. What is reported of it.
        values = {
            Metric.STEP: state.step,
            Metric.LOSS: at.loss,
            Metric.ACCEPTED: accepted,
            Metric.FINITE: accepted,
            Metric.REJECTED: rejected,
            Metric.BATCH_FAULT: jnp.int32(0) if at.batch_fault is None else at.batch_fault,
            Metric.GRADIENT_NORM: tree.norm(gradient),
            Metric.UPDATE_NORM: tree.norm(update),
        }
        return Proposal(params, update, after_step, self._info(values, at))

    def _linearize(self, params: PyTree, evaluation: Evaluation, state: FirstOrderState) -> Linearization:
        """Loss and gradient; from the state where a line search has left them there."""
        if not self.reuses_gradient:
            return self.objective.linearize(params, evaluation, Needs(gradient=True))
        value, gradient = optax.tree.get(state.transform, "value"), optax.tree.get(state.transform, "grad")
        if value is None or gradient is None:
            raise ValueError("this optimizer leaves no value and gradient in its state: drop reuse_gradient.")

        def fresh() -> tuple[jax.Array, PyTree]:
            at = self.objective.linearize(params, evaluation, Needs(gradient=True))
            return at.loss.astype(value.dtype), at.gradient

        loss, gradient = jax.lax.cond(jnp.isfinite(value), lambda: (value, gradient), fresh)
        shapes = jax.eval_shape(lambda: tree.upcast(params))
        return Linearization(shapes, loss, gradient, model_state=state.model_state)

    def _info(self, values: Mapping[Metric, jax.Array], at: Linearization) -> dict[str, Any]:
        step = values[Metric.STEP]
        info: dict[str, Any] = self.telemetry.collect(step, values)
        if at.losses is not None:
            info |= self.telemetry.collect_losses(step, at.losses)
        return info if at.aux is None else info | {"aux": at.aux}


@dataclasses.dataclass(frozen=True)
class FirstOrderOptions(LossRecordOptions, ModelOptions):
    """Keywords of `first_order`.

    Attributes:
      tx: an Optax optimizer, or whole chain, sign included, as for `optax.apply_updates`.
      loss: loss in output space, or `loss=Terms(...)` without predict_fn.
      loss_fn: `loss_fn(params, batch) -> scalar`, or `-> (total, weight)`, in place of predict_fn and loss.
      reduction: how `loss_fn` combines examples, for microbatching.
      reuse_gradient: every step has the same batch, and the optimizer's line search (`optax.lbfgs`) has evaluated value
        and gradient where it ended: take these over, as `optax.value_and_grad_from_state` does.
    """

    tx: optax.GradientTransformation
    _: dataclasses.KW_ONLY
    loss: Loss | Terms | None = None
    loss_fn: Callable[..., Any] | None = None
    reduction: Literal["mean", "sum"] = "mean"
    reuse_gradient: bool = False

    @staticmethod
    def needed(given: Mapping[str, Any]) -> tuple[str, ...]:
        """A model and a loss, where there is no loss function."""
        if given.get("loss_fn") is not None:
            return ()
        return (*ModelOptions.needed(given), "loss")

    @property
    def objective(self) -> Curvature:
        """The operator that knows loss and gradient."""
        if self.loss_fn is None:
            if self.loss is None:
                raise TypeError("loss is missing: pass loss=curvax.losses.SquaredError(), say, or loss_fn.")
            return self.gauss_newton(self.loss)
        if self.predict_fn is not None or self.loss is not None:
            raise ValueError("give loss_fn, or predict_fn and loss, not both.")
        return Hessian(LossFunction(self.loss_fn, self.extras, self.reduction, batch_axes=self.batch_axes))


@spread(FirstOrderOptions)
def first_order(options: FirstOrderOptions) -> FirstOrder:
    """An Optax optimizer as a method: the same `init`, `step` and `info` as the presets have.

    Raises:
      TypeError: `tx` is no Optax transformation, or model or loss are missing.
    """
    if not isinstance(options.tx, optax.GradientTransformation):
        kind = type(options.tx).__name__
        raise TypeError(f"tx is a {kind}: pass an Optax optimizer such as optax.adam(1e-3).")
    objective = options.objective
    if options.microbatch_size is not None:
        objective = in_pieces(objective, options.microbatch_size)
    tx = optax.with_extra_args_support(options.tx)
    return FirstOrder(objective, tx, options.reuse_gradient, options.telemetry)
