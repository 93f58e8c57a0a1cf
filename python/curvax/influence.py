"""What training examples do to the loss of other examples: influence functions.

Without training example j, whose part of the gradient is g_j, the minimum of the training loss moves by C^-1 g_j to
first order, C its curvature (Cook and Weisberg 1980; Koh and Liang 2017). So the loss of test point i changes by

    influence_ij = grad l_i . C^-1 g_j

An example: f(w) = w, squared error, targets 0 and 1, a sum: w = 1/2, C = 2, g_0 = 1/2. Without example 0 the estimate
is w = 1/2 + 1/4 to first order (and 1 in truth, as the curvature is gone with the example too); the loss of a test
target 0, (1/2)^2 / 2, rises by 1/2 * 1/4 = 1/8.

No gradient of a training example is made. Of a test point s_i = C^-1 grad l_i is one solve, and s_i . g_j for all
examples of a batch one product forward: the tangents J s_i of the outputs, times the residuals of each example.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.curvature import GaussNewton
from curvax.keywords import spread
from curvax.operators.base import LinearOperator, check_square
from curvax.operators.batches import walked
from curvax.operators.curvature import At, CurvatureOperator, ModelArguments, StreamedCurvature
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class InfluenceArguments:
    """Whose influence on whom.

    Attributes:
      inverse: C^-1, any operator of `curvax.operators`: `operators.inverse(C, lam)`, of a Hessian, a Gauss-Newton
        matrix or its Kronecker factors, or the covariance of a `curvax.laplace` posterior.
      train: model, loss, parameters and training data, as `operators.ggn` takes them (`influence.Data(...)`). With
        `reduction="mean"` an example's part of the gradient has the share 1 / N of the mean over all N.
      test: model, loss and data of the test points; each position of the outputs (all axes but the last) counts in the
        loss of its example, with its weight.
      at_once: test points whose solves are made in one batched pass, 32 by default; so many vectors like the parameters
        are alive.
    """

    inverse: LinearOperator
    train: Data
    test: Data
    _: dataclasses.KW_ONLY
    at_once: int = 32

    def __post_init__(self) -> None:
        check_square(self.inverse, "influence")
        if self.at_once < 1:
            raise ValueError(f"at_once must be at least 1, got {self.at_once}.")
        if self.train.loss.couples_examples or self.test.loss.couples_examples:
            raise ValueError("the loss couples examples, which have no influence of their own: use another loss.")


@dataclasses.dataclass(frozen=True)
class Data(ModelArguments):
    """A model, its loss, its parameters, and one batch, a list of batches, or a loader; see `operators.ggn`."""


@spread(InfluenceArguments)
def scores(arguments: InfluenceArguments) -> np.ndarray:
    """How much the loss of each test point would change, to first order, if a training example were left out.

    Positive: the example helps, and without it the loss of the test point rises. Test points are summed over with
    `scores(...).sum(axis=0)`. Memory holds `at_once` vectors like the parameters and one batch, whatever the data.

    Returns:
      (test points, training examples), in the order of the data; on the host.

    Raises:
      ValueError, TypeError: a loss that couples examples, an inverse for other parameters, data that cannot be walked
        twice.
    """
    train, test = arguments.train.matrix(), arguments.test.matrix()
    if jax.tree.map(lambda x: x.shape, arguments.inverse.domain) != jax.tree.map(lambda x: x.shape, train.domain):
        raise ValueError("the inverse multiplies other parameters than those of the model: make it of the same ones.")
    rows = [
        _influences(train, arguments.inverse @ columns)
        for index, batch in enumerate(walked(test.batches))
        for columns in _gradients(test, batch, index, arguments.at_once)
    ]
    return np.concatenate(rows)


@spread(InfluenceArguments)
def self_influences(arguments: InfluenceArguments) -> np.ndarray:
    """grad l_i . C^-1 g_i of each example on itself: how hard it is to predict from the others. `test` is `train`'s
    data.

    Returns:
      (examples,), on the host.
    """
    train, test = arguments.train.matrix(), arguments.test.matrix()
    parts = []
    for index, (batch, share) in enumerate(zip(walked(test.batches), train.shares, strict=True)):
        done = 0
        for columns in _gradients(test, batch, index, arguments.at_once):
            count = columns.shape[1]
            own = _dots(train.curvature, train.at, batch, jnp.int32(index), share, arguments.inverse @ columns)
            parts.append(np.diagonal(np.asarray(own)[:, done : done + count]))
            done += count
    return np.concatenate(parts)


def _influences(train: CurvatureOperator | StreamedCurvature, solutions: jax.Array) -> np.ndarray:
    """(k, examples) of k solutions in columns."""
    parts = [
        np.asarray(_dots(train.curvature, train.at, batch, jnp.int32(index), share, solutions))
        for index, (batch, share) in enumerate(zip(walked(train.batches), train.shares, strict=True))
    ]
    return np.concatenate(parts, axis=1)


@functools.partial(jax.jit, static_argnums=0)
def _dots(
    curvature: GaussNewton, at: At, batch: Any, index: jax.Array, share: jax.Array, solutions: jax.Array
) -> jax.Array:
    """s . g_j for the columns s and the examples j of a batch."""
    evaluation = curvature.prepare(at.params, at.evaluation(batch, index))
    _, unravel = tree.ravel(tree.zeros_like(at.params))

    def outputs(p: PyTree) -> jax.Array:
        return tree.upcast(curvature.model.outputs(tree.cast_like(p, at.params), evaluation)[0])

    values, jvp = jax.linearize(outputs, tree.upcast(at.params))
    residual = _residual(curvature, at.params, evaluation, values)

    def one(column: jax.Array) -> jax.Array:
        products = residual * jvp(unravel(column)).astype(residual.dtype)
        return share.astype(residual.dtype) * jnp.sum(products.reshape(len(products), -1), axis=1)

    return jax.vmap(one, in_axes=1)(solutions)


def _residual(curvature: GaussNewton, params: PyTree, evaluation: Any, outputs: jax.Array) -> jax.Array:
    """The gradient of the loss in the outputs, (B, ...)."""
    weights = curvature.effective_weights(params, evaluation)
    targets = curvature.model.targets(evaluation.batch)
    return curvature.loss.gradient(outputs, targets, weights).reshape(outputs.shape)


def _gradients(
    test: CurvatureOperator | StreamedCurvature, batch: Any, index: int, at_once: int
) -> Iterable[jax.Array]:
    """Gradients of the test points' own losses in columns, (n, k) for up to `at_once` of them at a time."""
    assert isinstance(test.curvature, GaussNewton)
    summed = dataclasses.replace(test.curvature, loss=dataclasses.replace(test.curvature.loss, reduction="sum"))
    shape = jax.eval_shape(lambda p, e: summed.model.outputs(p, e)[0], test.at.params, test.at.evaluation(batch, index))
    for start in range(0, shape.shape[0], at_once):
        count = min(at_once, shape.shape[0] - start)
        places = jnp.arange(start, start + count, dtype=jnp.int32)
        yield _some_gradients(summed, test.at, batch, jnp.int32(index), places)


@functools.partial(jax.jit, static_argnums=0)
def _some_gradients(curvature: GaussNewton, at: At, batch: Any, index: jax.Array, places: jax.Array) -> jax.Array:
    evaluation = curvature.prepare(at.params, at.evaluation(batch, index))

    def outputs(p: PyTree) -> jax.Array:
        return tree.upcast(curvature.model.outputs(tree.cast_like(p, at.params), evaluation)[0])

    values, vjp = jax.vjp(outputs, tree.upcast(at.params))
    residual = _residual(curvature, at.params, evaluation, values)

    def one(place: jax.Array) -> jax.Array:
        alone = jnp.zeros_like(residual).at[place].set(residual[place])
        return tree.ravel(vjp(alone)[0])[0]

    return jax.vmap(one, out_axes=1)(places)
