"""The Gauss-Newton family: C = J^T Q J with Q in output space."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from curvax import tree
from curvax.curvature.base import Curvature, Evaluation, JacobianRows, LayerFactors, Linearization, Measure, Needs
from curvax.curvature.differentiate import LinearModel, linear_model
from curvax.curvature.model import Model
from curvax.curvature.partition import TrainablePartition
from curvax.kernels import Choice, Op, Request
from curvax.losses.base import Loss, Shaped, check_loss
from curvax.output_space import FisherType, GeneralizedGaussNewton
from curvax.spelling import check_instance
from curvax.structure.axes import LeafAxes, leaf_axes
from curvax.structure.batch_axes import ExampleAxes
from curvax.structure.batch_rules import Mixed
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.capture import Capture, capture
from curvax.structure.find_blocks import find_blocks
from curvax.structure.kronecker import examples_of
from curvax.structure.report import LeafStructure, report
from curvax.structure.rows import RowSource
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class GaussNewton(Curvature):
    """J^T Q J for `loss(predict_fn(params, inputs), targets)`, with J the Jacobian of the outputs.

    Attributes:
      model: the model and the keys of its batch.
      loss: the loss in output space.
      fisher: Q: generalized Gauss-Newton (default), Monte Carlo Fisher or empirical Fisher.
    """

    model: Model
    loss: Loss
    fisher: FisherType = GeneralizedGaussNewton()

    def __post_init__(self) -> None:
        check_loss(self.loss)
        check_instance("fisher", self.fisher, FisherType)
        object.__setattr__(self, "model", self.model.returning_to(self.loss))

    @property
    def name(self) -> str:
        return f"{self.fisher.name} of {type(self.loss).__name__}"

    @property
    def partition(self) -> TrainablePartition:
        return self.model.extras.partition

    @property
    def has_rows(self) -> bool:
        return True

    @property
    def has_sampling(self) -> bool:
        return True

    @property
    def has_factors(self) -> bool:
        return True

    @property
    def is_random(self) -> bool:
        return self.fisher.is_random

    @property
    def has_state(self) -> bool:
        return self.model.extras.has_state

    @property
    def needs_model_key(self) -> bool:
        return self.model.extras.has_rng

    def forward(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self.model.outputs(params, evaluation)[0]

    def kernels(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[Op, Request], ...]:
        if not self.fisher.uses_loss_hessian:
            return ()
        return self.loss.kernels(jax.eval_shape(self.forward, params, evaluation))

    def with_kernels(self, choices: Mapping[str, Choice]) -> GaussNewton:
        return dataclasses.replace(self, loss=self.loss.with_kernels(choices))

    def traced_once(self) -> GaussNewton:
        return dataclasses.replace(self, model=self.model.traced_once())

    @property
    def judges_steps(self) -> bool:
        return self.loss.judges_steps

    @property
    def couples_examples(self) -> bool:
        return self.loss.couples_examples

    def check(self, params: PyTree, evaluation: Evaluation) -> None:
        outputs = jax.eval_shape(self.forward, params, evaluation)
        if outputs.shape[0] == 0:
            raise ValueError("the batch is empty: give it at least one example.")
        self.model.check(self.loss, outputs, evaluation.batch, signed=False)

    def examples(self, params: PyTree, evaluation: Evaluation, sizes: Callable[[int], Sequence[int]]) -> ExampleAxes:
        return self.model.examples(self.loss, params, evaluation, sizes)

    def prepare(self, params: PyTree, evaluation: Evaluation) -> Evaluation:
        return self.model.prepare(self.loss, params, evaluation)

    def stand_in(self, params: PyTree, evaluation: Evaluation, examples: ExampleAxes) -> Evaluation:
        return self.model.stand_in(self.loss, params, evaluation, examples)

    def batch_fault(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        return self._batch_fault(jax.eval_shape(self.forward, params, evaluation), evaluation)

    def _batch_fault(self, outputs: Shaped, evaluation: Evaluation) -> jax.Array:
        return self.model.batch_fault(self.loss, outputs, evaluation.batch, signed=False)

    def effective_weights(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        if evaluation.weights is not None:
            return evaluation.weights
        return self.weights_of(jax.eval_shape(self.forward, params, evaluation), evaluation)

    def value(self, params: PyTree, evaluation: Evaluation) -> jax.Array:
        evaluation = self.prepare(params, evaluation)
        return self.value_of(self.forward(params, evaluation), evaluation)

    def outputs(self, params: PyTree, evaluation: Evaluation) -> tuple[jax.Array, tuple[PyTree, Any]]:
        return self.model.outputs(params, evaluation)

    def value_of(self, outputs: jax.Array, evaluation: Evaluation) -> jax.Array:
        weights = self.weights_of(outputs, evaluation)
        return self.loss.value(outputs, self.model.targets(evaluation.batch), weights)

    def linearize(self, params: PyTree, evaluation: Evaluation, needs: Needs) -> Linearization:
        evaluation = self.prepare(params, evaluation)
        curved = needs.product or needs.rows
        at = linear_model(lambda p: self.model.outputs(p, evaluation), params, jvp=curved, shared=needs.shared)
        return self.linearize_outputs(params, evaluation, at, needs)

    def linearize_outputs(self, params: PyTree, evaluation: Evaluation, at: LinearModel, needs: Needs) -> Linearization:
        targets = self.model.targets(evaluation.batch)
        weights = self.weights_of(at.outputs, evaluation)
        curved = needs.product or needs.rows
        rows = self.rows(params, evaluation, at.outputs, at.jvp, at.vjp) if curved else None
        rows = None if rows is None else dataclasses.replace(rows, second=at.second)
        residual = self.loss.gradient(at.outputs, targets, weights)
        return Linearization(
            params_like=jax.eval_shape(tree.upcast, params),
            loss=self.loss.value(at.outputs, targets, weights),
            gradient=at.vjp(residual) if needs.gradient else None,
            output_gradient=residual,
            product=rows.product if rows is not None else None,
            quadratic=rows.quadratic if rows is not None else None,
            sampled_gradient=self._sampled_gradient(at, targets, weights) if needs.sampling else None,
            rows=rows if needs.rows else None,
            layer_factors=self._layer_factors(params, evaluation, at.outputs, weights) if needs.factors else None,
            rounding=lambda: self.loss.rounding(at.outputs, targets, weights),
            leaf_axes=lambda: self.leaf_axes(params, evaluation),
            model_state=at.rest[0],
            aux=at.rest[1],
            batch_fault=self._batch_fault(at.outputs, evaluation),
        )

    def structure(self, params: PyTree, evaluation: Evaluation) -> tuple[LeafStructure, ...]:
        inputs, axes = self.model.inputs(evaluation.batch), self.model.input_axes(evaluation)
        return report(lambda p, x: self._predict(p, x, evaluation), params, inputs, batch_axes=axes)

    def leaf_axes(self, params: PyTree, evaluation: Evaluation) -> tuple[tuple[LeafAxes, ...], ...]:
        return leaf_axes(self.forward, params, evaluation)

    def blocks(self, params: PyTree, evaluation: Evaluation) -> KroneckerBlocks:
        captured = self._by_example._capture(params, evaluation)
        return find_blocks(captured, [leaf.shape for leaf in jax.tree.leaves(params)])

    @property
    def _by_example(self) -> GaussNewton:
        """The operator that Kronecker factors approximate; raises ValueError if there is none."""
        return dataclasses.replace(self, loss=self.loss.by_example)

    def _capture(self, params: PyTree, evaluation: Evaluation) -> Capture:
        inputs = self.model.inputs(evaluation.batch)

        def predict(p: PyTree, x: Any) -> jax.Array:
            return self._predict(p, x, evaluation)

        try:
            return capture(predict, params, inputs, self.model.input_axes(evaluation), approximate=True)
        except Mixed as mixed:
            raise ValueError(
                f"Kronecker factors are taken example by example, and the model mixes examples ({mixed}): make it "
                "treat examples one by one, say by batch_axes= which axes hold them if these are not the first ones, "
                "or give what acts as a whole (a graph, a set) as one example with a leading axis of length one."
            ) from None

    def _layer_factors(
        self, params: PyTree, evaluation: Evaluation, outputs: jax.Array, weights: jax.Array
    ) -> LayerFactors:
        def layer_factors(fisher: FisherType, key: jax.Array) -> Callable[[Measure], PyTree]:
            targets, signs = jax.random.split(key)
            loss = self.loss.by_example
            output = fisher.bind(loss, outputs, self.model.targets(evaluation.batch), weights, targets)
            captured, inputs = self._capture(params, evaluation), self.model.inputs(evaluation.batch)
            counted = self.model.loss_weights(self.loss, weights, outputs, evaluation.batch)
            factors = captured.batch(jax.tree.leaves(params), jax.tree.leaves(inputs), output.cotangents(signs))
            examples = examples_of(captured, factors, counted)
            return lambda measure: measure(examples)

        return layer_factors

    def _predict(self, params: PyTree, inputs: Any, evaluation: Evaluation) -> jax.Array:
        return self.model.call(params, inputs, evaluation)[0]

    def rows(
        self,
        params: PyTree,
        evaluation: Evaluation,
        outputs: jax.Array,
        jvp: Callable[[PyTree], jax.Array],
        vjp: Callable[[jax.Array], PyTree],
    ) -> JacobianRows:
        targets = self.model.targets(evaluation.batch)
        weights = self.weights_of(outputs, evaluation)
        output = self.fisher.bind(self.loss, outputs, targets, weights, evaluation.sample_key)
        inputs, axes = self.model.inputs(evaluation.batch), self.model.input_axes(evaluation)

        def predict(p: PyTree, x: Any) -> jax.Array:
            return self._predict(p, x, evaluation)

        return JacobianRows.of(RowSource(predict, params, inputs, output, vjp, axes), jvp)

    def weights_of(self, outputs: Shaped, evaluation: Evaluation) -> jax.Array:
        """`effective_weights` for outputs that are at hand."""
        if evaluation.weights is not None:
            return evaluation.weights
        return self.model.effective_weights(self.loss, outputs, evaluation.batch, signed=False)

    def _sampled_gradient(self, at: LinearModel, targets: Any, weights: jax.Array) -> Callable[[jax.Array], PyTree]:
        def sampled_gradient(key: jax.Array) -> PyTree:
            return at.vjp(self.loss.sampled_gradient(at.outputs, targets, weights, key))

        return sampled_gradient
