"""linear_softmax_residual in plain JAX, in the loop of linear_softmax_hvp."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import jax
import jax.numpy as jnp

from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Head, LogitBlocks, Tangent
from curvax.kernels.linear_softmax_hvp.loop import Rows, Rule, Wanted, over_rows
from curvax.kernels.linear_softmax_hvp.statistics import Statistics, exponentials, softmax_statistics

UNKNOWN = -2  # A label that is no column; -1 are columns that another block has.


def run(
    at: Head,
    tangent: Tangent | None,
    rows: Rows,
    blocks: LogitBlocks,
    precision: jax.lax.PrecisionLike,
    rule: Residual,
    wanted: Wanted,
) -> tuple[jax.Array, Cotangents]:
    """(loss, cotangents); see `api`. Hidden is (rows, features) here."""
    sums = over_rows(at, tangent, rows, blocks, precision, rule, wanted)
    if sums.losses is None:
        raise AssertionError("rows with labels have losses.")
    return jnp.sum(sums.losses), sums.cotangents


@final
@dataclass(frozen=True)
class Residual(Rule):
    """u = w (p - y), and with tangents v, where they are not in the logits already, w (diag p - p p^T) v more.

    Attributes:
      label_smoothing: share of the label's mass that is spread over the classes that are not ruled out.
      linearized: whether tangents are added to the logits.
    """

    label_smoothing: float = 0.0
    linearized: bool = True

    def whole(
        self, z: jax.Array, v: jax.Array | None, rows: Rows, wanted: bool
    ) -> tuple[jax.Array | None, jax.Array | None]:
        columns = jnp.arange(z.shape[1], dtype=jnp.int32)
        statistics = self.statistics(z, v, rows, columns)
        return (self.cotangents(statistics, z, v, rows, columns) if wanted else None), self.losses(statistics, rows)

    def statistics(self, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array) -> Statistics:
        zero = jnp.zeros((), z.dtype)
        label = jnp.sum(jnp.where(_hits(rows, columns), z, zero), axis=1, keepdims=True)
        statistics = softmax_statistics(z, v)._replace(label=label)
        if not self.label_smoothing:
            return statistics
        allowed = z > -jnp.inf
        total = jnp.sum(jnp.where(allowed, z, zero), axis=1, keepdims=True)
        return statistics._replace(total=total, allowed=jnp.sum(allowed.astype(z.dtype), axis=1, keepdims=True))

    def cotangents(
        self, statistics: Statistics, z: jax.Array, v: jax.Array | None, rows: Rows, columns: jax.Array
    ) -> jax.Array:
        zero, weight = jnp.zeros((), z.dtype), rows.weight[:, None]
        inverse = 1 / statistics.normalizer
        p = exponentials(z, statistics.top) * inverse
        if v is not None and statistics.mean is not None:
            p = p * (1 + (v - statistics.mean * inverse))
        y = (1 - self.label_smoothing) * _hits(rows, columns).astype(z.dtype)
        if statistics.allowed is not None:
            y = y + jnp.where(z > -jnp.inf, self.label_smoothing / statistics.allowed, zero)
        u = jnp.where(_known(rows)[:, None], weight * (p - y), jnp.asarray(jnp.nan, z.dtype))
        return jnp.where((weight == 0) | (columns < 0), zero, u)

    def losses(self, statistics: Statistics, rows: Rows) -> jax.Array:
        if statistics.label is None:
            raise AssertionError("rows with labels have the labels' logits.")
        # As a difference from the largest logit: a row far from zero keeps its digits.
        loss = (1 - self.label_smoothing) * (statistics.top - statistics.label)
        if statistics.total is not None and statistics.allowed is not None:
            loss = loss + self.label_smoothing * (statistics.top - statistics.total / statistics.allowed)
        loss = (loss + jnp.log(statistics.normalizer))[:, 0]
        weighted = rows.weight * jnp.where(_known(rows), loss, jnp.asarray(jnp.nan, loss.dtype))
        return jnp.where(rows.weight == 0, jnp.zeros((), loss.dtype), weighted)


def _hits(rows: Rows, columns: jax.Array) -> jax.Array:
    """Which of the columns are their row's label: a comparison, as it fuses into what reads it."""
    return _label(rows)[:, None] == columns[None]


def _known(rows: Rows) -> jax.Array:
    return _label(rows) != UNKNOWN


def _label(rows: Rows) -> jax.Array:
    if rows.label is None:
        raise AssertionError("a cross entropy has labels.")
    return rows.label
