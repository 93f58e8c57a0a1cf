"""What is between a model's parameters and its loss: an array of outputs, or hidden states and a head (`head`)."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, final

import jax

from curvax.curvature import Evaluation, GaussNewton, SumOfTerms
from curvax.curvature.differentiate import linear_model
from curvax.kernels import Choice, Op, Request
from curvax.layerwise.block_maps import Tangents
from curvax.losses import Loss
from curvax.tree import PyTree


class OutputLoss(abc.ABC):
    """The loss of one minibatch and its curvature in output space, at the outputs f0 of theta0.

    Where the minibatch is a share that stands for all of them, what a tangent adds to the gradient at f0 is multiplied
    by a factor, the scale.

    Tangents and cotangents are trees like the outputs, in the accumulation dtype. Of blocks, each leaf is `Tangents`:
    the blocks that reach it; a block's cotangents are those of the outputs that it reaches.
    """

    @abc.abstractmethod
    def value(self) -> jax.Array:
        """L(f0)."""

    @abc.abstractmethod
    def residual(self) -> PyTree:
        """The gradient of L at f0."""

    @abc.abstractmethod
    def slope(self, v: PyTree) -> tuple[jax.Array, PyTree]:
        """(L(f0), gradient of the inner problem at the tangents v)."""

    @abc.abstractmethod
    def product(self, v: PyTree) -> PyTree:
        """H v, times the scale."""

    @abc.abstractmethod
    def slopes(self, v: PyTree) -> tuple[jax.Array, PyTree]:
        """As `slope`, of every block by itself."""

    @abc.abstractmethod
    def products(self, v: PyTree) -> PyTree:
        """As `product`, of every block by itself."""


@dataclasses.dataclass(frozen=True)
class LinearizedOutputs:
    """One minibatch at theta0.

    Attributes:
      loss: in output space.
      jvp: v -> J v, upcast parameter vector to upcast outputs.
      vjp: u -> J^T u.
      model_state: the model's new state.
    """

    loss: OutputLoss
    jvp: Callable[[PyTree], PyTree]
    vjp: Callable[[PyTree], PyTree]
    model_state: PyTree


class Outputs(abc.ABC):
    """How the outputs of `curvature`'s model are made and how its loss is taken of them."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms of the loss; none of a loss without terms."""
        return ()

    def losses(self, params: PyTree, evaluation: Evaluation) -> dict[str, jax.Array]:
        """What each term adds to the loss, by name."""
        del params, evaluation
        return {}

    @abc.abstractmethod
    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        """Raises TypeError or ValueError where model, loss and batch do not fit; nothing is computed."""

    @abc.abstractmethod
    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """What is wrong with the values of the batch, a `curvax.losses.BatchFault` as an int32 scalar."""

    @abc.abstractmethod
    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        """The ops that are called, and what is asked of them."""

    @abc.abstractmethod
    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        """The loss."""

    @abc.abstractmethod
    def gradient(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree]:
        """The loss and its gradient, by reverse mode alone."""

    @abc.abstractmethod
    def linearize(
        self, params: PyTree, evaluation: Evaluation, prox_linear: bool, scale: jax.Array | None
    ) -> LinearizedOutputs:
        """Evaluates and linearizes the model once; `prox_linear` as in `InnerProblem`, no `scale` is 1."""


@final
@dataclasses.dataclass(frozen=True)
class ArrayOutputs(Outputs):
    """The model returns one array, and the loss takes it.

    Attributes:
      curvature: model and loss.
    """

    curvature: GaussNewton

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        self.curvature.check(params, evaluation)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.curvature.batch_fault(params, evaluation)

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        return self.curvature.kernels(params, evaluation)

    def with_kernels(self, choices: Mapping[str, Choice]) -> ArrayOutputs:
        """The same with the implementations of its ops chosen."""
        return ArrayOutputs(self.curvature.with_kernels(choices))

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.curvature.value(params, evaluation)

    def gradient(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(self.value)(params, evaluation)

    def linearize(
        self, params: PyTree, evaluation: Evaluation, prox_linear: bool, scale: jax.Array | None
    ) -> LinearizedOutputs:
        model = self.curvature.model
        at = linear_model(lambda p: model.outputs(p, evaluation), params, jvp=True)
        if at.jvp is None:
            raise AssertionError("a model linearized with jvp=True has one.")
        loss = self.loss(at.outputs, evaluation, prox_linear, scale)
        return LinearizedOutputs(loss, at.jvp, at.vjp, at.rest[0])

    def loss(self, outputs: jax.Array, evaluation: Evaluation, prox_linear: bool, scale: jax.Array | None) -> ArrayLoss:
        """The loss at these outputs; arguments as for `linearize`."""
        targets = self.curvature.model.targets(evaluation.batch)
        weights = self.curvature.weights_of(outputs, evaluation)
        return ArrayLoss(self.curvature.loss, outputs, targets, weights, prox_linear, scale)


@final
@dataclasses.dataclass(frozen=True)
class TermOutputs(Outputs):
    """Several models, each with a loss of its own.

    Attributes:
      curvature: the terms.
    """

    curvature: SumOfTerms

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(term.name for term in self.curvature.terms)

    def losses(self, params: PyTree, evaluation: Evaluation) -> dict[str, jax.Array]:
        return self.curvature.values(params, evaluation)

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        self.curvature.check(params, evaluation)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.curvature.batch_fault(params, evaluation)

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        return self.curvature.kernels(params, evaluation)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.curvature.value(params, evaluation)

    def gradient(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, PyTree]:
        return jax.value_and_grad(self.value)(params, evaluation)

    def linearize(
        self, params: PyTree, evaluation: Evaluation, prox_linear: bool, scale: jax.Array | None
    ) -> LinearizedOutputs:
        raise AssertionError("the terms of a loss are linearized one by one (InnerProblem).")


@final
@dataclasses.dataclass(frozen=True)
class ArrayLoss(OutputLoss):
    """A loss at an array of outputs.

    Attributes:
      loss, outputs, targets, weights: as in `Loss`.
      prox_linear: whether slopes are those of the loss at the outputs plus the tangent.
      scale: see `OutputLoss`; `None` is 1.
    """

    loss: Loss
    outputs: jax.Array
    targets: Any
    weights: jax.Array
    prox_linear: bool
    scale: jax.Array | None = None

    def value(self) -> jax.Array:
        return self.loss.value(self.outputs, self.targets, self.weights)

    def residual(self) -> jax.Array:
        return self.loss.gradient(self.outputs, self.targets, self.weights)

    def slope(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        return self.value(), self._slope(v)

    def product(self, v: jax.Array) -> jax.Array:
        product = self.loss.hessian_product(self.outputs, self.targets, self.weights, v)
        return product if self.scale is None else self.scale.astype(product.dtype) * product

    def slopes(self, v: Tangents) -> tuple[jax.Array, Tangents]:
        return self.value(), self._each(self._slope, v)

    def products(self, v: Tangents) -> Tangents:
        return self._each(self.product, v)

    def _slope(self, v: jax.Array) -> jax.Array:
        if not self.prox_linear:
            return self.residual() + self.product(v)
        there = self.loss.gradient(self.outputs.astype(v.dtype) + v, self.targets, self.weights)
        if self.scale is None:
            return there
        residual = self.residual()
        return residual + self.scale.astype(v.dtype) * (there - residual)

    def _each(self, function: Callable[[jax.Array], jax.Array], v: Tangents) -> Tangents:
        return dataclasses.replace(v, value=jax.vmap(function)(v.value)) if v.blocks else v
