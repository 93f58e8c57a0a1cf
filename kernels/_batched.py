"""What the ops on many independent linear systems share: the solution, and operands whose leading axes broadcast."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from curvax.tree import accumulation_dtype, divisor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BatchedSolution:
    """Solutions of many independent systems; every field has the batch axes in front.

    Attributes:
      value: the solutions, (..., n), in float32 or wider.
      result: a `curvax.solvers.Result` per system, int32.
      iterations: iterations that each system took, int32; 0 for direct solves.
      residual: |b - A x| / |b| of each system, recomputed from its definition; 0 where b is zero.
    """

    value: jax.Array
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array


def batch_shape(op: str, **operands: tuple[jax.Array, int]) -> tuple[int, ...]:
    """The leading axes of operands broadcast against each other; each comes with the number of its own last axes."""
    leading = {name: array.shape[: array.ndim - own] for name, (array, own) in operands.items()}
    try:
        return np.broadcast_shapes(*leading.values())
    except ValueError:
        shapes = ", ".join(f"{shape} of {name}" for name, shape in leading.items())
        raise TypeError(f"{op}: the leading axes do not broadcast: {shapes}; give them matching batch axes") from None


def align(array: jax.Array, own: int, rank: int) -> jax.Array:
    """The array with axes of size 1 in front, so that `rank` batch axes stand before its `own` last ones."""
    return array.reshape((1,) * (rank + own - array.ndim) + array.shape)


def check_matrices(op: str, matrices: jax.Array, rhs: jax.Array) -> None:
    """Raises TypeError unless `matrices` is (..., n, n) and `rhs` (..., n), both of floats."""
    if rhs.ndim < 1 or matrices.ndim < 2 or matrices.shape[-2:] != (rhs.shape[-1], rhs.shape[-1]):
        raise TypeError(
            f"{op}: matrices must be (..., n, n) and rhs (..., n), got {matrices.shape} and {rhs.shape}: "
            "several right-hand sides of one matrix stand along a batch axis of rhs, against an axis of size 1"
        )
    check_floating(op, matrices=matrices, rhs=rhs)


def check_floating(op: str, **arrays: jax.Array) -> None:
    """Raises TypeError unless every array has a real floating dtype."""
    for name, array in arrays.items():
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{op}: {name} has dtype {array.dtype}: convert it to a floating dtype")


def common_dtype(*arrays: jax.Array) -> np.dtype:
    """The dtype of the arithmetic: the widest of the operands', at least float32."""
    return max((accumulation_dtype(array.dtype) for array in arrays), key=lambda dtype: dtype.itemsize)


def widen_matrices(matrices: jax.Array, dtype: np.dtype) -> jax.Array:
    """The matrices in the dtype of the arithmetic; bfloat16 beside float32 stays: it is upcast as it is read."""
    if matrices.dtype == jnp.bfloat16 and dtype == np.float32:
        return matrices
    return matrices.astype(dtype)


def unit_scale(rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(|b|, 1 / |b|) of each system, safe against overflow and underflow of the squares; 0 where |b| has no inverse.

    A norm whose inverse is not a normal number, which processors may take for zero, counts as infinite.
    """
    largest = jnp.max(jnp.abs(rhs), axis=-1, initial=0)
    safe = divisor(largest)
    size = safe * jnp.sqrt(jnp.sum(jnp.square(rhs / safe[..., None]), axis=-1))
    size = jnp.where(size > 1 / float(jnp.finfo(size.dtype).tiny), jnp.full_like(size, jnp.inf), size)
    usable = (size > 0) & jnp.isfinite(size)
    return size, jnp.where(usable, 1 / jnp.where(usable, size, jnp.ones_like(size)), jnp.zeros_like(size))
