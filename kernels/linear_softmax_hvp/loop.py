"""The loop over blocks of a head's rows, and of its columns where they are cut too; the ops say what a row gives."""

from __future__ import annotations

import abc
from typing import NamedTuple

import jax
import jax.numpy as jnp

from curvax.kernels._vary import vary_alike
from curvax.kernels.linear_softmax_hvp.blocks import (
    Cotangents,
    Head,
    LogitBlocks,
    Tangent,
    count,
    fresh,
    start,
    take,
)
from curvax.kernels.linear_softmax_hvp.statistics import Statistics, merge, nothing
from curvax.tree import accumulation_dtype


class Rows(NamedTuple):
    """What belongs to rows beside the hidden state.

    Attributes:
      weight: (rows,), in the accumulation dtype.
      label: (rows,), int32, or None for an op without labels.
    """

    weight: jax.Array
    label: jax.Array | None = None


class Wanted(NamedTuple):
    """Which cotangents are made."""

    hidden: bool
    head: bool
    bias: bool

    @staticmethod
    def of(parts: Head | Tangent) -> Wanted:
        """Those of the parts that are there."""
        return Wanted(*(part is not None for part in parts))


class Rule(abc.ABC):
    """What logits z and their tangents v (None without) give, row by row: cotangents u of the logits, and losses.

    All are upcast and (rows, columns), losses (rows,). `columns` are the indices of the columns at hand, -1 for those
    that another block has; there z is minus infinity and u must be zero.
    """

    linearized: bool = False
    """Whether z is to be the linearized logits, z + v, and v None."""

    @abc.abstractmethod
    def whole(
        self, z: jax.Array, v: jax.Array | None, rows: Rows, wanted: bool
    ) -> tuple[jax.Array | None, jax.Array | None]:
        """(u or, where it is not wanted, None; losses or, if there are none, None) from all columns at once."""

    @abc.abstractmethod
    def statistics(self, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array) -> Statistics:
        """What is to be known of all columns before u can be made."""

    @abc.abstractmethod
    def cotangents(
        self, statistics: Statistics, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array
    ) -> jax.Array:
        """The u of these columns."""

    @abc.abstractmethod
    def losses(self, statistics: Statistics, rows: Rows) -> jax.Array | None:
        """The rows' losses, None if there are none."""


class Pullback(NamedTuple):
    """Cotangents of the head, and the losses of the rows, None if the rule has none."""

    cotangents: Cotangents
    losses: jax.Array | None


