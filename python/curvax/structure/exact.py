"""Exact quantities of the rows of a model and a loss, for use by themselves: diagonals, norms of gradients.

All of them see a model through its structure (`curvax.structure.report`) and never form the Jacobian. Where examples
interact they form whole rows instead, which costs time and changes no answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import meshes, tree
from curvax.explicit_models import on_automatic_axes
from curvax.keys import check_key
from curvax.keywords import spread
from curvax.losses.base import Loss, check_loss
from curvax.output_space import (
    FisherType,
    GeneralizedGaussNewton,
    GradientOuterProduct,
    ObservedFisher,
    OutputCurvature,
)
from curvax.structure.batch_axes import AxesPrefix, BatchAxes, leading_axes
from curvax.structure.batch_rules import Mixed
from curvax.structure.capture import Capture, Factors, capture
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.structure.outputs import check_model, check_outputs
from curvax.structure.positions import LossWeights, fill_idle_inputs
from curvax.structure.rows import RowSource, row_diagonal
from curvax.structure.squares import formed_bytes, squared_norms
from curvax.tree import PyTree

Predict = Callable[[PyTree, Any], jax.Array]


@dataclasses.dataclass(frozen=True)
class RowArguments:
    """Arguments of what reads the rows of a model and a loss.

    Attributes:
      predict_fn: (params, inputs) -> outputs (B, ...).
      loss: a loss of `curvax.losses`.
      params: parameters.
      inputs: as in `jacobian_gram`.
      targets, weights: as the loss takes them.
      batch_axes: as in `jacobian_gram`.
      max_bytes: bound on the memory of factors and formed rows, beside the result. The default is 2 GiB; less takes
        fewer examples, or rows of one, at a time.
    """

    predict_fn: Predict
    loss: Loss
    params: PyTree
    inputs: Any
    targets: Any
    weights: Any = None
    _: dataclasses.KW_ONLY
    batch_axes: AxesPrefix | None = None
    max_bytes: int = DEFAULT_MAX_BYTES

    def on_any_mesh(self, function: Callable[[Any], PyTree], like: Any) -> PyTree:
        """`function` of these arguments with automatic mesh axes; its result is sharded like `like`."""
        return self.parts_on_any_mesh(lambda own: (function(own),), (like,))[0]

    def parts_on_any_mesh(self, function: Callable[[Any], tuple[PyTree, ...]], like: tuple[Any, ...]) -> Any:
        """The same of a function of several results, each with a `like` of its own."""
        names = tuple(f.name for f in dataclasses.fields(self) if f.name in _ARRAYS)

        def called(*arrays: Any) -> tuple[PyTree, ...]:
            named = dict(zip(names, arrays, strict=True))
            own = dataclasses.replace(self, predict_fn=on_automatic_axes(self.predict_fn), **named)
            return function(own)

        return meshes.automatic(called, tuple(getattr(self, name) for name in names), like)


_ARRAYS = ("params", "inputs", "targets", "weights", "key")


@dataclasses.dataclass(frozen=True)
class DiagonalArguments(RowArguments):
    """The same, and whether an estimate will do.

    Attributes:
      samples: number of draws of all targets; `None` for the exact diagonal.
      key: where they come from; needed for the estimate alone.
    """

    samples: int | None = None
    key: jax.Array | None = None

    def draws(self, samples: int) -> jax.Array:
        """The keys of that many draws.

        Raises:
          ValueError: there is no key, or fewer than one draw.
        """
        if self.key is None or samples < 1:
            raise ValueError("the Monte Carlo diagonal draws targets: pass a random key and at least one sample.")
        check_key("key", self.key)
        return jax.random.split(self.key, samples)


@spread(DiagonalArguments)
def ggn_diagonal(arguments: DiagonalArguments) -> PyTree:
    """The diagonal of the generalized Gauss-Newton matrix of a loss: exact, or an unbiased Monte Carlo estimate.

    The exact one costs a reverse pass per output of an example (Dangel, Kunstner and Hennig 2020), without forming
    gradients of weights that meet an example once. The estimate has `samples` reverse passes instead, whatever
    the number of outputs: the mean square of every example's gradient with targets drawn from the model. Since every
    example has a square of its own, its variance is that of `GaussNewtonBartlett` less the products between examples.

    Returns:
      An upcast tree with the structure of `params`.

    Raises:
      ValueError: samples without a key, or fewer than one; targets or weights that do not fit.
    """
    return arguments.on_any_mesh(_ggn_diagonal, arguments.params)


def _ggn_diagonal(arguments: DiagonalArguments) -> PyTree:
    samples = arguments.samples
    keys = None if samples is None else arguments.draws(samples)
    at = Point.of(arguments)
    if samples is None or keys is None:
        return at.diagonal(GeneralizedGaussNewton())
    loss, targets, outputs = at.loss, at.targets, at.outputs

    def residual(k: jax.Array) -> jax.Array:
        return loss.sampled_gradient(outputs, targets, at.weights.values, k)

    residuals = jax.vmap(residual)(keys)
    residuals *= jnp.asarray(samples**-0.5, residuals.dtype)
    # One row per example and sample: the positions of an example are drawn independently, and their products vanish on
    # average.
    flat = GradientOuterProduct(residuals.reshape(samples, outputs.shape[0], -1))
    flattened = dataclasses.replace(at, predict=_flattened(at.predict), weights=at.weights.flattened(outputs))
    return flattened.row_diagonal(flat)


@spread(RowArguments)
def empirical_fisher_diagonal(arguments: RowArguments) -> PyTree:
    """The exact diagonal of the empirical Fisher: weighted squares of the gradients of every position's own loss.

    It is that of the curvature `ObservedFisher`: positions (all axes of the outputs but the last) count as examples.
    Result and errors as in `ggn_diagonal`.
    """
    return arguments.on_any_mesh(lambda own: Point.of(own).diagonal(ObservedFisher()), arguments.params)


@spread(RowArguments)
def per_example_gradient_norms(arguments: RowArguments) -> jax.Array:
    """Norms of the gradients that the examples contribute to the gradient of the loss, which is their sum.

    With `reduction="sum"` and no weights they are the norms of the examples' own gradients; with "mean" those divided
    by the number of positions. Dense layers form no gradient of an example (Goodfellow 2015). `predict_fn` must treat
    each example by itself.

    Returns:
      (B,) norms, in the widest dtype of the parameters and at least float32.

    Raises:
      ValueError: the examples interact, so that no example has a gradient of its own.
    """
    return arguments.on_any_mesh(_per_example_gradient_norms, meshes.by_examples(arguments.inputs))


def _per_example_gradient_norms(arguments: RowArguments) -> jax.Array:
    return norms_of(*examples_of(arguments))


def examples_of(arguments: RowArguments) -> tuple[Point, Capture]:
    """The model and loss at a point, and the model's layers, of examples that have gradients of their own.

    Raises:
      ValueError: the examples interact.
    """
    check_model(arguments.predict_fn, arguments.params, arguments.inputs)
    at = Point.of(arguments)
    try:
        if at.loss.couples_examples:
            raise Mixed("the loss couples them")
        return at, capture(at.predict, at.params, at.inputs, at.axes)
    except Mixed as mixed:
        because = f"examples have no gradients of their own ({mixed}): use a model and loss without that."
        raise ValueError(because) from None


def norms_of(at: Point, captured: Capture) -> jax.Array:
    """(B,) norms of the examples' parts of the gradient."""
    residual = at.loss.gradient(at.outputs, at.targets, at.weights.values)
    filled = fill_idle_inputs(captured, jax.tree.leaves(at.inputs), at.weights)
    norms = _norms(captured, at.params, filled, residual, at.max_bytes)
    return jnp.where(at.weights.examples == 0, jnp.zeros_like(norms), norms) if at.weights.masks else norms


