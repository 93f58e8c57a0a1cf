"""What a foreign call needs inside `jax.shard_map`: operands and results that vary over the same mesh axes."""

from __future__ import annotations

from collections.abc import Sequence

import jax


def vary_alike(arrays: Sequence[jax.Array], like: Sequence[jax.Array] = ()) -> list[jax.Array]:
    """Types arrays inside `jax.shard_map` as varying over every mesh axis over which any of them, or of `like`, varies.

    A result may depend on every operand; JAX wants that in its type and cannot infer it for a foreign call.
    """
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    everywhere = frozenset().union(*axes, *(jax.typeof(array).manual_axis_type.varying for array in like))
    missing = [tuple(sorted(everywhere - own)) for own in axes]
    return [jax.lax.pcast(a, m, to="varying") if m else a for a, m in zip(arrays, missing, strict=True)]


def varying_like(out: jax.ShapeDtypeStruct, operand: jax.Array) -> jax.ShapeDtypeStruct:
    """Inside `jax.shard_map` the type of a result that varies over the mesh axes over which an operand does."""
    return jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=jax.typeof(operand).manual_axis_type)
