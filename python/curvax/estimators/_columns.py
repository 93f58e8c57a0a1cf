"""What the estimators of traces share."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.estimators.base import Product, TraceEstimate
from curvax.sketches import columns_product
from curvax.tree import PyTree


def exact_trace(product: Product, like: PyTree) -> TraceEstimate:
    """The trace by all n unit vectors: what a budget of n products or more is best spent on."""
    n, dtype = tree.size(like), tree.scalar_dtype(like)
    zero = jnp.zeros((), dtype)
    if not n:
        return TraceEstimate(zero, zero, 0)
    return TraceEstimate(jnp.trace(columns_product(product, like)(jnp.eye(n, dtype=dtype))), zero, n)


def mean_and_error(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean of (m,) samples and the standard error of that mean; infinite for one sample."""
    m = samples.shape[0]
    if m == 1:
        return samples[0], jnp.full((), jnp.inf, samples.dtype)
    mean = jnp.mean(samples)
    return mean, tree.norm(samples - mean) / math.sqrt(m * (m - 1))
