"""From the factors of an example to what its rows are made of, leaf by leaf, in the form that makes them meet cheapest.

Rows of a leaf with sites meet either as pairs, without being formed,

    <sum_t a_t d_t^T, sum_u b_u e_u^T> = sum_tu (a_t . b_u) (d_t . e_u),

or formed, sum_t a_t d_t^T laid out as the leaf. Pairs add up over sites only if these see the same entries of the leaf
in the same order (then their positions are one longer list) or no common ones; otherwise the rows are formed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax.structure.capture import Capture, Factors
from curvax.structure.formed import formed, one_hot, sites_by_leaf, with_one
from curvax.structure.sites import EmbeddingSite, Site
from curvax.structure.views import disjoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """A part of the rows of one example; of several, with one more leading axis. Inner products add up over parts.

    Attributes:
      activations: (G, T, n), or `None` if the rows are formed.
      cotangents: (G, R, T, m); formed rows are (1, R, width).
    """

    activations: jax.Array | None
    cotangents: jax.Array


def layers(capture: Capture, factors: Factors) -> list[Layer]:
    """All parts of the rows of one example."""
    found = [Layer(None, _flat(rows)[None]) for rows in factors.explicit]
    for indices in sites_by_leaf(capture).values():
        sites = [capture.structure.sites[i] for i in indices]
        found += _leaf(sites, [factors.activations[i] for i in indices], [factors.cotangents[i] for i in indices])
    return found


def _leaf(sites: Sequence[Site], activations: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> list[Layer]:
    apart = all(disjoint(a.views, b.views) for a, b in itertools.combinations(sites, 2))
    if not apart and not _same_entries(sites):
        biases = [_flat(jnp.sum(d, axis=1)) for site, d in zip(sites, cotangents, strict=True) if site.bias is not None]
        return [Layer(None, rows[None]) for rows in (_flat(formed(sites, activations, cotangents)), *biases)]
    scaled = [_scaled(site, a, d.dtype) for site, a, d in zip(sites, activations, cotangents, strict=True)]
    if apart:
        return [_pairs_or_formed(*one) for one in zip(scaled, cotangents, strict=True)]
    return [_pairs_or_formed(jnp.concatenate(scaled, axis=0), jnp.concatenate(cotangents, axis=1))]


def _scaled(site: Site, activations: jax.Array, dtype: Any) -> jax.Array:
    """As the leaf's gradient has them: scaled as the leaf is on its way, then with a one for a bias, which is not."""
    if isinstance(site, EmbeddingSite):
        activations = one_hot(site, activations, dtype)
    if site.factor != 1:
        activations = activations * jnp.asarray(site.factor, dtype)
    return with_one(site, activations)


def _same_entries(sites: Sequence[Site]) -> bool:
    """Whether a block (G, n, m) means the same entries of the leaf, in the same order, at all sites."""
    first = sites[0]
    return all(
        type(site) is type(first)
        and site.same_layout(first)
        and site.views == first.views
        and site.bias is None
        and first.bias is None
        for site in sites[1:]
    )


def _pairs_or_formed(activations: jax.Array, cotangents: jax.Array) -> Layer:
    """One group is left to the op, which forms rows itself where that is cheaper."""
    t, g, n = activations.shape
    r, m = cotangents.shape[0], cotangents.shape[-1]
    # Per pair of examples and group: a square of positions against the width of the formed rows.
    if g > 1 and t * t * (n + r * r * m) > r * r * n * m:
        rows = jnp.einsum("tgn,rtgm->rgmn", activations, cotangents, precision=jax.lax.Precision.HIGHEST)
        return Layer(None, _flat(rows)[None])
    return Layer(activations.transpose(1, 0, 2), cotangents.transpose(2, 0, 1, 3))


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(rows.shape[0], -1)
