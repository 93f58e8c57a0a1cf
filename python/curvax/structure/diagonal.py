"""The exact diagonal of C = J^T S S^T J, the sum of all squared rows, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.output_space import OutputCurvature
from curvax.structure.capture import Capture, Factors
from curvax.structure.squares import formed_bytes, squared_rows
from curvax.tree import PyTree


def example_diagonal(captured: Capture, params: PyTree, inputs: Any, output: OutputCurvature, max_bytes: int) -> PyTree:
    """The diagonal, from the factors of some examples at a time, or some rows of an example if these are too many."""
    leaves = jax.tree.leaves(params)
    shapes = [tuple(leaf.shape) for leaf in leaves]
    examples, rows = output.row_shape[0], math.prod(output.row_shape[1:])
    own = captured.inputs(leaves, jax.tree.leaves(inputs))

    def make(example: jax.Array, chosen: jax.Array) -> Factors:
        """Factors of some rows of an example; a row past the end is zero."""
        one = captured.one(own, example)
        return captured.example(leaves, one, lambda outputs: _columns(output.example(example), chosen, outputs))

    per_row = _row_bytes(captured, make, shapes)
    at_once = max(1, min(rows, max_bytes // max(per_row, 1)))
    examples_at_once = max(1, min(examples, max_bytes // max(per_row * at_once, 1)))
    blocks = _blocks(rows, at_once)

    def visit(total: list[jax.Array], index: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], None]:
        group, chosen = index
        # An example past the end has no rows.
        picked = jnp.where(group[:, None] < examples, chosen[None, :], rows)
        factors = jax.vmap(make)(jnp.minimum(group, examples - 1), picked)
        return tree.add(total, squared_rows(captured, factors, shapes)), None

    groups = _blocks(examples, examples_at_once)
    pairs = (jnp.repeat(groups, blocks.shape[0], axis=0), jnp.tile(blocks, (groups.shape[0], 1)))
    zero = [jnp.zeros(shape, captured.dtype) for shape in shapes]
    if pairs[0].shape[0] == 1:
        total, _ = visit(zero, (pairs[0][0], pairs[1][0]))
    else:
        total, _ = jax.lax.scan(visit, zero, pairs)
    return tree.cast_like(jax.tree.unflatten(jax.tree.structure(params), total), tree.zeros_like(params))


def _blocks(count: int, size: int) -> jax.Array:
    """(blocks, size) numbers from 0; those past the end are `count` or more."""
    blocks = -(-count // size)
    return jnp.arange(blocks * size, dtype=jnp.int32).reshape(blocks, size)


def _columns(local: OutputCurvature, chosen: jax.Array, outputs: jax.Array) -> jax.Array:
    rows = math.prod(local.row_shape[1:])
    basis = (chosen[:, None] == jnp.arange(rows, dtype=jnp.int32)).astype(tree.accumulation_dtype(outputs.dtype))
    return jax.vmap(local.factor)(basis.reshape(-1, 1, *local.row_shape[1:]))


def _row_bytes(captured: Capture, make: Callable[..., Factors], shapes: list[tuple[int, ...]]) -> int:
    index, one = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    factors = jax.eval_shape(make, index, one)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(factors))
    return kept + formed_bytes(captured, shapes, rows=1)


def joint_diagonal(output: OutputCurvature, vjp: Callable[[jax.Array], PyTree], max_bytes: int) -> PyTree:
    """The diagonal where examples interact: all rows formed, some at a time."""
    total = math.prod(output.row_shape)
    outputs = jax.eval_shape(output.factor, jax.ShapeDtypeStruct(output.row_shape, jnp.float32))
    dtype = jax.eval_shape(output.factor_transpose, outputs).dtype

    def row(index: jax.Array) -> PyTree:
        # A row past the end is zero.
        basis = (jnp.arange(total, dtype=jnp.int32) == index).astype(dtype).reshape(output.row_shape)
        return jax.tree.map(jnp.square, vjp(output.factor(basis)))

    like = jax.eval_shape(row, jax.ShapeDtypeStruct((), jnp.int32))
    bytes_per_row = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(like))
    blocks = _blocks(total, max(1, min(total, max_bytes // max(bytes_per_row, 1))))

    def visit(sums: PyTree, block: jax.Array) -> tuple[PyTree, None]:
        return tree.add(sums, jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(row)(block))), None

    return jax.lax.scan(visit, tree.zeros_like(like), blocks)[0]
