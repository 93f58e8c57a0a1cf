"""The Hessian of a scalar loss, in general indefinite."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, JacobianRows, Linearization, Needs, ReadsBatches
from curvax.curvature.differentiate import LinearModel, linear_model, second_order
from curvax.curvature.model import Extras, Model
from curvax.curvature.partition import TrainablePartition
from curvax.explicit_models import on_automatic_axes
from curvax.jaxprs import Wanted
from curvax.live import live_part
from curvax.losses.base import Loss, check_loss
from curvax.losses.rounding import measured_rounding
from curvax.structure.additive import additive_axes
from curvax.structure.axes import LeafAxes, leaf_axes
from curvax.structure.batch_axes import AxesPrefix, BatchAxes, ExampleAxes, expand_axes
from curvax.structure.report import LeafStructure
from curvax.traced_once import traced_once
from curvax.tree import PyTree

_NO_ROWS = "the Hessian has no row factors: use a parameter-space solver, or the Gauss-Newton matrix."


class Objective(ReadsBatches):
    """A scalar loss of parameters on a batch."""

    @property
    @abc.abstractmethod
    def extras(self) -> Extras:
        """State, aux, random key, frozen parameters."""

    @property
    @abc.abstractmethod
    def sampler(self) -> tuple[Model, Loss] | None:
        """The model and loss to sample targets from, if there are any."""

    @abc.abstractmethod
    def traced_once(self) -> Self:
        """See `Curvature.traced_once`."""

    @abc.abstractmethod
    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """Weights of the examples in the loss, normalizer included."""

    @abc.abstractmethod
    def rounding(self, params: PyTree, evaluation: Evaluation, loss: jax.Array) -> jax.Array:
        """How far rounding may move the loss, whose value at `params` is `loss`."""

    @abc.abstractmethod
    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns (loss, (new model state, aux))."""


