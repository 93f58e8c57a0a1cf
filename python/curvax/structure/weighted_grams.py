"""J_b D J_b^T of single examples, for a D that is diagonal in the basis of Kronecker blocks: variances of outputs.

In the basis (U, V) of a block an example's row r is Z_r = U^T (sum_t a_t d_rt^T) V, and D is a number D_nm for each
entry:

    (J D J^T)_rs = sum_nm Z_r,nm D_nm Z_s,nm

Of one position Z_r = a d_r^T, and no row is formed: the sum is d_r . (a^2 D) d_s, with a^2 D one vector of m numbers.
An
example: a = (1, 2), one output with d = (3), D = (1, 1/2)^T: a^2 D = 1 + 2 = 3, and the variance is 9 * 3 = 27.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvax.output_space import IdentityCurvature
from curvax.structure.blocks import FullBlock, KroneckerBlock, KroneckerBlocks, Wiring
from curvax.structure.capture import Capture, Factors
from curvax.structure.kronecker import Examples, cotangents_of, indices_of, projections, region_rows
from curvax.structure.rows import example_factors
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """D.

    Attributes:
      blocks: the blocks.
      bases: per Kronecker block (U, V); `None` for the identity.
      values: per Kronecker block D in its basis, (G, n, m).
      diagonal: per diagonal block, leaf-shaped.
    """

    blocks: KroneckerBlocks
    bases: list[tuple[jax.Array | None, jax.Array | None]]
    values: list[jax.Array]
    diagonal: list[jax.Array]


def weighted_grams(
    captured: Capture, params: PyTree, inputs: Any, outputs: jax.Array, by: BlockDiagonal, max_bytes: int
) -> jax.Array:
    """J_b D J_b^T of every example, (B, K, K) with K outputs per example, flattened.

    Args:
      captured: the model.
      params, inputs, outputs: of the batch.
      by: D, made for a model that uses its parameters in the same way.
      max_bytes: bound on the memory of the factors and rows of the examples that are alive at once; at least one is.
    """
    make = example_factors(captured, params, jax.tree.leaves(inputs), IdentityCurvature(outputs))
    wiring = Wiring.of(captured.structure.uses, [region for region, _ in captured.structure.regions])
    Examples(Factors([], [], []), [], wiring).check(by.blocks)

    def one(index: jax.Array) -> jax.Array:
        factors = jax.tree.map(lambda x: x[None], make(index))
        return _grams(Examples(factors, [], wiring), by)[0]

    examples, k = outputs.shape[0], math.prod(outputs.shape[1:])
    shapes = jax.eval_shape(make, jax.ShapeDtypeStruct((), jnp.int32))
    each = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    each += 2 * k * max(map(math.prod, by.blocks.shapes)) * by.blocks.dtype.itemsize
    at_once = max(1, min(examples, max_bytes // max(each, 1)))
    return jax.lax.map(one, jnp.arange(examples, dtype=jnp.int32), batch_size=at_once)


def _grams(examples: Examples, by: BlockDiagonal) -> jax.Array:
    total: jax.Array | None = None
    for block, (u, v), values in zip(by.blocks.kronecker, by.bases, by.values, strict=True):
        if isinstance(block, FullBlock):
            part = _region(region_rows(by.blocks, block.of, examples), v, values)
        else:
            part = (_looked_up if block.embedding and not block.swapped else _layer)(block, examples, u, v, values)
        total = part if total is None else total if part is None else total + part
    for block, values in zip(by.blocks.diagonal, by.diagonal, strict=True):
        part = _region(region_rows(by.blocks, block, examples), None, values)
        total = part if total is None else total if part is None else total + part
    if total is None:
        raise AssertionError("a model with parameters has blocks.")
    return total


def _weighted(rows: jax.Array, values: jax.Array) -> jax.Array:
    """(B, R, R) of rows (B, R, N)."""
    return jnp.einsum("brn,n,bsn->brs", rows, values, rows, precision="highest")


def _region(rows: jax.Array | None, v: jax.Array | None, values: jax.Array) -> jax.Array | None:
    """Of a region whose rows (B, R, *region) are formed; `None` where the model does not use it."""
    if rows is None:
        return None
    flat = rows.reshape(*rows.shape[:2], -1)
    if v is not None:
        flat = jnp.einsum("brm,ml->brl", flat, v[0], precision="highest")
    return _weighted(flat, values.reshape(-1))


def _layer(
    block: KroneckerBlock, examples: Examples, u: jax.Array | None, v: jax.Array | None, values: jax.Array
) -> jax.Array | None:
    parts = projections(block, examples, u, v)
    if not parts:
        return None
    if len(parts) == 1 and not examples.here(block.swapped) and parts[0].first.shape[1] == 1:
        a, d = parts[0].first[:, 0], parts[0].second[:, :, 0]
        inside = jnp.einsum("bgk,gkl->bgl", jnp.square(a), values, precision="highest")
        return jnp.einsum("brgl,bgl,bsgl->brs", d, inside, d, precision="highest")
    rows = functools.reduce(jnp.add, [part.rows() for part in parts])
    return _weighted(rows.reshape(*rows.shape[:2], -1), values.reshape(-1))


def _looked_up(
    block: KroneckerBlock, examples: Examples, u: jax.Array | None, v: jax.Array | None, values: jax.Array
) -> jax.Array | None:
    """Of an embedding: positions that look up the same row add up."""
    del u  # the basis of an embedding is that of its entries
    uses = examples.here(block.uses)
    if not uses:
        return None
    indices, d = indices_of(block, examples), cotangents_of(uses, examples)[..., 0, :] * block.scale
    if v is not None:
        d = jnp.einsum("brtm,ml->brtl", d, v[0], precision="highest")
    same = (indices[:, :, None] == indices[:, None, :]).astype(d.dtype)
    # Sum over rows of the table of (sum of d at its positions)^2 D: over all pairs of positions with one index. An
    # index past the end finds nothing.
    at = jnp.take(values[0], indices, axis=0, mode="fill", fill_value=0)
    together = jnp.einsum("btu,brul,btl->brtl", same, d, at, precision="highest")
    return jnp.einsum("brtl,bstl->brs", d, together, precision="highest")