def over_rows(
    at: Head,
    tangent: Tangent | None,
    rows: Rows,
    blocks: LogitBlocks,
    precision: jax.lax.PrecisionLike,
    rule: Rule,
    wanted: Wanted,
) -> Pullback:
    """What `rule` gives, pulled back through the head.

    Args:
      at: the head; hidden is (rows, features).
      tangent: its tangent, or None.
      rows: weights and labels.
      blocks: how many rows and columns at a time.
      precision: of the matmuls.
      rule: what a row gives.
      wanted: which cotangents are made.
    """
    total, accumulation = rows.weight.size, accumulation_dtype(at.hidden.dtype)
    tangent = None if tangent is None or not any(Wanted.of(tangent)) else tangent
    # What no block has more than a part of: losses and hidden cotangents are each block's own, the rest are sums.
    labeled = rows.label is not None

    def body(index: jax.Array, so_far: Pullback) -> Pullback:
        # 1. The block's rows. The last block begins early enough to be full; what was done before has weight zero in
        # it.
        begin, new = start(index, blocks.rows, total), fresh(index, blocks.rows, total)
        weight = jnp.where(new, take(rows.weight, begin, blocks.rows), jnp.zeros((), rows.weight.dtype))
        own = Rows(weight, None if rows.label is None else take(rows.label, begin, blocks.rows))

        def rows_of(hidden: jax.Array) -> jax.Array:
            # Whatever stands in a row without weight, infinities and NaN included: 0 times it must be 0 in H^T u.
            hidden = take(hidden, begin, blocks.rows)
            return jnp.where(weight[:, None] == 0, jnp.zeros((), hidden.dtype), hidden)

        part, direction = at._replace(hidden=rows_of(at.hidden)), tangent
        if tangent is not None and tangent.hidden is not None:
            direction = tangent._replace(hidden=rows_of(tangent.hidden))
        # 2. Logits, their cotangents, and the products with those.
        run = _by_columns if blocks.columns < at.head.shape[1] else _by_rows
        term = run(part, direction, own, so_far.cotangents, blocks.columns, precision, rule, wanted)

        # 3. Losses and hidden cotangents go to their rows; head and bias cotangents are sums already.
        def kept(old: jax.Array | None, now: jax.Array | None) -> jax.Array | None:
            if old is None or now is None:
                return None
            mask = new.reshape(-1, *(1,) * (old.ndim - 1))
            now = jnp.where(mask, now, take(old, begin, blocks.rows))
            return jax.lax.dynamic_update_slice_in_dim(old, now, begin, 0)

        cotangents = term.cotangents._replace(hidden=kept(so_far.cotangents.hidden, term.cotangents.hidden))
        return Pullback(cotangents, kept(so_far.losses, term.losses))

    zero = Pullback(_zero(at, wanted), jnp.zeros((total,), accumulation) if labeled else None)
    varying = vary_alike(jax.tree.leaves(zero), like=jax.tree.leaves((at, tangent, rows)))
    zero = jax.tree.unflatten(jax.tree.structure(zero), varying)
    return jax.lax.fori_loop(0, count(blocks.rows, total), body, zero)


def _zero(at: Head, wanted: Wanted) -> Cotangents:
    accumulation = accumulation_dtype(at.hidden.dtype)
    pairs = zip(at, wanted, strict=True)
    return Cotangents(*(jnp.zeros(x.shape, accumulation) if x is not None and own else None for x, own in pairs))


def _by_rows(
    at: Head,
    tangent: Tangent | None,
    rows: Rows,
    total: Cotangents,
    size: int,
    precision: jax.lax.PrecisionLike,
    rule: Rule,
    wanted: Wanted,
) -> Pullback:
    """A block of rows with all columns (`size` of them) at once."""
    del size
    z, v = _logits(at, tangent, precision, rule)
    u, losses = rule.whole(z, v, rows, any(wanted))
    if u is None:
        return Pullback(total, losses)
    term = _pull(at, u, precision, wanted)
    return Pullback(Cotangents(term.hidden, _add(total.head, term.head), _add(total.bias, term.bias)), losses)


