"""J_b of all blocks b at once: tangents and cotangents of every block through one linearization.

With delta cut into blocks, the map P: delta -> (J_1 delta_1, ..., J_n delta_n) is linear, and its transpose takes
(u_1, ..., u_n) to the vector whose block b is J_b^T u_b. So one map, transposed by JAX, serves both directions.

P is not n times the work of J. The tangent of a block is zero until the model reaches the block's layer, so P walks
through the jaxpr of J with a leading axis that holds, at each equation, only the blocks whose tangents have arrived;
the transposed walk drops a block's cotangent below its layer. Of L equal layers, J is two products per layer (the
layer's own tangent, and the tangent that passes through), and P is 1 + (L - 1) / 2 on average.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var

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


def block_push(
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

    def pushed(v: PyTree) -> PyTree:
        leaves = [_lift(leaf, owner, chosen) for leaf, owner in zip(jax.tree.leaves(v), blocks.of_leaf, strict=True)]
        found = _walk(closed.jaxpr, closed.consts, leaves)
        reached = [
            x if isinstance(x, Tangents) else _none(aval.shape, aval.dtype)
            for x, aval in zip(found, closed.out_avals, strict=True)
        ]
        return jax.tree.unflatten(structure, reached)

    return pushed


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


def _walk(jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for eqn in jaxpr.eqns:
        values.update(zip(eqn.outvars, _equation(eqn, [read(v) for v in eqn.invars]), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _equation(eqn: Any, operands: list[Any]) -> list[Any]:
    moving = [x for x in operands if isinstance(x, Tangents)]
    if moving and eqn.primitive.name in ("jit", "pjit", "closed_call"):
        inner = eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"]
        closed = inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
        return _walk(closed.jaxpr, closed.consts, operands)
    if not moving:
        return _bind(eqn, operands)
    arrived = tuple(sorted({b for x in moving for b in x.blocks}))
    if not arrived:
        return [_none(v.aval.shape, v.aval.dtype) for v in eqn.outvars]
    axes = tuple(0 if isinstance(x, Tangents) else None for x in operands)
    spread = [_spread(x, arrived) if isinstance(x, Tangents) else x for x in operands]
    # The equation is linear in its tangents: a block with none among its operands has none in its results.
    results = jax.vmap(lambda *xs: _bind(eqn, list(xs)), in_axes=axes)(*spread)
    return [Tangents(arrived, r) for r in results]


def _bind(eqn: Any, operands: list[Any]) -> list[Any]:
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _spread(x: Tangents, blocks: tuple[int, ...]) -> jax.Array:
    """The tangents of `blocks`, which hold those of `x` and others."""
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
