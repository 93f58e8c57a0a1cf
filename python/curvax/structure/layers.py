"""From the factors of an example to what its rows are made of, leaf by leaf, in the form that makes them meet cheapest.

Rows of a leaf with layer uses meet either as pairs, without being formed,

    <sum_t a_t d_t^T, sum_u b_u e_u^T> = sum_tu (a_t . b_u) (d_t . e_u),

or formed, sum_t a_t d_t^T laid out as the leaf. Pairs add up over layer uses only if these see the same entries of the
leaf in the same order (then their positions are one longer list) or no common ones; otherwise the rows are formed.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax.structure.capture import Capture, Factors
from curvax.structure.formed import formed, one_hot, uses_by_leaf, with_one
from curvax.structure.uses import EmbeddingUse, LayerUse, same_entries
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

    def joined(self) -> Layer:
        """All rows of an example as one long row: inner products of such are traces of those of the rows."""
        d = self.cotangents
        if self.activations is None:
            return Layer(None, d.reshape(*d.shape[:-2], 1, -1))
        moved = jnp.moveaxis(d, -3, -2)
        return Layer(self.activations, moved.reshape(*moved.shape[:-3], 1, moved.shape[-3], -1))

    def own_gram(self) -> jax.Array:
        """(R, R) inner products of the rows of one example."""
        a, d = self.activations, self.cotangents
        highest = jax.lax.Precision.HIGHEST
        if a is not None:
            (_, t, n), (_, r, _, m) = a.shape, d.shape
            if t * t * (n + r * r * m) <= r * n * m * (t + r):
                inner = jnp.einsum("gtn,gun->gtu", a, a, precision=highest)
                together = jnp.einsum("gtu,gsum->gstm", inner, d, precision=highest)
                return jnp.einsum("grtm,gstm->rs", d, together, precision=highest)
            d = jnp.einsum("gtn,grtm->grnm", a, d, precision=highest).reshape(d.shape[0], r, -1)
        return jnp.einsum("grw,gsw->rs", d, d, precision=highest)


def layers(capture: Capture, factors: Factors) -> list[Layer]:
    """All parts of the rows of one example."""
    parts = [Layer(None, flat(rows)[None]) for rows in factors.explicit]
    for indices in uses_by_leaf(capture).values():
        uses = [capture.structure.uses[i] for i in indices]
        parts += _leaf(uses, [factors.activations[i] for i in indices], [factors.cotangents[i] for i in indices])
    return parts


def _leaf(uses: Sequence[LayerUse], activations: Sequence[jax.Array], cotangents: Sequence[jax.Array]) -> list[Layer]:
    disjoint_uses = all(disjoint(a.views, b.views) for a, b in itertools.combinations(uses, 2))
    alike = all(same_entries(use, uses[0]) for use in uses[1:])
    if not disjoint_uses and not alike:
        return [Layer(None, flat(formed(uses, activations, cotangents))[None]), *_biases(uses, cotangents)]
    scaled = [scaled_activations(use, a, d.dtype) for use, a, d in zip(uses, activations, cotangents, strict=True)]
    if disjoint_uses:
        ones = [with_one(use, a) for use, a in zip(uses, scaled, strict=True)]
        return [_pairs_or_formed(*one) for one in zip(ones, cotangents, strict=True)]
    joined = jnp.concatenate(cotangents, axis=1)
    if sum(use.bias is not None for use in uses) != 1:
        return [_pairs_or_formed(jnp.concatenate(scaled, axis=0), joined), *_biases(uses, cotangents)]
    # One bias that several layer uses share the weights beside: its activation is zero where it is not added.
    ones = [
        with_one(use, a) if use.bias is not None else jnp.pad(a, ((0, 0), (0, 0), (0, 1)))
        for use, a in zip(uses, scaled, strict=True)
    ]
    return [_pairs_or_formed(jnp.concatenate(ones, axis=0), joined)]


def _biases(uses: Sequence[LayerUse], cotangents: Sequence[jax.Array]) -> list[Layer]:
    """The rows of the layer uses' biases."""
    return [
        Layer(None, flat(jnp.sum(d, axis=1))[None])
        for use, d in zip(uses, cotangents, strict=True)
        if use.bias is not None
    ]


def scaled_activations(use: LayerUse, activations: jax.Array, dtype: Any) -> jax.Array:
    """(T, G, n) as the leaf's gradient has them: scaled as the leaf is on its way."""
    if isinstance(use, EmbeddingUse):
        activations = one_hot(use, activations, dtype)
    return activations if use.factor == 1 else activations * jnp.asarray(use.factor, dtype)


def _pairs_or_formed(activations: jax.Array, cotangents: jax.Array) -> Layer:
    """One group is left to the op, which forms rows itself where that is cheaper."""
    t, g, n = activations.shape
    r, m = cotangents.shape[0], cotangents.shape[-1]
    # Per pair of examples and group: a square of positions against the width of the formed rows.
    if g > 1 and t * t * (n + r * r * m) > r * r * n * m:
        rows = jnp.einsum("tgn,rtgm->rgmn", activations, cotangents, precision=jax.lax.Precision.HIGHEST)
        return Layer(None, flat(rows)[None])
    return Layer(activations.transpose(1, 0, 2), cotangents.transpose(2, 0, 1, 3))


def flat(rows: jax.Array) -> jax.Array:
    """(R, entries)."""
    return rows.reshape(rows.shape[0], -1)
