"""From the factors of an example to what its rows are made of, leaf by leaf, in the form that makes them meet cheapest.

Rows of a leaf with sites meet either as pairs, without being formed,

    <sum_t a_t d_t^T, sum_u b_u e_u^T> = sum_tu (a_t . b_u) (d_t . e_u),

or formed, sum_t a_t d_t^T laid out as the leaf. Pairs add up over sites only if these see the same entries of the leaf
in the same order (then their positions are one longer list) or no common ones; otherwise the rows are formed.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from curvax.structure.capture import Capture, Factors, one_hot, widened_activations
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
    by_leaf: dict[int, list[int]] = collections.defaultdict(list)
    for index, site in enumerate(capture.structure.sites):
        by_leaf[site.leaf].append(index)
    found = [Layer(None, _flat(rows)[None]) for rows in factors.explicit]
    for indices in by_leaf.values():
        sites = [capture.structure.sites[i] for i in indices]
        activations = [
            _activations(site, factors.activations[i], capture) for site, i in zip(sites, indices, strict=True)
        ]
        cotangents = [factors.cotangents[i] for i in indices]
        found += _leaf(sites, activations, cotangents)
    return found


def _activations(site: Site, recorded: jax.Array, capture: Capture) -> jax.Array:
    if isinstance(site, EmbeddingSite):
        return one_hot(site, recorded, capture.dtype)
    return widened_activations(site, recorded)


def _leaf(sites: Sequence[Site], activations: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> list[Layer]:
    if _same_entries(sites):
        joined = jnp.concatenate(activations, axis=0), jnp.concatenate(cotangents, axis=1)
        return [_pairs_or_formed(sites[0], *joined)]
    if all(disjoint(a.views, b.views) for a, b in itertools.combinations(sites, 2)):
        return [_pairs_or_formed(*one) for one in zip(sites, activations, cotangents, strict=True)]
    return _formed(sites, activations, cotangents)


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


def _pairs_or_formed(site: Site, activations: jax.Array, cotangents: jax.Array) -> Layer:
    """One group is left to the op, which forms rows itself where that is cheaper."""
    t, g, n = activations.shape
    r, m = cotangents.shape[0], cotangents.shape[-1]
    # Per pair of examples and group; a square of positions against the width of the formed rows.
    if g > 1 and t * t * (n + r * r * m) > r * r * n * m:
        return Layer(None, _flat(jnp.einsum("tgn,rtgm->rgnm", activations, cotangents, precision="highest"))[None])
    return Layer(activations.transpose(1, 0, 2), cotangents.transpose(2, 0, 1, 3))


def _formed(sites: Sequence[Site], activations: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> list[Layer]:
    total, found = None, []
    for site, a, d in zip(sites, activations, cotangents, strict=True):
        rows = jnp.einsum("tgn,rtgm->rgnm", a[..., : site.block[1]], d, precision="highest")
        on_leaf = _flat(jax.vmap(site.to_leaf)(rows))
        total = on_leaf if total is None else total + on_leaf
        if site.bias is not None:
            found.append(Layer(None, _flat(jnp.sum(d, axis=1))[None]))
    return found if total is None else [*found, Layer(None, total[None])]


def _flat(rows: jax.Array) -> jax.Array:
    return rows.reshape(rows.shape[0], -1)
