"""linear_softmax_hvp in plain JAX, block by block; `pallas` runs the same loop with its own softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias, final

import jax
import jax.numpy as jnp

from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Head, LogitBlocks, Tangent
from curvax.kernels.linear_softmax_hvp.loop import Rows, Rule, Wanted, over_rows
from curvax.kernels.linear_softmax_hvp.statistics import Statistics, exponentials, softmax_statistics
from curvax.kernels.softmax_hvp import reference as softmax
from curvax.tree import accumulation_dtype

RowProduct: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""(logits, tangents, weights) of a block of rows -> the products of `softmax_hvp`."""


def linear_softmax_hvp(
    at: Head,
    tangent: Tangent,
    weights: jax.Array,
    blocks: LogitBlocks,
    precision: jax.lax.PrecisionLike,
    product: RowProduct = softmax.softmax_hvp,
) -> Cotangents:
    """See `api.linear_softmax_hvp`; hidden is (rows, features) here and weights (rows,)."""
    rows, rule = Rows(weights.astype(accumulation_dtype(at.hidden.dtype))), _Curvature(product)
    return over_rows(at, tangent, rows, blocks, precision, rule, Wanted.of(tangent)).cotangents


@final
@dataclass(frozen=True)
class _Curvature(Rule):
    """u = w (diag p - p p^T) v."""

    product: RowProduct

    def whole(
        self, z: jax.Array, v: jax.Array | None, rows: Rows, wanted: bool
    ) -> tuple[jax.Array | None, jax.Array | None]:
        return (self.product(z, _given(v), rows.weight) if wanted else None), None

    def statistics(self, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array) -> Statistics:
        return softmax_statistics(z, _given(v))

    def cotangents(
        self, statistics: Statistics, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array
    ) -> jax.Array:
        zero = jnp.zeros((), z.dtype)
        dead = (rows.weight[:, None] == 0) | (statistics.top == -jnp.inf)
        safe = jnp.where(dead, jnp.ones((), z.dtype), statistics.normalizer)
        e, mean = exponentials(z, statistics.top), _given(statistics.mean) / safe
        return jnp.where(dead, zero, rows.weight[:, None] * (1 / safe) * (e * (_given(v) - mean)))

    def losses(self, statistics: Statistics, rows: Rows) -> None:
        return None


def _given(x: jax.Array | None) -> jax.Array:
    if x is None:
        raise AssertionError("a product has a tangent.")
    return x
