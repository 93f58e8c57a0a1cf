"""Curvature matrices as operators: Hessian, Gauss-Newton matrix, Fisher matrices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import (
    Curvature,
    Evaluation,
    FisherType,
    GaussNewton,
    GeneralizedGaussNewton,
    Hessian,
    Model,
    MonteCarloFisher,
    Needs,
    Objective,
    ObservedFisher,
)
from curvax.curvature.hessian import LossFunction
from curvax.keys import check_key
from curvax.keywords import spread
from curvax.losses.base import Loss
from curvax.numbers import is_known
from curvax.operators.base import SymmetricOperator
from curvax.operators.batches import is_mean, is_one_batch, raw_weight, shares, walked
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class At:
    """What a curvature depends on beside its batch.

    Attributes:
      params: the trainable part of the parameters.
      frozen: the rest, `None` where a leaf is trainable.
      model_state: mutable model state, or `None`.
      key: of sampled targets and of the model (dropout), or `None`.
    """

    params: PyTree
    frozen: PyTree = None
    model_state: PyTree = None
    key: jax.Array | None = None

    def evaluation(self, batch: Any, index: int | jax.Array) -> Evaluation:
        """The evaluation of one batch, whose random numbers follow its place."""
        keys: tuple[Any, Any] = (None, None)
        if self.key is not None:
            keys = tuple(jax.random.split(jax.random.fold_in(self.key, index)))
        return Evaluation(batch, self.frozen, self.model_state, *keys)


@dataclasses.dataclass(frozen=True)
class _AtParameters(SymmetricOperator):
    """A curvature at fixed parameters, whatever its batches are."""

    curvature: Curvature = dataclasses.field(metadata={"static": True})
    at: At

    @property
    def domain(self) -> PyTree:
        return tree.upcast_shapes(self.at.params)

    @property
    def is_positive(self) -> bool:
        # Of a loss that is convex in the model's outputs, as all of `curvax.losses` are.
        return self.curvature.has_rows


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CurvatureOperator(_AtParameters):
    """The curvature of a loss over one batch or several, at fixed parameters.

    Attributes:
      curvature: whose products it takes; static.
      at: the parameters and what else is fixed.
      batches: the batches.
      shares: the factor of each.
    """

    batches: tuple[Any, ...]
    shares: tuple[jax.Array, ...]

    def linearized(self) -> Callable[[PyTree], PyTree]:
        products = [_linearize(self.curvature, self.at, batch, i) for i, batch in enumerate(self.batches)]

        def product(v: PyTree) -> PyTree:
            terms = [tree.scale(s, one(v)) for s, one in zip(self.shares, products, strict=True)]
            return functools.reduce(tree.add, terms)

        return product


@dataclasses.dataclass(frozen=True)
class StreamedCurvature(_AtParameters):
    """The same over batches that are walked anew for every product; it lives outside of `jax.jit`.

    One compiled program serves all batches of equal shapes. Of its inverses those of `scipy` work on it (`as_scipy`).

    Attributes:
      curvature, at: as above.
      batches: walked once for each product, and once for the shares.
      progress: called as (number of batches done) after each batch of a product; `None` for nobody.
    """

    batches: Iterable[Any]
    progress: Callable[[int], None] | None = None

    @functools.cached_property
    def shares(self) -> tuple[jax.Array, ...]:
        """The factor of each batch, from one walk."""
        weights = tuple(
            raw_weight(self.curvature, self.at.params, self.at.evaluation(batch, i))
            for i, batch in enumerate(walked(self.batches))
        )
        return shares(weights, is_mean(self.curvature))

    def linearized(self) -> Callable[[PyTree], PyTree]:
        return self.apply

    def apply(self, v: PyTree) -> PyTree:
        return self._walk(v, _add_batch)

    def flat(self, v: jax.Array) -> jax.Array:
        _, unravel = tree.ravel(tree.zeros_like(self.domain))
        return tree.ravel(self.apply(unravel(v)))[0]

    def columns(self, matrix: jax.Array) -> jax.Array:
        _, unravel = tree.ravel(tree.zeros_like(self.domain))
        results = self._walk(jax.vmap(unravel, in_axes=1)(matrix), _add_batch_to_each)
        return jax.vmap(lambda x: tree.ravel(x)[0], out_axes=1)(results)

    def _walk(self, v: PyTree, add: Callable[..., PyTree]) -> PyTree:
        if not all(is_known(x) for x in jax.tree.leaves(v)):
            raise TypeError(
                "an operator on a stream of batches walks them in Python and cannot be traced: "
                "pass its batches as a list to put products inside jit, solvers and spectra."
            )
        total = jax.tree.map(jnp.zeros_like, v)
        for index, (batch, share) in enumerate(zip(walked(self.batches), self.shares, strict=True)):
            total = add(self.curvature, self.at, batch, jnp.asarray(index, jnp.int32), share, v, total)
            if self.progress is not None:
                self.progress(index + 1)
        return total


def _linearize(curvature: Curvature, at: At, batch: Any, index: jax.Array | int) -> Callable[[PyTree], PyTree]:
    linearization = curvature.linearize(at.params, at.evaluation(batch, index), Needs(product=True))
    assert linearization.product is not None
    return linearization.product


@functools.partial(jax.jit, static_argnums=0)
def _add_batch(
    curvature: Curvature, at: At, batch: Any, index: jax.Array, share: jax.Array, v: PyTree, total: PyTree
) -> PyTree:
    """One program for all batches of equal shapes."""
    return tree.add(total, tree.scale(share, _linearize(curvature, at, batch, index)(v)))


@functools.partial(jax.jit, static_argnums=0)
def _add_batch_to_each(
    curvature: Curvature, at: At, batch: Any, index: jax.Array, share: jax.Array, v: PyTree, total: PyTree
) -> PyTree:
    """The same for vectors along a new first axis of every leaf."""
    product = _linearize(curvature, at, batch, index)
    return tree.add(total, tree.scale(share, jax.vmap(product)(v)))


def of_curvature(
    curvature: Curvature, params: PyTree, data: Any, *, key: jax.Array | None = None, model_state: PyTree = None
) -> CurvatureOperator | StreamedCurvature:
    """A curvature of `curvax.curvature` as an operator.

    Args:
      curvature: a `GaussNewton`, a `Hessian`, or one of your own.
      params: where it is taken. Its vectors are trees of the parameters that train.
      data: a batch as the curvature takes it; a list of them; or an object whose iteration starts anew for each
        product (a loader), which gives a `StreamedCurvature`. Batches may have different sizes.
      key: random key for curvatures that sample targets and models that take one; the same key gives the same operator.
      model_state: the model's state, for models that have one.

    Raises:
      ValueError, TypeError, KeyError: a batch that does not fit, a missing key, batches that do not add up.
    """
    if key is not None:
        check_key("key", key)
    elif curvature.is_random or curvature.needs_model_key:
        raise ValueError(f"the {curvature.name} draws random numbers: pass `key`.")
    trainable, frozen = curvature.partition.split(params)
    at = At(trainable, frozen, model_state, key)
    if is_one_batch(data):
        curvature.check(trainable, at.evaluation(data, 0))
        return CurvatureOperator(curvature, at, (data,), (jnp.ones((), tree.scalar_dtype(trainable)),))
    if not isinstance(data, list):
        return StreamedCurvature(curvature, at, data)
    batches = tuple(walked(data))
    for index, batch in enumerate(batches):
        curvature.check(trainable, at.evaluation(batch, index))
    weights = [raw_weight(curvature, trainable, at.evaluation(batch, i)) for i, batch in enumerate(batches)]
    return CurvatureOperator(curvature, at, batches, shares(weights, is_mean(curvature)))


def hessian(
    objective: Objective | Callable[..., Any],
    params: PyTree,
    data: Any,
    *,
    key: jax.Array | None = None,
    model_state: PyTree = None,
) -> CurvatureOperator | StreamedCurvature:
    """The Hessian of a loss, in general indefinite.

    Args:
      objective: `loss_fn(params, batch)`, a mean over the examples (or `-> (total, weight)`); or an `Objective` such as
        `curvature.ModelLoss(curvature.Model(predict_fn), loss)`.
      params, data, key, model_state: see `of_curvature`.
    """
    whole = objective if isinstance(objective, Objective) else LossFunction(objective)
    return of_curvature(Hessian(whole), params, data, key=key, model_state=model_state)


@dataclasses.dataclass(frozen=True)
class ModelArguments:
    """Arguments of the matrices of a model and a loss.

    Attributes:
      model: `predict_fn(params, inputs)`, or a `curvature.Model` with the keys of its batch and what else it takes.
      loss: a loss of `curvax.losses`.
      params, data: see `of_curvature`.
      fisher: Q. By default the whole Hessian of the loss in the outputs, for factors at a backward pass per output;
        `MonteCarloFisher(n)` draws n targets and takes n; `ObservedFisher()` takes those of the data.
      key, model_state: see `of_curvature`.
    """

    model: Model | Callable[..., jax.Array]
    loss: Loss
    params: PyTree
    data: Any
    _: dataclasses.KW_ONLY
    fisher: FisherType = GeneralizedGaussNewton()
    key: jax.Array | None = None
    model_state: PyTree = None

    def matrix(self) -> CurvatureOperator | StreamedCurvature:
        """J^T Q J."""
        model = self.model if isinstance(self.model, Model) else Model(self.model)
        curvature = GaussNewton(model, self.loss, self.fisher)
        return of_curvature(curvature, self.params, self.data, key=self.key, model_state=self.model_state)


@spread(ModelArguments)
def ggn(arguments: ModelArguments) -> CurvatureOperator | StreamedCurvature:
    """The generalized Gauss-Newton matrix J^T Q J, Q the Hessian of the loss in the outputs (Schraudolph 2002)."""
    return arguments.matrix()


def fisher(
    model: Model | Callable[..., jax.Array],
    loss: Loss,
    params: PyTree,
    data: Any,
    key: jax.Array,
    *,
    n_samples: int = 1,
    model_state: PyTree = None,
) -> CurvatureOperator | StreamedCurvature:
    """The Fisher matrix from targets drawn from the model: `ggn` in expectation, for losses that are likelihoods.

    Args:
      model, loss, params, data, model_state: see `ggn`.
      key: where targets come from; the same key gives the same matrix.
      n_samples: draws of all targets. The default, 1, is the cheapest.
    """
    return ggn(model, loss, params, data, fisher=MonteCarloFisher(n_samples), key=key, model_state=model_state)


def empirical_fisher(
    model: Model | Callable[..., jax.Array], loss: Loss, params: PyTree, data: Any, *, model_state: PyTree = None
) -> CurvatureOperator | StreamedCurvature:
    """Weighted sum of outer products of the positions' own gradients, with the batch's targets.

    Args:
      model, loss, params, data, model_state: see `ggn`.
    """
    return ggn(model, loss, params, data, fisher=ObservedFisher(), model_state=model_state)
