"""J_b of all blocks b at once: tangents and cotangents of every block through one linearization.

With delta cut into blocks, the map P: delta -> (J_1 delta_1, ..., J_n delta_n) is linear, and its transpose takes
(u_1, ..., u_n) to the vector whose block b is J_b^T u_b. So one map, transposed by JAX, serves both directions.

P is not n times the work of J. The tangent of a block is zero until the model reaches the block's layer, so P walks
through the jaxpr of J with a leading axis of the blocks whose tangents have arrived, and no others; the transposed walk
drops a block's cotangent below its layer. Three layers, a block each, with t_b the tangent of block b:

    equation of J                       blocks of its result
    d1 = x dW1                          (1)          one product: only t_1 exists here
    d2 = s1 d1 W2 + h1 dW2              (1, 2)       t_1 passes through, t_2 arrives
    d3 = s2 d2 W3 + h2 dW3              (1, 2, 3)    t_1 and t_2 pass through, t_3 arrives

Of L equal layers, J is two products per layer (the layer's own tangent, and the tangent that passes through), and P is
1 + (L - 1) / 2 on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.jaxprs import CALLS, Step, bind, bodies, equations_of, evaluate
from curvax.layerwise.blocks import ParameterBlocks
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tangents:
    """Tangents (or cotangents) of one value: those of `blocks`, along a leading axis; all other blocks' are zero.

    Attributes:
      blocks: ascending; static.
      value: (blocks, *the value's own shape).
    """

    blocks: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    value: jax.Array


def block_jvp(
    jvp: Callable[[PyTree], PyTree], like: PyTree, blocks: ParameterBlocks, chosen: tuple[int, ...]
) -> Callable[[PyTree], PyTree]:
    """P: upcast vector -> `Tangents` J_b delta_b in the place of each output, of the chosen blocks b that reach it.

    Args:
      jvp: v -> J v, linear; traced once here.
      like: shapes of v.
      blocks: the partition of v.
      chosen: the blocks that are wanted, ascending; entries of v in others are not read.
    """
    closed, shapes = jax.make_jaxpr(jvp, return_shape=True)(like)
    structure = jax.tree.structure(shapes)

    def tangents(v: PyTree) -> PyTree:
        leaves = [_lift(leaf, owner, chosen) for leaf, owner in zip(jax.tree.leaves(v), blocks.of_leaf, strict=True)]
        outputs = [
            x if isinstance(x, Tangents) else _none(aval.shape, aval.dtype)
            for x, aval in zip(evaluate(equations_of(closed), leaves, _step), closed.out_avals, strict=True)
        ]
        return jax.tree.unflatten(structure, outputs)

    return tangents


def _lift(leaf: jax.Array, owner: int | tuple[int, ...], chosen: tuple[int, ...]) -> Tangents:
    """The tangents of a leaf for those of its blocks that are chosen."""
    if isinstance(owner, int):
        return Tangents((owner,), leaf[None]) if owner in chosen else _none(leaf.shape, leaf.dtype)
    owned = tuple(block for block in chosen if block in owner)
    layers = np.asarray([[block == of_layer for of_layer in owner] for block in owned], bool)
    ones = jnp.asarray(layers.reshape(len(owned), len(owner), *(1,) * (leaf.ndim - 1)), leaf.dtype)
    return Tangents(owned, ones * leaf[None])


def _none(shape: tuple[int, ...], dtype: Any) -> Tangents:
    """Zero for every block."""
    return Tangents((), jnp.zeros((0, *shape), dtype))


def _step(index: int, step: Step, operands: list[Any]) -> list[Any]:
    """The results of a step, some of whose operands are `Tangents`."""
    moving = [x for x in operands if isinstance(x, Tangents)]
    # 1. Nothing of v is in it: a number of the model, the same for all blocks.
    if not moving:
        return bind(step.eqn, operands)
    # 2. A call is walked through, so that its inner layers see the tangents arrive one by one.
    if step.primitive in CALLS:
        (called,) = bodies(step.eqn)
        return evaluate(equations_of(called.jaxpr), operands, _step)
    # 3. The blocks whose tangents have arrived at any operand. The equation is linear in its tangents: a block with
    #    none among its operands has none in its results.
    arrived = tuple(sorted({b for x in moving for b in x.blocks}))
    if not arrived:
        return [_none(aval.shape, aval.dtype) for aval in step.output_avals]
    # 4. All of them at once.
    axes = tuple(0 if isinstance(x, Tangents) else None for x in operands)
    expanded = [_expanded(x, arrived) if isinstance(x, Tangents) else x for x in operands]
    results = jax.vmap(lambda *xs: bind(step.eqn, xs), in_axes=axes)(*expanded)
    return [Tangents(arrived, r) for r in results]


def _expanded(x: Tangents, blocks: tuple[int, ...]) -> jax.Array:
    """(blocks, ...) the tangents of `x`, with zeros for those of `blocks` that it lacks."""
    if x.blocks == blocks:
        return x.value
    have = {b: i for i, b in enumerate(x.blocks)}
    pieces: list[jax.Array] = []
    start = 0
    while start < len(blocks):
        end = start + 1
        if blocks[start] in have:
            while end < len(blocks) and have.get(blocks[end]) == have[blocks[end - 1]] + 1:
                end += 1
            first = have[blocks[start]]
            pieces.append(x.value[first : first + end - start])
        else:
            while end < len(blocks) and blocks[end] not in have:
                end += 1
            pieces.append(jnp.zeros((end - start, *x.value.shape[1:]), x.value.dtype))
        start = end
    return jnp.concatenate(pieces)