@dataclasses.dataclass(frozen=True)
class LossFunction(Objective):
    """`loss_fn(params, batch) -> scalar`, or `-> (total, weight)` with the loss total / weight.

    In microbatches the losses of the pieces must make up that of the batch. A scalar does if it is a sum or a mean over
    examples (`reduction`), which is seen from the function; one that divides by a number of its own batch, as a mean
    over unmasked tokens does, returns the two numbers instead, and totals and weights are added up before the division.

    Attributes:
      loss_fn: the function. The weight is made of the batch alone and not negative; where it is zero, so is the loss.
      extras: state, aux, random key, frozen parameters.
      reduction: how a scalar combines examples; microbatching weighs the pieces accordingly.
      keys: keys that the batch must hold, checked before tracing; empty if the batch is not a mapping.
      batch_axes: which axis of each leaf of the batch holds the examples, `None` for a leaf that all examples share: a
        prefix of the batch, as `in_axes` of `jax.vmap`. By default, `None`, what the function turns out to add up over.
    """

    loss_fn: Callable[..., Any]
    extras: Extras = Extras()
    reduction: Literal["mean", "sum"] = "mean"
    keys: tuple[str, ...] = ()
    batch_axes: AxesPrefix | None = None

    def __post_init__(self) -> None:
        self.extras.check_takes("loss_fn", self.loss_fn, "batch")

    @property
    def sampler(self) -> tuple[Model, Loss] | None:
        return None

    def traced_once(self) -> LossFunction:
        return dataclasses.replace(self, loss_fn=traced_once(on_automatic_axes(self.loss_fn)))

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        for key in self.keys:
            if not isinstance(evaluation.batch, Mapping) or key not in evaluation.batch:
                raise KeyError(f"the batch has no '{key}': add it or change the key's option.")
        output = jax.eval_shape(lambda p, e: self.extras.call(self.loss_fn, p, e.batch, e)[0], params, evaluation)
        value, *weight = output if isinstance(output, tuple) and output else (output,)
        if not _is_scalar(value, jnp.floating) or len(weight) > 1 or not all(_is_scalar(w, jnp.number) for w in weight):
            raise TypeError(
                "loss_fn must return a floating-point scalar, or the tuple (total, weight) of two: reduce over the "
                "batch inside it."
            )
        if weight:
            self._check_weight(params, evaluation)

    def _check_weight(self, params: PyTree, evaluation: Evaluation) -> None:
        traced = jax.make_jaxpr(lambda p, e: self._parts(p, e)[1])(params, evaluation)
        leaves = len(jax.tree.leaves(params))
        varying = [i < leaves for i in range(len(traced.in_avals))]
        if Wanted.DERIVATIVE in live_part(traced, varying).wanted:
            raise ValueError(
                "the weight that loss_fn returns depends on the parameters: return one that is made of the batch "
                "alone, or put jax.lax.stop_gradient around it."
            )

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        def loss(p: PyTree, batch: Any) -> list[jax.Array]:
            value, weight, _ = self._parts(p, dataclasses.replace(evaluation, batch=batch))
            return [value] if weight is None else [value, weight]

        batch = evaluation.batch
        given = None if self.batch_axes is None else expand_axes(self.batch_axes, batch)
        return additive_axes(loss, params, batch, given, sizes, self.reduction == "mean")

    def total_weight(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        _, weight, _ = self._parts(params, evaluation)
        return weight

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        if evaluation.weights is not None:
            return evaluation.weights
        axes = evaluation.axes or BatchAxes((0,) * len(jax.tree.leaves(evaluation.batch)))
        examples = axes.count(evaluation.batch)
        share = 1.0 / max(examples, 1) if self.reduction == "mean" else 1.0
        return jnp.full((examples,), share, tree.scalar_dtype(params))

    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        value, weight, rest = self._parts(params, evaluation)
        if weight is not None:
            weight = jax.lax.stop_gradient(weight)
            whole = weight if evaluation.total_weight is None else evaluation.total_weight
            return _quotient(value, weight, whole.astype(value.dtype)), rest
        if evaluation.weights is None:
            return value, rest
        # A slice of a larger batch: its mean counts with the slice's share of the whole, its sum as it is.
        share = jnp.sum(evaluation.weights) if self.reduction == "mean" else jnp.ones((), value.dtype)
        return value * share.astype(value.dtype), rest

    def _parts(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, jax.Array | None, tuple[PyTree, Any]]:
        """(value or total, weight or `None`, rest), in the accumulation dtype."""
        returned, rest = self.extras.call(self.loss_fn, params, evaluation.batch, evaluation)
        value, weight = returned if isinstance(returned, tuple) else (returned, None)
        value = jnp.asarray(value)
        value = value.astype(tree.accumulation_dtype(value.dtype))
        if weight is not None:
            weight = jnp.asarray(weight).astype(value.dtype)
        return value, weight, rest

    def rounding(self, params: PyTree, evaluation: Evaluation, loss: jax.Array) -> jax.Array:
        # What is rounded inside is not known, so it is measured, by four forward passes.
        return measured_rounding(lambda p: self(p, evaluation)[0], params, loss)


def _is_scalar(x: Any, kind: Any) -> bool:
    return getattr(x, "shape", None) == () and jnp.issubdtype(x.dtype, kind)


def _quotient(total: jax.Array, weight: jax.Array, whole: jax.Array) -> jax.Array:
    """total / whole; zero, with derivatives of zero, where this part of the whole has no weight."""
    counts = (weight != 0) & (whole != 0)
    return jnp.where(counts, total, jnp.zeros_like(total)) / jnp.where(counts, whole, jnp.ones_like(whole))


@dataclasses.dataclass(frozen=True)
class ModelLoss(Objective):
    """`loss(predict_fn(params, inputs), targets)`."""

    model: Model
    loss: Loss

    def __post_init__(self) -> None:
        check_loss(self.loss)
        object.__setattr__(self, "model", self.model.returning_to(self.loss))

    @property
    def extras(self) -> Extras:
        return self.model.extras

    @property
    def sampler(self) -> tuple[Model, Loss] | None:
        return self.model, self.loss

    def traced_once(self) -> ModelLoss:
        return dataclasses.replace(self, model=self.model.traced_once())

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        outputs = jax.eval_shape(lambda p, e: self.model.outputs(p, e)[0], params, evaluation)
        self.model.check(self.loss, outputs, evaluation.batch, signed=True)

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        return self.model.examples(self.loss, params, evaluation, sizes)

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        return self.model.prepare(self.loss, params, evaluation)

    def stand_in(self, params: PyTree, evaluation: Evaluation, examples: ExampleAxes) -> Evaluation:
        return self.model.stand_in(self.loss, params, evaluation, examples)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        outputs = jax.eval_shape(lambda p, e: self.model.outputs(p, e)[0], params, evaluation)
        return self.model.batch_fault(self.loss, outputs, evaluation.batch, signed=True)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        if evaluation.weights is not None:
            return evaluation.weights
        outputs = jax.eval_shape(lambda p, e: self.model.outputs(p, e)[0], params, evaluation)
        return self.model.effective_weights(self.loss, outputs, evaluation.batch, signed=True)

    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        evaluation = self.prepare(params, evaluation)
        outputs, rest = self.model.outputs(params, evaluation)
        weights = self.effective_weights(params, evaluation)
        return self.loss.value(outputs, self.model.targets(evaluation.batch), weights), rest

    def rounding(self, params: PyTree, evaluation: Evaluation, loss: jax.Array) -> jax.Array:
        # The forward pass is the linearization's own: the compiler merges them.
        outputs = self.model.outputs(params, evaluation)[0]
        weights = self.effective_weights(params, evaluation)
        return self.loss.rounding(outputs, self.model.targets(evaluation.batch), weights)


@dataclasses.dataclass(frozen=True)
class Hessian(Curvature):
    """The Hessian of an objective, products by forward over reverse (reverse over reverse with a `jax.custom_vjp`)."""

    objective: Objective

    @property
    def name(self) -> str:
        return "Hessian"

    @property
    def partition(self) -> TrainablePartition:
        return self.objective.extras.partition

    @property
    def has_rows(self) -> bool:
        return False

    @property
    def has_sampling(self) -> bool:
        return self.objective.sampler is not None

    @property
    def is_random(self) -> bool:
        return False

    @property
    def has_state(self) -> bool:
        return self.objective.extras.has_state

    @property
    def needs_model_key(self) -> bool:
        return self.objective.extras.has_rng

    def traced_once(self) -> Hessian:
        return dataclasses.replace(self, objective=self.objective.traced_once())

    def forward(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective(params, evaluation)[0]

    @property
    def couples_examples(self) -> bool:
        return self.objective.sampler is not None and self.objective.sampler[1].couples_examples

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        self.objective.check(params, evaluation)

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        return self.objective.examples(params, evaluation, sizes)

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        return self.objective.prepare(params, evaluation)

    def stand_in(self, params: PyTree, evaluation: Evaluation, examples: ExampleAxes) -> Evaluation:
        return self.objective.stand_in(params, evaluation, examples)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        return self.objective.batch_fault(params, evaluation)

    def total_weight(self, params: PyTree, evaluation: Evaluation) -> jax.Array | None:
        return self.objective.total_weight(params, evaluation)

    def outputs(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        model, _ = self._model
        return model.outputs(params, evaluation)

    def value_of(self, outputs: jax.Array, evaluation: Evaluation) -> jax.Array:
        model, loss = self._model
        weights = model.effective_weights(loss, outputs, evaluation.batch, signed=True)
        return loss.value(outputs, model.targets(evaluation.batch), weights)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective.effective_weights(params, evaluation)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective(params, evaluation)[0]

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        if needs.rows:
            raise ValueError(_NO_ROWS)
        evaluation = self.prepare(params, evaluation)
        at = second_order(lambda p: self.objective(p, evaluation), params, product=needs.product, shared=needs.shared)
        own = self.total_weight(params, evaluation) if evaluation.total_weight is not None else None

        def counted(v: PyTree) -> PyTree:
            # A piece without weight adds nothing, whatever its total and the derivatives of that are.
            return v if own is None else tree.where(own != 0, v, jax.tree.map(jnp.zeros_like, v))

        return Linearization(
            params_like=jax.eval_shape(tree.upcast, params),
            loss=at.value,
            gradient=counted(at.gradient) if needs.gradient else None,
            product=None if at.product is None else lambda v: counted(at.hvp(v)),
            sampled_gradient=self._sampled_gradient(params, evaluation) if needs.sampling else None,
            rounding=lambda: self.objective.rounding(params, evaluation, at.value),
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=at.rest[0],
            aux=at.rest[1],
            batch_fault=self.batch_fault(params, evaluation),
        )

    def linearize_outputs(self, params: PyTree, evaluation: Evaluation, at: LinearModel, needs: Needs) -> Linearization:
        if needs.rows:
            raise ValueError(_NO_ROWS)
        (model, loss), bend = self._model, at.bend
        if bend is None:
            raise AssertionError("the Hessian of a loss at outputs needs the second derivatives of these.")
        targets, weights = model.targets(evaluation.batch), self.effective_weights(params, evaluation)
        residual = loss.gradient(at.outputs, targets, weights)

        def product(v: PyTree) -> PyTree:
            return tree.add(at.vjp(loss.hessian_product(at.outputs, targets, weights, at.jvp(v))), bend(v, residual))

        return Linearization(
            params_like=jax.eval_shape(tree.upcast, params),
            loss=loss.value(at.outputs, targets, weights),
            gradient=at.vjp(residual) if needs.gradient else None,
            product=product if needs.product else None,
            sampled_gradient=self._sampled(at, targets, weights) if needs.sampling else None,
            rounding=lambda: loss.rounding(at.outputs, targets, weights),
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=at.rest[0],
            aux=at.rest[1],
            batch_fault=self.batch_fault(params, evaluation),
        )

    @property
    def _model(self) -> tuple[Model, Loss]:
        if self.objective.sampler is None:
            raise ValueError("loss_fn does not show the outputs of a model: pass predict_fn and loss.")
        return self.objective.sampler

    def _sampled_gradient(self, params: PyTree, evaluation: Evaluation) -> Callable[[jax.Array], PyTree] | None:
        if self.objective.sampler is None:
            return None
        model, _ = self._model

        def sampled_gradient(key: jax.Array) -> PyTree:
            at = linear_model(lambda p: model.outputs(p, evaluation), params, jvp=False)
            weights = self.effective_weights(params, evaluation)
            return self._sampled(at, model.targets(evaluation.batch), weights)(key)

        return sampled_gradient

    def _sampled(self, at: LinearModel, targets: Any, weights: jax.Array) -> Callable[[jax.Array], PyTree]:
        _, loss = self._model

        def sampled_gradient(key: jax.Array) -> PyTree:
            return at.vjp(loss.sampled_gradient(at.outputs, targets, weights, key))

        return sampled_gradient

    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        return ()

    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        return leaf_axes(self.forward, params, evaluation)

    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        jvp: Callable[[PyTree], jax.Array],
        vjp: Callable[[jax.Array], PyTree],
    ) -> JacobianRows:
        raise ValueError(_NO_ROWS)
