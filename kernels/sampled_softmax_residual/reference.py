"""sampled_softmax_residual in plain JAX: any platform, any floating dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.kernels.softmax_hvp.reference import exponentials
from curvax.tree import accumulation_dtype


def sampled_softmax_residual(logits: jax.Array, uniforms: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `api.sampled_softmax_residual`; uniforms and weights are (...,) like the rows."""
    dtype = accumulation_dtype(logits.dtype)
    weight = weights.astype(dtype)[..., None]
    # 1. Running sums of the exponentials: the distribution function, but for the factor 1 / total.
    e, total, dead = exponentials(logits.astype(dtype), weight)
    sums = jnp.cumsum(e, axis=-1)
    # 2. The first column whose sum passes the drawn share. The last sum that grows ends the search where rounding put
    # the share at the whole; at a column of no probability no sum grows, so none is drawn.
    passed = (sums > uniforms.astype(dtype)[..., None] * sums[..., -1:]) | (sums >= sums[..., -1:])
    label = jnp.where(dead[..., 0], 0, jnp.argmax(passed, axis=-1).astype(jnp.int32))
    # 3. w (p - e_k).
    columns = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    residual = weight * (e / total - (columns == label[..., None]).astype(dtype))
    return jnp.where(dead, jnp.zeros((), dtype), residual), label
