"""The Hessian of a scalar loss, in general indefinite."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, Linearization, Needs, Rows
from curvax.curvature.differentiate import linear_model, second_order
from curvax.curvature.model import Extras, Model
from curvax.curvature.partition import Partition
from curvax.losses.base import Loss, check_loss
from curvax.structure.axes import LeafAxes, leaf_axes
from curvax.structure.report import LeafStructure
from curvax.tree import PyTree

_NO_ROWS = "the Hessian has no row factors: use a parameter-space solver, or the Gauss-Newton matrix."


class Objective(abc.ABC):
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
    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        """Raises a one-sentence error for a batch that does not fit."""

    @abc.abstractmethod
    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """Weights of the examples in the loss, normaliser included."""

    @abc.abstractmethod
    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        """Returns (loss, (new model state, aux))."""


@dataclasses.dataclass(frozen=True)
class LossFunction(Objective):
    """`loss_fn(params, batch) -> scalar`.

    Attributes:
      loss_fn: the function.
      extras: state, aux, random key, frozen parameters.
      reduction: how `loss_fn` combines examples; microbatching weighs the pieces accordingly.
      keys: keys that the batch must hold, checked before tracing; empty if the batch is not a mapping.
    """

    loss_fn: Callable[..., Any]
    extras: Extras = Extras()
    reduction: Literal["mean", "sum"] = "mean"
    keys: tuple[str, ...] = ()

    @property
    def sampler(self) -> tuple[Model, Loss] | None:
        return None

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        for key in self.keys:
            if not isinstance(evaluation.batch, Mapping) or key not in evaluation.batch:
                raise KeyError(f"the batch has no '{key}': add it or change the key's option.")
        value = jax.eval_shape(lambda p, e: self(p, e)[0], params, evaluation)
        if not hasattr(value, "shape") or value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError("loss_fn must return a floating-point scalar: reduce over the batch inside it.")

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        if evaluation.omega is not None:
            return evaluation.omega
        examples = jax.tree.leaves(evaluation.batch)[0].shape[0]
        share = 1.0 / max(examples, 1) if self.reduction == "mean" else 1.0
        return jnp.full((examples,), share, tree.scalar_dtype(params))

    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        value, rest = self.extras.call(self.loss_fn, params, evaluation.batch, evaluation)
        value = value.astype(tree.wide_dtype(value.dtype))
        if evaluation.omega is None:
            return value, rest
        # A slice of a larger batch: its mean counts with the slice's share of the whole, its sum as it is.
        share = jnp.sum(evaluation.omega) if self.reduction == "mean" else jnp.ones((), value.dtype)
        return value * share.astype(value.dtype), rest


@dataclasses.dataclass(frozen=True)
class ModelLoss(Objective):
    """`loss(predict_fn(params, inputs), targets)`."""

    model: Model
    loss: Loss

    def __post_init__(self) -> None:
        check_loss(self.loss)

    @property
    def extras(self) -> Extras:
        return self.model.extras

    @property
    def sampler(self) -> tuple[Model, Loss] | None:
        return self.model, self.loss

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        targets, weights = self.model.targets(evaluation.batch), self.model.weights(evaluation.batch)
        outputs = jax.eval_shape(lambda p, e: self.model.outputs(p, e)[0], params, evaluation)
        self.loss.check(outputs, targets, weights)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        if evaluation.omega is not None:
            return evaluation.omega
        outputs = jax.eval_shape(lambda p, e: self.model.outputs(p, e)[0], params, evaluation)
        return self.loss.effective_weights(outputs, self.model.weights(evaluation.batch))

    def __call__(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        outputs, rest = self.model.outputs(params, evaluation)
        omega = self.effective_weights(params, evaluation)
        return self.loss.value(outputs, self.model.targets(evaluation.batch), omega), rest


@dataclasses.dataclass(frozen=True)
class Hessian(Curvature):
    """The Hessian of an objective, products by forward over reverse (reverse over reverse with a `jax.custom_vjp`)."""

    objective: Objective

    @property
    def name(self) -> str:
        return "Hessian"

    @property
    def partition(self) -> Partition:
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

    def forward(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective(params, evaluation)[0]

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        self.objective.check(params, evaluation)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective.effective_weights(params, evaluation)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.objective(params, evaluation)[0]

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        if needs.rows:
            raise ValueError(_NO_ROWS)
        at = second_order(lambda p: self.objective(p, evaluation), params, product=needs.product, shared=needs.shared)
        return Linearization(
            params_like=jax.eval_shape(tree.widen, params),
            loss=at.value,
            gradient=at.gradient if needs.gradient else None,
            product=at.product,
            sampled_gradient=self._sampled_gradient(params, evaluation) if needs.sampling else None,
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=at.rest[0],
            aux=at.rest[1],
        )

    def _sampled_gradient(self, params: PyTree, evaluation: Evaluation) -> Callable[[jax.Array], PyTree] | None:
        if self.objective.sampler is None:
            return None
        model, loss = self.objective.sampler

        def sampled_gradient(key: jax.Array) -> PyTree:
            at = linear_model(lambda p: model.outputs(p, evaluation), params, push=False)
            targets = model.targets(evaluation.batch)
            omega = self.effective_weights(params, evaluation)
            sampled = loss.sample_targets(at.outputs, targets, key)
            return at.pull(loss.gradient(at.outputs, sampled, jnp.sqrt(omega)))

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
        push: Callable[[PyTree], jax.Array],
        pull: Callable[[jax.Array], PyTree],
    ) -> Rows:
        raise ValueError(_NO_ROWS)
