"""Poisson regression with log-rate outputs."""

from __future__ import annotations

import dataclasses
from typing import Any, final

import jax
import jax.numpy as jnp

from curvax.losses.base import accumulation_dtype, exp_clipped, times
from curvax.losses.elementwise import DiagonalLoss

# Above this rate samples are Gaussian with the Poisson's mean and variance: float32 no longer tells counts apart.
_LARGE_RATE = 2.0**24


@final
@dataclasses.dataclass(frozen=True)
class Poisson(DiagonalLoss):
    """l(f, y) = sum_k exp(f_k) - y_k f_k: the negative log-likelihood of counts y with rate exp(f), less log(y!).

    Outputs are log-rates, targets are counts (any non-negative real dtype). l' = exp(f) - y and l'' = exp(f).

    Attributes:
      reduction: see `Loss`.
    """

    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> jax.Array:
        """Counts drawn at rate exp(f), upcast (large counts do not fit every dtype); see `Loss.sample_targets`.

        JAX draws Poisson numbers from keys of its default kind (threefry) only.
        """
        f = jnp.asarray(outputs)
        f = f.astype(accumulation_dtype(f.dtype))
        rate = jnp.nan_to_num(jnp.exp(f), nan=0.0, posinf=jnp.finfo(f.dtype).max)
        exact, large = jax.random.split(key)
        counts = jax.random.poisson(exact, jnp.minimum(rate, _LARGE_RATE)).astype(f.dtype)
        normal = rate + jnp.sqrt(rate) * jax.random.normal(large, f.shape, f.dtype)
        return jnp.where(rate > _LARGE_RATE, normal, counts).reshape(targets.shape)

    def _term(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(f) - times(y, f)

    def _slope(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(f) - y

    def _root_curvature(self, f: jax.Array) -> jax.Array:
        return jnp.exp(0.5 * f)

    def _slope_over_root(self, f: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.exp(0.5 * f) - y * exp_clipped(-0.5 * f)
