"""From a trained model and its data to a posterior."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature import GaussNewton, Model
from curvax.keywords import spread
from curvax.laplace.forms import KFAC, Form
from curvax.laplace.posterior import Laplace
from curvax.laplace.prior import Prior
from curvax.laplace.subsets import Subset, restricted
from curvax.numbers import Number, check_positive
from curvax.operators.batches import raw_weight
from curvax.operators.curvature import At, ModelArguments
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class FitArguments(ModelArguments):
    """The same, and what the posterior is like.

    Attributes:
      loss: negative log-likelihood of an example, one of `curvax.losses`. The posterior is that of its sum over the
        data, whatever its `reduction`; weights count as repetitions.
      params: trained parameters, where the loss and the prior's -log together have their minimum.
      form: `KFAC()` by default, `EKFAC()`, `Diagonal()`, `LowRank(rank)` or `Full()`.
      subset: which parameters have a posterior, by default all: a path such as "layers/2", a function of paths, or a
        tree of booleans such as `last_layer` makes.
      prior_precision: of N(0, P^-1): a number, or a tree of numbers like the parameters or a prefix of them. 1 by
        default; `tune_prior` finds better ones.
      noise: standard deviation of the targets of a `SquaredError` around the model, 1 by default; other losses have
        none.
    """

    _: dataclasses.KW_ONLY
    form: Form = KFAC()
    subset: Subset | None = None
    prior_precision: PyTree = 1.0
    noise: Number = 1.0

    def __post_init__(self) -> None:
        check_positive("noise", self.noise)
        if self.loss.couples_examples:
            raise ValueError(f"{self.loss} couples examples, which have no likelihoods of their own: use another loss.")


@spread(FitArguments)
def fit(arguments: FitArguments) -> Laplace:
    """The Laplace approximation of a posterior around trained parameters.

    `data` is one batch, a list of batches, or a loader that starts anew at each iteration; it is walked once, by
    `EKFAC` and full or low-rank forms more often.

    Raises:
      ValueError, TypeError, KeyError: a batch or a tree that does not fit, a loss that couples examples, a noise for a
        loss that has none.
    """
    model = arguments.model if isinstance(arguments.model, Model) else Model(arguments.model)
    if arguments.subset is not None:
        model = restricted(model, arguments.params, arguments.subset)
    summed = dataclasses.replace(arguments, model=model, loss=dataclasses.replace(arguments.loss, reduction="sum"))
    curvature = arguments.form.measure(summed)
    matrix = summed.matrix()
    assert isinstance(matrix.curvature, GaussNewton)
    loss, count = jnp.zeros((), matrix.dtype), jnp.zeros((), matrix.dtype)
    for index, batch in enumerate(matrix.batches):
        more, numbers = _counted(matrix.curvature, matrix.at, batch, jnp.asarray(index, jnp.int32))
        loss, count = loss + more.astype(loss.dtype), count + numbers.astype(count.dtype)
    prior = Prior.of(arguments.prior_precision, matrix.at.params)
    fitted = Laplace(
        model, summed.loss, matrix.at, curvature, loss, count, prior,
        jnp.asarray(arguments.noise, matrix.dtype),
    )  # fmt: skip
    if not fitted.has_noise and not (isinstance(arguments.noise, float | int) and arguments.noise == 1):
        raise ValueError(
            f"{arguments.loss} has no noise: leave it out, it is the standard deviation of a SquaredError."
        )
    return fitted


@functools.partial(jax.jit, static_argnums=0)
def _counted(curvature: GaussNewton, at: At, batch: Any, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The summed loss of a batch, and how many numbers its targets are, by their weights."""
    evaluation = curvature.prepare(at.params, at.evaluation(batch, index))
    shape = jax.eval_shape(curvature.forward, at.params, evaluation).shape
    weight = raw_weight(curvature, at.params, evaluation)
    return curvature.value(at.params, evaluation), weight * (shape[-1] if len(shape) > 1 else 1)
