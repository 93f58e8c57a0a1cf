"""Sigmoid binary cross entropy."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax.losses.base import accumulation_dtype, exp_clipped, times
from curvax.losses.elementwise import DiagonalLoss


@final
@dataclasses.dataclass(frozen=True)
class SigmoidBinaryCrossEntropy(DiagonalLoss):
    """l(f, y) = sum_k log(1 + exp(f_k)) - y_k f_k, with p = sigmoid(f) the probability of a one.

    Outputs are logits, targets lie in [0, 1] (boolean, integer or real). The outputs of one position are independent
    labels, and their losses are summed. l' = p - y and l'' = p (1 - p).

    Attributes:
      reduction: see `Loss`.
    """

    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> jax.Array:
        """Zeros and ones drawn with probability p of a one, in the targets' dtype; see `Loss.sample_targets`."""
        f = jnp.asarray(outputs)
        p = jax.nn.sigmoid(f.astype(accumulation_dtype(f.dtype)))
        return jax.random.bernoulli(key, p).astype(targets.dtype).reshape(targets.shape)

    # With q = 1 - p = sigmoid(-f), writing each piece as (1 - y) ... p ... and y ... q ... keeps the digits that p - 1
    # would lose, however large f is.

    def _term(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return times(1.0 - y, jax.nn.softplus(f)) + times(y, jax.nn.softplus(-f))

    def _slope(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return (1.0 - y) * jax.nn.sigmoid(f) - y * jax.nn.sigmoid(-f)

    def _root_curvature(self, f: jax.Array) -> jax.Array:
        # sqrt(p q) = 1 / (2 cosh(f / 2)); it underflows at twice the |f| at which q does.
        size = jnp.abs(f)
        return jnp.exp(-0.5 * size) / (1.0 + jnp.exp(-size))

    def _slope_over_root(self, f: jax.Array, y: jax.Array) -> jax.Array:
        # sqrt(p / q) = exp(f / 2).
        return (1.0 - y) * exp_clipped(0.5 * f) - y * exp_clipped(-0.5 * f)
