"""What a row's softmax needs of all its columns; made block of columns by block of columns, and merged."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.kernels.softmax_hvp import reference as softmax


class Statistics(NamedTuple):
    """Of each row, over the columns so far: arrays (rows, 1), None for what nobody asks.

    Attributes:
      top: the largest logit.
      normalizer: the sum of exp(z - top).
      mean: the sum of exp(z - top) v, with v the logits' tangents.
      label: the logit of the label, 0 while its column has not come.
      total, allowed: sum and number of the logits that are not minus infinity.
    """

    top: jax.Array
    normalizer: jax.Array
    mean: jax.Array | None = None
    label: jax.Array | None = None
    total: jax.Array | None = None
    allowed: jax.Array | None = None


def softmax_statistics(z: jax.Array, v: jax.Array | None) -> Statistics:
    """The largest logit, the normalizer and, of tangents `v`, the mean."""
    top = jnp.max(z, axis=1, keepdims=True)
    e = exponentials(z, top)
    return Statistics(top, jnp.sum(e, axis=1, keepdims=True), None if v is None else softmax.dot(e, v))


def exponentials(z: jax.Array, top: jax.Array) -> jax.Array:
    """The exponentials of z less the largest logit; zeros where there is no class yet."""
    return jnp.exp(z - _finite(top))


def nothing(like: Statistics) -> Statistics:
    """The statistics of no columns, given shapes: the neutral element of `merge`."""
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
    return zero._replace(top=zero.top - jnp.inf)


def merge(a: Statistics, b: Statistics) -> Statistics:
    """The statistics over the columns of both."""
    top = jnp.maximum(a.top, b.top)
    shift = _finite(top)
    of_a, of_b = jnp.exp(a.top - shift), jnp.exp(b.top - shift)
    mean = None if a.mean is None or b.mean is None else a.mean * of_a + b.mean * of_b
    added = jax.tree.map(jnp.add, a[3:], b[3:])
    return Statistics(top, a.normalizer * of_a + b.normalizer * of_b, mean, *added)


def _finite(top: jax.Array) -> jax.Array:
    """`top`, and 0 where there is no class yet."""
    return jnp.where(top == -jnp.inf, jnp.zeros((), top.dtype), top)
