"""The data of an operator: one batch, a list of batches, or something that can be walked again and again.

The loss of several batches is that of all their examples together. A mean over them is the mean of the batches' means
by their shares, and so is its curvature:

    batch      examples   share        C = 4/10 C_0 + 4/10 C_1 + 2/10 C_2
      0           4       4/10
      1           4       4/10         weights and masks count as they do in the loss: a share is the
      2           2       2/10         batch's part of the sum of weights
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.curvature import Curvature, Evaluation, GaussNewton, Hessian, ModelLoss
from curvax.curvature.hessian import LossFunction
from curvax.curvature.model import Model
from curvax.losses.base import Loss, positions_shape
from curvax.structure.batch_axes import BatchAxes
from curvax.tree import PyTree


def is_one_batch(data: Any) -> bool:
    """Whether the data are one batch: anything but a list and what has to be walked to get at its batches."""
    if isinstance(data, list):
        return False
    known = isinstance(data, Mapping | tuple | jax.Array | np.ndarray | np.generic | float | int | bool)
    return known or not isinstance(data, Iterable)


def walked(data: Iterable[Any]) -> Iterator[Any]:
    """The batches of one walk.

    Raises:
      TypeError: the data can be walked once only.
      ValueError: there is no batch.
    """
    if isinstance(data, Iterator):
        raise TypeError(
            "data is an iterator, which is empty after one walk, and an operator walks its batches for every product: "
            "pass a list, or an object whose __iter__ starts anew (a torch or grain loader does)."
        )
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError("data has no batches: an operator needs one at least.")


def raw_weight(curvature: Curvature, params: PyTree, evaluation: Evaluation) -> jax.Array:
    """How much a batch weighs among others: its sum of weights under a mean, and one under a sum.

    Raises:
      ValueError: the loss couples examples, so that batches do not add up.
    """
    if curvature.couples_examples:
        raise ValueError(f"the {curvature.name} couples the examples of a batch: pass them all in one batch.")
    pair = _model_and_loss(curvature)
    if pair is not None:
        return _weight_under(*pair, params, evaluation)
    objective = curvature.objective if isinstance(curvature, Hessian) else None
    if not isinstance(objective, LossFunction):
        raise ValueError(f"the {curvature.name} of several batches is not known to add up: pass one batch.")
    total = objective.total_weight(params, evaluation)
    if total is not None:
        return total
    if objective.reduction == "sum":
        return jnp.ones(())
    axes = evaluation.axes or BatchAxes((0,) * len(jax.tree.leaves(evaluation.batch)))
    return jnp.asarray(float(axes.count(evaluation.batch)))


def shares(weights: Sequence[jax.Array], mean: bool) -> tuple[jax.Array, ...]:
    """The factors with which batches of these weights enter; under a sum all are one."""
    if not mean:
        return tuple(jnp.ones_like(w) for w in weights)
    total = sum(weights, start=jnp.zeros_like(weights[0]))
    safe = jnp.where(total > 0, total, jnp.ones_like(total))
    return tuple(w / safe for w in weights)


def is_mean(curvature: Curvature) -> bool:
    """Whether the loss is a mean over its batch, so that batches enter by their shares."""
    pair = _model_and_loss(curvature)
    if pair is not None:
        return pair[1].reduction == "mean"
    objective = curvature.objective if isinstance(curvature, Hessian) else None
    return isinstance(objective, LossFunction) and objective.reduction == "mean"


def _model_and_loss(curvature: Curvature) -> tuple[Model, Loss] | None:
    if isinstance(curvature, GaussNewton):
        return curvature.model, curvature.loss
    objective = curvature.objective if isinstance(curvature, Hessian) else None
    return (objective.model, objective.loss) if isinstance(objective, ModelLoss) else None


def _weight_under(model: Model, loss: Loss, params: PyTree, evaluation: Evaluation) -> jax.Array:
    outputs = jax.eval_shape(lambda p, e: model.outputs(p, e)[0], params, evaluation)
    raw = model.effective_weights(dataclasses.replace(loss, reduction="sum"), outputs, evaluation.batch, signed=False)
    # Weights of the outputs' own shape count 1/K each, as in the loss's normalizer.
    return jnp.sum(raw) * (math.prod(positions_shape(outputs)) / max(raw.size, 1))
