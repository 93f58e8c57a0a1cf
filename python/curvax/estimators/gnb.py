"""The Gauss-Newton-Bartlett estimator of diag(GGN)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax.curvature import Linearization
from curvax.estimators.base import DiagonalEstimator, check_count
from curvax.kernels.diagonal_update import DiagonalEstimate
from curvax.tree import PyTree
from curvax.work import Cost, StepWork


@dataclasses.dataclass(frozen=True)
class GaussNewtonBartlett(DiagonalEstimator):
    """Mean square of gradients whose targets are drawn from the model, never from the data.

    For a loss that is a negative log-likelihood, E[grad grad^T] over the model's own targets is the loss Hessian in
    output space and the mean gradient is zero (Bartlett's identities), so examples drawn independently do not mix and
    the square of one mini-batch gradient is unbiased for diag(GGN). With the batch's own targets neither identity
    holds. Never negative. See Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
    Pre-training" (2023), section 2.3.

    Attributes:
      n_samples: independent draws of all targets, one gradient each, taken as one batch (so with `n_samples` times the
        memory of one). The default, 1, is Sophia's.
    """

    n_samples: int = 1

    def __post_init__(self) -> None:
        check_count("n_samples", self.n_samples)

    @property
    def needs_product(self) -> bool:
        return False

    @property
    def needs_sampling(self) -> bool:
        return True

    def cost(self, work: StepWork) -> Cost:
        return work.gradient.times(self.n_samples)

    def diagonal(self, linearization: Linearization, key: jax.Array) -> PyTree:
        return self.estimate(linearization, key).value()

    def estimate(self, linearization: Linearization, key: jax.Array) -> DiagonalEstimate:
        sampled_gradient = linearization.sampled_gradient
        if not linearization.has_sampling or sampled_gradient is None:
            raise ValueError(
                "GaussNewtonBartlett draws targets from the model, which this curvature cannot do; "
                "use a Gauss-Newton curvature with a likelihood loss, or the Hutchinson estimator."
            )
        if self.n_samples == 1:
            return DiagonalEstimate((sampled_gradient(key),), "square")
        gradients = jax.vmap(sampled_gradient)(jax.random.split(key, self.n_samples))
        return DiagonalEstimate((jax.tree.map(lambda g: jnp.mean(jnp.square(g), axis=0), gradients),))