def _by_columns(
    at: Head,
    tangent: Tangent | None,
    rows: Rows,
    total: Cotangents,
    size: int,
    precision: jax.lax.PrecisionLike,
    rule: Rule,
    wanted: Wanted,
) -> Pullback:
    """A block of rows whose logits are too many at once: statistics over blocks of columns, then the cotangents.

    The second pass makes logits and tangents anew, so their matmuls run twice.
    """
    columns = at.head.shape[1]
    blocks = count(size, columns)

    def forward(index: jax.Array) -> tuple[Head, jax.Array, jax.Array | None, jax.Array]:
        begin, new = start(index, size, columns), fresh(index, size, columns)

        def bias_of(bias: jax.Array | None) -> jax.Array | None:
            return None if bias is None else take(bias, begin, size)

        part, direction = Head(at.hidden, take(at.head, begin, size, axis=1), bias_of(at.bias)), tangent
        if tangent is not None:
            head = None if tangent.head is None else take(tangent.head, begin, size, axis=1)
            direction = Tangent(tangent.hidden, head, bias_of(tangent.bias))
        z, v = _logits(part, direction, precision, rule)
        here = jnp.where(new, begin + jnp.arange(size, dtype=jnp.int32), jnp.int32(-1))
        return part, jnp.where(new, z, jnp.asarray(-jnp.inf, z.dtype)), v, here

    def of_block(index: jax.Array) -> Statistics:
        _, z, v, here = forward(index)
        return rule.statistics(z, v, rows, here)

    neutral = nothing(jax.eval_shape(of_block, jnp.int32(0)))
    varying = vary_alike(jax.tree.leaves(neutral), like=jax.tree.leaves((at, tangent, rows)))
    neutral = jax.tree.unflatten(jax.tree.structure(neutral), varying)
    statistics = jax.lax.fori_loop(0, blocks, lambda index, so_far: merge(so_far, of_block(index)), neutral)
    losses = rule.losses(statistics, rows)
    if not any(wanted):
        return Pullback(total, losses)

    def products(index: jax.Array, so_far: Cotangents) -> Cotangents:
        part, z, v, here = forward(index)
        u = rule.cotangents(statistics, z, v, rows, here)
        term, begin = _pull(part, u, precision, wanted), start(index, size, columns)

        def placed(old: jax.Array | None, now: jax.Array | None, axis: int) -> jax.Array | None:
            if old is None or now is None:
                return None
            return jax.lax.dynamic_update_slice_in_dim(old, take(old, begin, size, axis) + now, begin, axis)

        head, bias = placed(so_far.head, term.head, 1), placed(so_far.bias, term.bias, 0)
        return Cotangents(_add(so_far.hidden, term.hidden), head, bias)

    first = total
    if total.hidden is not None:
        first = total._replace(hidden=jnp.zeros_like(take(total.hidden, jnp.int32(0), at.hidden.shape[0])))
    return Pullback(jax.lax.fori_loop(0, blocks, products, first), losses)


def _add(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    return None if a is None or b is None else a + b


def _logits(
    at: Head, tangent: Tangent | None, precision: jax.lax.PrecisionLike, rule: Rule
) -> tuple[jax.Array, jax.Array | None]:
    """(logits, their tangents): linearized logits and None if the rule asks for those."""
    z = _matmul(at.hidden, at.head, precision)
    z = z if at.bias is None else z + at.bias.astype(z.dtype)
    if tangent is None:
        return z, None
    parts: list[jax.Array] = []
    if tangent.hidden is not None:
        parts.append(_matmul(tangent.hidden, at.head, precision))
    if tangent.head is not None:
        parts.append(_matmul(at.hidden, tangent.head, precision))
    if tangent.bias is not None:
        parts.append(jnp.broadcast_to(tangent.bias.astype(z.dtype), z.shape))
    v = parts[0]
    for part in parts[1:]:
        v = v + part
    return (z + v, None) if rule.linearized else (z, v)


def _pull(at: Head, u: jax.Array, precision: jax.lax.PrecisionLike, wanted: Wanted) -> Cotangents:
    """The cotangents of hidden, head and bias that belong to cotangents `u` of the logits."""
    # float16 has no room for cotangents: a weight of 1 / rows times a small probability underflows.
    dtype = jnp.float32 if at.hidden.dtype == jnp.float16 else at.hidden.dtype
    narrow = u.astype(dtype)
    hidden = _contract(narrow, at.head.astype(dtype), (1, 1), precision) if wanted.hidden else None
    head = _contract(at.hidden.astype(dtype), narrow, (0, 0), precision) if wanted.head else None
    return Cotangents(hidden, head, jnp.sum(u, axis=0) if wanted.bias else None)


def _matmul(a: jax.Array, b: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    return _contract(a, b, (1, 0), precision)


def _contract(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: jax.lax.PrecisionLike) -> jax.Array:
    """The sum over one axis of each, accumulated and returned in the accumulation dtype."""
    dims = (((axes[0],), (axes[1],)), ((), ()))
    accumulation = accumulation_dtype(a.dtype)
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=accumulation)
