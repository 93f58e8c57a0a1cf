"""Squared error, optionally centered over the batch."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax.losses.base import accumulation_dtype, root, weigh
from curvax.losses.elementwise import ElementwiseLoss


@final
@dataclasses.dataclass(frozen=True)
class SquaredError(ElementwiseLoss):
    """l(f, y) = 1/2 sum_k (f_k - y_k)^2, the negative log-likelihood of a Gaussian of variance one.

    The Hessian is the identity: Q = w, S = sqrt(w), t = sqrt(w) (f - y).

    Attributes:
      centered: projects the mean over the leading axis out of the residual (default False). With P = I - 1 1^T / B
        over that axis, L = 1/2 w |P (f - y)|^2, Q = w P and S = sqrt(w) P, which is a square root of Q as P^2 = P. This
        is the residual of variational Monte Carlo, where B rows of centered log-derivatives form the quantum Fisher
        matrix. Examples are then coupled: microbatches make the outputs of all of them first, and weights must be
        `None` or a scalar.
      reduction: see `Loss`.
    """

    centered: bool = False

    @property
    def couples_examples(self) -> bool:
        """True if `centered`."""
        return self.centered

    def value(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The loss 1/2 sum weights (f - y)^2; see `Loss.value`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return 0.5 * jnp.sum(weigh(weight, self._project(f - y) ** 2))

    def gradient(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The gradient weights (f - y); see `Loss.gradient`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._project(f - y))

    def hessian_product(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """The product weights v; see `Loss.hessian_product`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._project(v.astype(f.dtype)))

    def factor(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, u: jax.Array) -> jax.Array:
        """S u = sqrt(w) u; see `Loss.factor`."""
        return self.hessian_product(outputs, targets, root(weights), u)

    def factor_transpose(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """S^T v = sqrt(w) v; see `Loss.factor_transpose`. S is symmetric."""
        return self.hessian_product(outputs, targets, root(weights), v)

    def gradient_in_rows(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The rows t = sqrt(w) (f - y); see `Loss.gradient_in_rows`."""
        return self.gradient(outputs, targets, root(weights))

    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> jax.Array:
        """Targets drawn from a Gaussian of mean f and variance one, in the accumulation dtype; see
        `Loss.sample_targets`.
        """
        f = jnp.asarray(outputs)
        f = f.astype(accumulation_dtype(f.dtype))
        return (f + jax.random.normal(key, f.shape, f.dtype)).reshape(targets.shape)

    def _project(self, x: jax.Array) -> jax.Array:
        return x - jnp.mean(x, axis=0, keepdims=True) if self.centered else x