def gradient_norms(source: RowSource, residual: jax.Array, max_bytes: int = DEFAULT_MAX_BYTES) -> jax.Array:
    """(B,) norms of J_i^T r_i for the residuals r of all examples, in output space.

    Raises:
      ValueError: the examples interact.
    """
    captured = None if source.output.couples_examples else source.captured()
    if captured is None:
        raise ValueError("examples have no gradients of their own: use a model and loss that do not mix them.")
    return _norms(captured, source.params, source.filled_inputs(captured), residual, max_bytes)


def _norms(
    captured: Capture, params: PyTree, inputs: list[jax.Array], residual: jax.Array, max_bytes: int
) -> jax.Array:
    """Norms of J_i^T r_i, (B,), for as many examples at a time as fit."""
    leaves, examples = jax.tree.leaves(params), residual.shape[0]
    own = captured.inputs(leaves, inputs)

    def factors(i: jax.Array) -> Factors:
        return captured.example(leaves, captured.one(own, i), lambda _: residual[i][None, None])

    def norms(some: jax.Array) -> jax.Array:
        return jnp.sqrt(squared_norms(captured, jax.vmap(factors)(some))[:, 0])

    each = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(factors, jnp.int32(0))))
    each += formed_bytes(captured, [leaf.shape for leaf in leaves], rows=1)
    at_once = max(1, max_bytes // max(each, 1))
    if at_once >= examples:
        return jnp.sqrt(squared_norms(captured, captured.batch(leaves, inputs, residual[None]))[:, 0])
    # The last group is filled up with the last example.
    groups = -(-examples // at_once)
    index = jnp.minimum(jnp.arange(groups * at_once, dtype=jnp.int32), examples - 1).reshape(groups, at_once)
    return jax.lax.map(norms, index).reshape(-1)[:examples]


@dataclasses.dataclass(frozen=True)
class Point:
    """A model and loss at a point; attributes as in `RowArguments`, with what follows from them."""

    predict: Predict
    loss: Loss
    params: PyTree
    inputs: Any
    targets: Any
    outputs: jax.Array
    weights: LossWeights
    vjp: Callable[[jax.Array], PyTree]
    axes: BatchAxes | None
    max_bytes: int

    @staticmethod
    def of(arguments: RowArguments) -> Point:
        """Checks the arguments and evaluates the model."""
        predict, loss, params, inputs = arguments.predict_fn, arguments.loss, arguments.params, arguments.inputs
        targets, weights = arguments.targets, arguments.weights
        check_loss(loss)
        outputs, vjp = jax.vjp(lambda p: predict(p, inputs), params)
        check_outputs(outputs)
        loss.check(outputs, targets, weights)
        loss.check_values(outputs, targets, weights)
        observed = loss.observed_weights(outputs, targets, weights)
        counted = LossWeights.of(loss.effective_weights(outputs, observed), outputs, observed)
        axes, back = leading_axes(arguments.batch_axes, inputs), pull(vjp, outputs)
        return Point(predict, loss, params, inputs, targets, outputs, counted, back, axes, arguments.max_bytes)

    def diagonal(self, fisher: FisherType) -> PyTree:
        """The diagonal of J^T Q J for the Q of a Fisher type."""
        return self.row_diagonal(fisher.bind(self.loss, self.outputs, self.targets, self.weights.values, None))

    def row_diagonal(self, output: OutputCurvature) -> PyTree:
        """The diagonal of J^T Q J; zero if nothing counts."""
        weights = self.weights
        source = RowSource(self.predict, self.params, self.inputs, output, self.vjp, self.axes, weights)
        diagonal = row_diagonal(source, self.max_bytes)
        if not weights.masks:
            return diagonal
        return tree.where(jnp.any(weights.flat != 0), diagonal, tree.zeros_like(diagonal))


def pull(vjp: Callable[[jax.Array], tuple[PyTree]], outputs: jax.Array) -> Callable[[jax.Array], PyTree]:
    """u -> J^T u, upcast."""
    return lambda u: tree.upcast(vjp(u.reshape(outputs.shape).astype(outputs.dtype))[0])


def _flattened(predict: Predict) -> Predict:
    def flattened(params: PyTree, inputs: Any) -> jax.Array:
        outputs = predict(params, inputs)
        return outputs.reshape(outputs.shape[0], -1)

    return flattened
