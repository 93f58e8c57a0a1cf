"""Operands of the ops as arrays, checked: lists and NumPy arrays become arrays of JAX, in dtypes that JAX has here."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from curvax.tree import PyTree


def arrays(*operands: Any) -> tuple[Any, ...]:
    """The operands as arrays, `None` as it is."""
    return tuple(None if operand is None else jnp.asarray(operand) for operand in operands)


def floating(op: str, **trees: PyTree) -> tuple[PyTree, ...]:
    """The trees with arrays for leaves; raises TypeError unless all are real floating-point numbers."""
    results = tuple(jax.tree.map(jnp.asarray, tree) for tree in trees.values())
    for name, tree in zip(trees, results, strict=True):
        for i, leaf in enumerate(jax.tree.leaves(tree)):
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise TypeError(f"{op}: leaf {i} of {name} is {leaf.dtype}: pass real floating-point numbers")
    return results


def scalar(op: str, name: str, value: Any) -> jax.Array:
    """The scalar as an array; raises TypeError unless it is one, and real."""
    array = jnp.asarray(value)
    if array.ndim or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{op}: {name} is {array.dtype}{array.shape}: pass a real scalar, and `jax.vmap` over several")
    return array


def row_weights(op: str, weights: Any, rows: tuple[int, ...]) -> jax.Array:
    """The weights, one per row, ones for `None`; raises unless they are real and broadcast to the rows."""
    array = jnp.ones((), jnp.float32) if weights is None else jnp.asarray(weights)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{op}: the weights are of dtype {array.dtype}: pass real numbers")
    if array.ndim > len(rows) or any(n not in (1, m) for n, m in zip(array.shape[::-1], rows[::-1], strict=False)):
        raise ValueError(f"{op}: the weights have shape {array.shape} with rows {rows}: give one per row")
    return jnp.broadcast_to(array, rows)
