"""gram_accumulate in plain JAX: any platform, float32 and float64."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels._dispatch import Request
from curvax.kernels.gram_accumulate.factors import BlockRows, Rows
from curvax.kernels.gram_accumulate.whole import layer_by_layer

# p panels take (1 + 1/p) / 2 of the full product, and narrow ones run slower: measured on 2 CPU cores, 4 panels of at
# least 256 rows took 0.54 to 0.87 of the time of the whole product from 512 rows on; 128 rows cut in 3 took 1.2.
_PANELS = 4
_LEAST_PANEL = 256
# An H200 took the whole product of 320, 1,152 and 1,280 rows in 0.54 to 0.57 of the time of its panels: there is room
# for all of it at once, and every panel is a launch more.
_LEAST_PANEL_ON_GPU = 2048


def accumulate(gram: jax.Array, left: Rows, right: Rows | None) -> jax.Array:
    """See `api.gram_accumulate`; `right` None is the lower triangle of `left` with itself.

    Products are taken panel by panel, so that no product matrix of all rows with all rows stands beside `gram`.
    """
    columns = left if right is None else right
    for start, stop in _panels(left):
        met = _groups(columns, 0, stop) if right is None else columns
        band = _meet(_groups(left, start, stop), met, gram)
        place = (start * left.per_group, 0)
        before = jax.lax.dynamic_slice(gram, place, band.shape)
        gram = jax.lax.dynamic_update_slice(gram, before + band, place)
    return gram


def gram_of_layers(layers: Sequence[BlockRows], dtype: np.dtype) -> jax.Array:
    """See `api.gram_of_layers`."""
    return layer_by_layer(layers, dtype, lambda gram, rows: accumulate(gram, rows, None))


def _panels(rows: Rows) -> Iterator[tuple[int, int]]:
    least = _LEAST_PANEL if Request.of(rows).platform == "cpu" else _LEAST_PANEL_ON_GPU
    width = max(1, -(-max(least, -(-rows.total // _PANELS)) // max(rows.per_group, 1)))
    for start in range(0, rows.groups, width):
        yield start, min(start + width, rows.groups)


def _groups(rows: Rows, start: int, stop: int) -> Rows:
    return jax.tree.map(lambda x: x[start:stop], rows)


def _meet(left: Rows, right: Rows, like: jax.Array) -> jax.Array:
    """Inner products of all rows of `left` with all of `right`, (left.total, right.total).

    <a_i d_r^T, a_j d_s^T> = (a_i . a_j) (d_r . d_s): one small product per pair of groups scales one per pair of rows.
    """
    positions = right.positions
    pairs = left.positions * positions
    if pairs == 1:
        return _meet_at(left, right, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), like)

    def add(pair: jax.Array, total: jax.Array) -> jax.Array:
        return total + _meet_at(left, right, pair // positions, pair % positions, like)

    # One pair of positions at a time: all at once would take as many times the memory.
    first = _meet_at(left, right, jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32), like)
    return jax.lax.fori_loop(1, pairs, add, first)


def _meet_at(left: Rows, right: Rows, t: jax.Array, u: jax.Array, like: jax.Array) -> jax.Array:
    """The same for position t of the left rows and u of the right ones alone."""
    products = _inner(_at(left.cotangents, t, 2, left.positions), _at(right.cotangents, u, 2, right.positions), like)
    if left.activations is None or right.activations is None:
        return products
    scales = _inner(_at(left.activations, t, 1, left.positions), _at(right.activations, u, 1, right.positions), like)
    blocks = products.reshape(left.groups, left.per_group, right.groups, right.per_group)
    return (scales[:, None, :, None] * blocks).reshape(products.shape)


def _at(array: jax.Array, position: jax.Array, axis: int, positions: int) -> jax.Array:
    """One position, as a matrix with the last axis as it is."""
    one = jax.lax.dynamic_index_in_dim(array, position, axis, keepdims=False) if positions > 1 else array
    return one.reshape(math.prod(array.shape[:axis]), array.shape[-1])


def _inner(a: jax.Array, b: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.einsum("in,jn->ij", a.astype(like.dtype), b.astype(like.dtype), precision=jax.lax.Precision.HIGHEST)
