"""The Gram matrix of the row factors, S^T J J^T S, for any model, in bounded memory.

This is the route that takes every model: explicit rows of S^T J from reverse-mode products. Where examples do not
interact each example's rows come from a model call on that example; elsewhere from products over the whole batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature.output_space import OutputCurvature
from curvax.structure.batch_axis import examples_independent
from curvax.tree import PyTree

DEFAULT_MAX_BYTES = 2 << 30
"""Memory for explicit rows: 2 GiB holds 1,280 rows of 400,000 float32 parameters at once."""

# More panels save less and less of the product, and each costs compile time; below 64 rows a product is not worth cutting.
_PANELS = 6
_LEAST_PANEL = 64


@dataclasses.dataclass(frozen=True)
class _RowBlocks:
    """Rows of S^T J in groups.

    Attributes:
      groups: number of groups.
      rows: rows per group.
      make: group index -> parameter tree with leaves (rows, ...).
    """

    groups: int
    rows: int
    make: Callable[[jax.Array], PyTree]


def row_gram(
    predict: Callable[[PyTree, Any], jax.Array],
    params: PyTree,
    inputs: Any,
    output: OutputCurvature,
    pull: Callable[[jax.Array], PyTree],
    *,
    max_bytes: int = DEFAULT_MAX_BYTES,
) -> jax.Array:
    """S^T J J^T S as a dense symmetric matrix.

    Args:
      predict: (params, inputs) -> outputs.
      params: trainable parameters.
      inputs: inputs of the whole batch.
      output: Q = S S^T of the whole batch.
      pull: u -> J^T u over the whole batch.
      max_bytes: bound on the memory of explicit rows; more rows are made in blocks, and made again for each block
        that they meet.

    Returns:
      (rows, rows) matrix in the wide dtype, rows flattened from `output.row_shape`, products at highest precision.
    """
    independent, _ = examples_independent(predict, params, inputs)
    if independent and not output.couples_examples:
        blocks = _example_blocks(predict, params, inputs, output)
    else:
        blocks = _joint_blocks(output, pull)
    itemsize = jnp.dtype(tree.scalar_dtype(params)).itemsize
    group_bytes = max(1, blocks.rows * tree.size(params) * itemsize)
    # Two blocks are alive while they meet.
    at_once = blocks.groups if blocks.groups * group_bytes <= max_bytes else max(1, max_bytes // (2 * group_bytes))
    return _gram_at_once(blocks) if at_once >= blocks.groups else _gram_by_blocks(blocks, int(at_once))


def _example_blocks(
    predict: Callable[[PyTree, Any], jax.Array], params: PyTree, inputs: Any, output: OutputCurvature
) -> _RowBlocks:
    rows = math.prod(output.row_shape[1:])

    def make(index: jax.Array) -> PyTree:
        one = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, index, 1, axis=0), inputs)
        outputs, vjp = jax.vjp(lambda p: predict(p, one), params)
        local = output.example(index)
        basis = jnp.eye(rows, dtype=tree.wide_dtype(outputs.dtype)).reshape(rows, 1, *output.row_shape[1:])
        return jax.vmap(lambda e: tree.widen(vjp(local.factor(e).astype(outputs.dtype))[0]))(basis)

    return _RowBlocks(output.row_shape[0], rows, make)


def _joint_blocks(output: OutputCurvature, pull: Callable[[jax.Array], PyTree]) -> _RowBlocks:
    total = math.prod(output.row_shape)
    dtype = jax.eval_shape(output.factor_transpose, _outputs_like(output)).dtype

    def make(index: jax.Array) -> PyTree:
        basis = jnp.zeros((total,), dtype).at[index].set(1).reshape(output.row_shape)
        return jax.tree.map(lambda x: x[None], pull(output.factor(basis)))

    return _RowBlocks(total, 1, make)


def _outputs_like(output: OutputCurvature) -> jax.ShapeDtypeStruct:
    shape = jax.ShapeDtypeStruct(output.row_shape, jnp.float32)
    return jax.eval_shape(output.factor, shape)


def _meet(left: PyTree, right: PyTree) -> jax.Array:
    total: jax.Array | None = None
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        width = math.prod(a.shape[1:])
        flat = (a.reshape(a.shape[0], width), b.reshape(b.shape[0], width))
        term = jnp.einsum("in,jn->ij", *flat, precision=jax.lax.Precision.HIGHEST)
        total = term if total is None else total + term.astype(total.dtype)
    if total is None:
        raise ValueError("there are no trainable parameters.")
    return total


def _make_many(blocks: _RowBlocks, indices: jax.Array) -> PyTree:
    rows = jax.vmap(blocks.make)(indices)
    return jax.tree.map(lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:]), rows)


def _gram_at_once(blocks: _RowBlocks) -> jax.Array:
    """Upper triangle by panels: p panels take (1 + 1/p) / 2 of the full product."""
    rows = _make_many(blocks, jnp.arange(blocks.groups, dtype=jnp.int32))
    total = blocks.groups * blocks.rows
    width = max(_LEAST_PANEL, -(-total // _PANELS))
    bands = []
    for start in range(0, total, width):
        panel = jax.tree.map(lambda x, a=start: x[a : a + width], rows)
        band = _meet(panel, jax.tree.map(lambda x, a=start: x[a:], rows))
        bands.append(jnp.pad(band, ((0, 0), (start, 0))))
    return _mirror(jnp.concatenate(bands))


def _mirror(upper: jax.Array) -> jax.Array:
    """The symmetric matrix whose upper triangle is that of `upper`."""
    strict = jnp.triu(upper, 1)
    return jnp.triu(upper) + strict.T


def _gram_by_blocks(blocks: _RowBlocks, at_once: int) -> jax.Array:
    """Upper triangle by blocks of rows that are made anew wherever they meet."""
    count = -(-blocks.groups // at_once)
    # The last block is filled up by repeating the last group; the surplus is cut off below.
    indices = jnp.minimum(jnp.arange(count * at_once, dtype=jnp.int32), blocks.groups - 1).reshape(count, at_once)
    side = at_once * blocks.rows
    shape = jax.eval_shape(lambda i: _meet(_make_many(blocks, i), _make_many(blocks, i)), indices[0])

    def row_of_blocks(i: jax.Array, gram: jax.Array) -> jax.Array:
        left = _make_many(blocks, indices[i])

        def block(j: jax.Array, gram: jax.Array) -> jax.Array:
            corner = _meet(left, _make_many(blocks, indices[j]))
            return jax.lax.dynamic_update_slice(gram, corner, (i * side, j * side))

        return jax.lax.fori_loop(i, jnp.asarray(count, i.dtype), block, gram)

    empty = jnp.zeros((count * side, count * side), shape.dtype)
    gram = jax.lax.fori_loop(jnp.zeros((), jnp.int32), jnp.asarray(count, jnp.int32), row_of_blocks, empty)
    total = blocks.groups * blocks.rows
    return _mirror(gram[:total, :total])
