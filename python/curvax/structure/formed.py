"""Rows of a leaf, formed from the factors at its sites."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.structure.capture import Capture
from curvax.structure.sites import EmbeddingSite, Site


def sites_by_leaf(capture: Capture) -> dict[int, list[int]]:
    """Leaf -> indices of its sites."""
    found: dict[int, list[int]] = collections.defaultdict(list)
    for index, site in enumerate(capture.structure.sites):
        found[site.leaf].append(index)
    return dict(found)


def formed(sites: Sequence[Site], a: Sequence[jax.Array], d: Sequence[jax.Array]) -> jax.Array:
    """The rows (R, *leaf) of one example of a leaf with these sites."""
    total = None
    for site, activations, cotangents in zip(sites, a, d, strict=True):
        if isinstance(site, EmbeddingSite):
            activations = one_hot(site, activations, cotangents.dtype)
        blocks = jnp.einsum("tgn,rtgm->rgnm", activations, cotangents, precision=jax.lax.Precision.HIGHEST)
        rows = jax.vmap(site.to_leaf)(blocks)
        total = rows if total is None else total + rows
    if total is None:
        raise AssertionError("a leaf with sites has at least one.")
    return total


def with_one(site: Site, activations: jax.Array) -> jax.Array:
    """(T, G, n) with a one appended if the site has a bias."""
    if site.bias is None:
        return activations
    return jnp.concatenate([activations, jnp.ones_like(activations[..., :1])], axis=-1)


def one_hot(site: Site, indices: jax.Array, dtype: np.dtype) -> jax.Array:
    """(T, 1, n) from the indices of an embedding; what finds nothing is zero."""
    return jax.nn.one_hot(indices, site.block[1], dtype=dtype)[..., None, :]
