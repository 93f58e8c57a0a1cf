"""Squared error, optionally centered over the batch."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from curvax.losses.base import accumulation_dtype, root, weigh
from curvax.losses.elementwise import ElementwiseLoss


@final
@dataclasses.dataclass(frozen=True)
class SquaredError(ElementwiseLoss):
    """l(f, y) = 1/2 sum_k (f_k - y_k)^2, the negative log-likelihood of a Gaussian of variance one.

    The Hessian is the identity: Q = w, S = sqrt(w), t = sqrt(w) (f - y). Of complex f and y the loss is
    1/2 sum_k |f_k - y_k|^2.

    Attributes:
      centered: takes the mean over the leading axis, weighted as the loss is, out of the residual (default False). This
        is the residual of variational Monte Carlo, where B rows of centered log-derivatives form the quantum Fisher
        matrix. With s = sqrt(w) and P = I - s s^T / s^T s over that axis, L = 1/2 |P s (f - y)|^2, S = s P and
        Q = s P s, as P^2 = P; a weight of zero is an example that is not there. Examples are then coupled: microbatches
        make the outputs of all of them first. Kronecker factors are those without it, as is usual for wave functions.
      reduction: see `Loss`.
    """

    centered: bool = False

    takes_complex: ClassVar[bool] = True

    @property
    def by_example(self) -> SquaredError:
        """Without centering."""
        return dataclasses.replace(self, centered=False)

    @property
    def couples_examples(self) -> bool:
        """True if `centered`."""
        return self.centered

    def value(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The loss 1/2 sum weights (f - y)^2; see `Loss.value`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return 0.5 * jnp.sum(weigh(weight, self._center(weight, f - y) ** 2))

    def gradient(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The gradient weights (f - y); see `Loss.gradient`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._center(weight, f - y))

    def hessian_product(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """The product weights v; see `Loss.hessian_product`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        return weigh(weight, self._center(weight, v.astype(f.dtype)))

    def factor(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, u: jax.Array) -> jax.Array:
        """S u = sqrt(w) u; see `Loss.factor`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        s, u = root(weight), u.astype(f.dtype)
        if not self.centered:
            return weigh(s, u)
        # s P u = s (u - s c) with c = s^T u / s^T s, the weighted mean of u / s.
        mean = jnp.sum(weigh(_share(weight, f.shape), _over(u, s)), axis=0, keepdims=True)
        return weigh(s, u - s * mean)

    def factor_transpose(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """S^T v = sqrt(w) v; see `Loss.factor_transpose`."""
        f, _, weight = self._prepare(outputs, targets, weights)
        return weigh(root(weight), self._center(weight, v.astype(f.dtype)))

    def gradient_in_rows(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The rows t = sqrt(w) (f - y); see `Loss.gradient_in_rows`."""
        f, y, weight = self._prepare(outputs, targets, weights)
        return weigh(root(weight), self._center(weight, f - y))

    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> jax.Array:
        """Targets drawn from a Gaussian of mean f and variance one, in the accumulation dtype; see
        `Loss.sample_targets`.
        """
        f = jnp.asarray(outputs)
        f = f.astype(accumulation_dtype(f.dtype))
        return (f + jax.random.normal(key, f.shape, f.dtype)).reshape(targets.shape)

    def sampled_gradient(self, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array) -> jax.Array:
        """S z with z drawn from a normal distribution, whose covariance is S S^T = Q; see `Loss.sampled_gradient`."""
        z = self.sample_targets(jnp.zeros_like(outputs), targets, key)
        return self.factor(outputs, targets, weights, z.reshape(outputs.shape))

    def _center(self, weight: jax.Array, x: jax.Array) -> jax.Array:
        """x less its weighted mean over the leading axis, if `centered`: P s x = s (x - mean)."""
        if not self.centered:
            return x
        return x - jnp.sum(weigh(_share(weight, x.shape), x), axis=0, keepdims=True)


def _share(weight: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """w / sum w over the leading axis, zero where nothing has a weight."""
    weight = jnp.broadcast_to(weight, shape)
    total = jnp.sum(weight, axis=0, keepdims=True)
    return weight / jnp.where(total == 0, jnp.ones_like(total), total)


def _over(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, zero where y is."""
    zero = y == 0
    return jnp.where(zero, jnp.zeros_like(x), x / jnp.where(zero, jnp.ones_like(y), y))
