"""linear_softmax_hvp in plain JAX, block by block; `pallas` runs the same loop with its own softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from curvax.kernels._vary import vary_alike
from curvax.kernels.linear_softmax_hvp.blocks import Blocks, Cotangents, Head, count, fresh, start, take
from curvax.kernels.softmax_hvp import reference as softmax
from curvax.tree import wide_dtype

RowProduct: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits, tangents, weights) of a block of rows -> the products of `softmax_hvp`."""


def linear_softmax_hvp(
    at: Head,
    tangent: Head,
    weights: jax.Array,
    blocks: Blocks,
    precision: jax.lax.PrecisionLike,
    product: RowProduct = softmax.softmax_hvp,
) -> Cotangents:
    """See `api.linear_softmax_hvp`; hidden is (rows, features) here and weights (rows,)."""
    rows, wide = at.hidden.shape[0], wide_dtype(at.hidden.dtype)
    by_columns = blocks.columns < at.head.shape[1]

    def body(index: jax.Array, total: Cotangents) -> Cotangents:
        begin = start(index, blocks.rows, rows)
        new = fresh(index, blocks.rows, rows)
        weight = jnp.where(new, take(weights, begin, blocks.rows), jnp.zeros((), weights.dtype))

        def rows_of(head: Head) -> Head:
            # Whatever stands in a row without weight, infinities and NaN included: 0 times it must be 0 in H^T u.
            hidden = take(head.hidden, begin, blocks.rows)
            return head._replace(hidden=jnp.where(weight[:, None] == 0, jnp.zeros((), hidden.dtype), hidden))

        part, moved = rows_of(at), rows_of(tangent)
        if by_columns:
            found = _by_columns(part, moved, weight, total, blocks.columns, precision)
        else:
            u = product(_logits(part, precision), _push(part, moved, precision), weight)
            found = _add(total, _pull(part, u, precision))
        old = take(total.hidden, begin, blocks.rows)
        hidden = jnp.where(new[:, None], found.hidden, old)
        return found._replace(hidden=jax.lax.dynamic_update_slice_in_dim(total.hidden, hidden, begin, 0))

    zero = Cotangents(*jax.tree.map(lambda x: jnp.zeros(x.shape, wide), at))
    zero = jax.tree.unflatten(
        jax.tree.structure(zero), vary_alike(jax.tree.leaves(zero), like=jax.tree.leaves((at, tangent, weights)))
    )
    return jax.lax.fori_loop(0, count(blocks.rows, rows), body, zero)


def _logits(at: Head, precision: jax.lax.PrecisionLike) -> jax.Array:
    logits = _matmul(at.hidden, at.head, precision)
    return logits if at.bias is None else logits + at.bias.astype(logits.dtype)


def _push(at: Head, tangent: Head, precision: jax.lax.PrecisionLike) -> jax.Array:
    """The tangents of the logits."""
    moved = _matmul(tangent.hidden, at.head, precision) + _matmul(at.hidden, tangent.head, precision)
    return moved if tangent.bias is None else moved + tangent.bias.astype(moved.dtype)


def _pull(at: Head, u: jax.Array, precision: jax.lax.PrecisionLike) -> Cotangents:
    """The cotangents of hidden, head and bias that belong to cotangents `u` of the logits."""
    # float16 has no room for cotangents: a weight of 1 / rows times a small probability underflows.
    dtype = jnp.float32 if at.hidden.dtype == jnp.float16 else at.hidden.dtype
    narrow = u.astype(dtype)
    hidden = _contract(narrow, at.head.astype(dtype), (1, 1), precision)
    head = _contract(at.hidden.astype(dtype), narrow, (0, 0), precision)
    return Cotangents(hidden, head, None if at.bias is None else jnp.sum(u, axis=0))


def _add(total: Cotangents, part: Cotangents) -> Cotangents:
    """`part`, with its head and bias added to the total's; hidden is the block's own."""
    bias = None if total.bias is None or part.bias is None else total.bias + part.bias
    return Cotangents(part.hidden, total.head + part.head, bias)


def _by_columns(
    at: Head, tangent: Head, weight: jax.Array, total: Cotangents, size: int, precision: jax.lax.PrecisionLike
) -> Cotangents:
    """A block of rows whose logits are too many at once: statistics over blocks of columns, then the products.

    The second pass makes logits and tangents anew, so three of the five matmuls run twice.
    """
    columns, wide = at.head.shape[1], total.head.dtype
    blocks = count(size, columns)

    def cut(index: jax.Array, head: Head) -> Head:
        begin = start(index, size, columns)
        bias = None if head.bias is None else take(head.bias, begin, size)
        return Head(head.hidden, take(head.head, begin, size, axis=1), bias)

    def forward(index: jax.Array) -> tuple[Head, jax.Array, jax.Array]:
        part, moved = cut(index, at), cut(index, tangent)
        z = jnp.where(fresh(index, size, columns), _logits(part, precision), jnp.asarray(-jnp.inf, wide))
        return part, z, _push(part, moved, precision)

    def statistics(index: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        top, normaliser, mean = carry
        _, z, v = forward(index)
        higher = jnp.maximum(top, jnp.max(z, axis=1, keepdims=True))
        shift = jnp.where(higher == -jnp.inf, jnp.zeros((), wide), higher)
        scale, e = jnp.exp(top - shift), jnp.exp(z - shift)
        weighted = softmax.dot(e, v)
        return higher, normaliser * scale + jnp.sum(e, axis=1, keepdims=True), mean * scale + weighted

    (zero,) = vary_alike([jnp.zeros((at.hidden.shape[0], 1), wide)], like=jax.tree.leaves((at, tangent, weight)))
    top, normaliser, mean = jax.lax.fori_loop(0, blocks, statistics, (zero - jnp.inf, zero, zero))
    dead = (weight[:, None] == 0) | (top == -jnp.inf)
    safe = jnp.where(dead, jnp.ones((), wide), normaliser)
    scale, mean, weight = 1 / safe, mean / safe, weight[:, None].astype(wide)

    def products(index: jax.Array, so_far: Cotangents) -> Cotangents:
        part, z, v = forward(index)
        e = jnp.exp(jnp.where(dead, jnp.zeros((), wide), z - top))
        u = jnp.where(dead, jnp.zeros((), wide), weight * scale * (e * (v - mean)))
        found, begin = _pull(part, u, precision), start(index, size, columns)
        head = take(so_far.head, begin, size, axis=1) + found.head
        bias = None
        if so_far.bias is not None and found.bias is not None:
            bias = take(so_far.bias, begin, size) + found.bias
            bias = jax.lax.dynamic_update_slice_in_dim(so_far.bias, bias, begin, 0)
        head = jax.lax.dynamic_update_slice_in_dim(so_far.head, head, begin, 1)
        return Cotangents(so_far.hidden + found.hidden, head, bias)

    first = total._replace(hidden=jnp.zeros_like(take(total.hidden, jnp.int32(0), at.hidden.shape[0])))
    return jax.lax.fori_loop(0, blocks, products, first)


def _matmul(a: jax.Array, b: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    return _contract(a, b, (1, 0), precision)


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: jax.lax.PrecisionLike) -> jax.Array:
    """The sum over one axis of each, accumulated and returned in the wide dtype."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    wide = wide_dtype(a.dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=wide)
