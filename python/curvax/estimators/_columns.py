"""Dense column blocks for the estimators that need orthogonalization."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.estimators.base import Product, TraceEstimate
from curvax.kernels.dense_linalg import qr
from curvax.tree import PyTree


def columns_product(product: Product, like: PyTree) -> Callable[[jax.Array], jax.Array]:
    """`product` on matrices: (n, m) -> (n, m), column by column, as one batched product."""
    _, unravel = tree.ravel(tree.zeros_like(like))

    def on_vector(v: jax.Array) -> jax.Array:
        return tree.ravel(product(unravel(v)))[0].astype(v.dtype)

    return jax.vmap(on_vector, in_axes=1, out_axes=1)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in the full precision of the inputs: no TF32 or bfloat16 passes on accelerators."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def orthonormal(columns: jax.Array) -> jax.Array:
    """Orthonormal (n, m) basis Q whose span holds the columns (n, m), n >= m, also where they depend on each other."""
    return qr(columns).q


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
