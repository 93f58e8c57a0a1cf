"""hutchinson_reduce in plain JAX."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from curvax.tree import PyTree, accumulation_dtype

# Up to this many probes their terms are added one by one in one pass over contiguous memory. XLA's own reduction over
# the first axis walks across it on a CPU: 8 probes of 270,000 entries took it some thirty times as long.
_UNROLLED = 64


def hutchinson_reduce(probes: PyTree, products: PyTree, axes: tuple[tuple[int, ...], ...], *, use_abs: bool) -> PyTree:
    """See `api.hutchinson_reduce`; `axes` has one entry per leaf, of axes without that of the probes."""
    structure = jax.tree.structure(probes)

    def leaf(z: jax.Array, c: jax.Array, own: tuple[int, ...]) -> jax.Array:
        accumulation = accumulation_dtype(z.dtype)
        diagonal = _mean_product(z.astype(accumulation), c.astype(accumulation))
        if use_abs:
            diagonal = jnp.abs(diagonal)
        return jnp.mean(diagonal, axis=own, keepdims=True) if own else diagonal

    return jax.tree.unflatten(structure, map(leaf, *map(jax.tree.leaves, (probes, products)), axes))


def _mean_product(z: jax.Array, c: jax.Array) -> jax.Array:
    """The mean of z * c over the first axis, added up as a tree."""
    if len(z) > _UNROLLED:
        return jnp.mean(z * c, axis=0)
    terms = [z[i] * c[i] for i in range(len(z))]
    while len(terms) > 1:
        odd = terms[-1:] if len(terms) % 2 else []
        terms = [a + b for a, b in zip(terms[0:-1:2], terms[1::2], strict=True)] + odd
    return terms[0] / len(z)
