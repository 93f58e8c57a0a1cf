"""softmax_hvp in plain JAX: any platform, any floating dtypes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.tree import scalar_dtype

# Up to so many columns XLA's CPU code is faster with the probabilities normalized first (10 columns: 1.3x), beyond it
# with the factor 1 / total kept out of the arrays, one pass less (1,000 columns: 1.6x).
_FEW = 32


def softmax_hvp(logits: jax.Array, tangents: jax.Array, weights: jax.Array) -> jax.Array:
    """See `api.softmax_hvp`; `weights` are (...,) like the rows."""
    dtype = scalar_dtype((logits, tangents))
    weight = weights.astype(dtype)[..., None]
    e, total, dead = exponentials(logits.astype(dtype), weight)

    def normalized(v: jax.Array) -> jax.Array:
        p = e / total
        return weight * (p * (v - dot(p, v)))

    def unnormalized(v: jax.Array) -> jax.Array:
        inverse = 1 / total
        return (weight * inverse) * (e * (v - dot(e, v) * inverse))

    bilinear = normalized if logits.shape[-1] <= _FEW else unnormalized

    def product(v: jax.Array) -> jax.Array:
        return jnp.where(dead, jnp.zeros((), dtype), bilinear(v.astype(dtype)))

    return product(tangents) if tangents.ndim == logits.ndim else jax.vmap(product)(tangents)


def exponentials(z: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The exponentials e of z less its largest, their sum, and whether the row is dead: no weight, or no class.

    A dead row is computed as one of zeros, so that its derivatives are zero too where its result is masked out.
    """
    top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True))
    dead = (weight == 0) | (top == -jnp.inf)
    e = jnp.exp(jnp.where(dead, jnp.zeros((), z.dtype), z - top))
    return e, jnp.sum(e, axis=-1, keepdims=True), dead


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """The inner products along the last axis, which stays with length one."""
    # A contraction, not a sum of products: XLA for CPUs (jaxlib 0.10.2) miscompiles p * (u - sum(p * u)) where a vmap
    # leaves p unbatched and the result has more than 2^15 elements.
    return jnp.einsum("...k,...k->...", a, b, precision=jax.lax.Precision.HIGHEST)[..., None]
