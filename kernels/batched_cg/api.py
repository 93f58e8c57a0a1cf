"""The op batched_cg: conjugate gradients on many independent symmetric positive definite systems at once.

Per system of size n that takes k iterations, with one right-hand side:

| form | reads | writes | FLOPs |
|---|---|---|---|
| dense, native | n^2 once (the matrix stays in cache, or on the chip) + n | n | (2 n^2 + 14 n) k + 2 n^2 |
| dense, pallas | n^2 once + n; n^2 once more where n is no multiple of 8 | n; n^2 to pad | (2 n^2 + 14 n) k + 4 n^2 |
| dense, reference | n^2 per iteration of the slowest | 14 n per iteration of the slowest | the same, of the slowest |
| product | what the product reads, per iteration of the slowest | the same | the product's + 14 n |

Batching: `jax.vmap` over any operand is exact, and what is not mapped is not copied.
Partitioning: systems are independent, so along the batch axes nothing is communicated: inside `jax.shard_map` each
device solves its own. Outside, the reference is partitioned by XLA like any JAX code; the native handlers and the
Mosaic kernel are not, so with several devices they are not taken there.
Differentiation: none; the op stays off the differentiated path.
"""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from curvax.kernels._batched import (
    BatchedSolution,
    align,
    batch_shape,
    check_floating,
    check_matrices,
    common_dtype,
    widen_matrices,
)
from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select, timed_on_hopper
from curvax.kernels._operands import arrays
from curvax.kernels.batched_cg import native, pallas, reference
from curvax.kernels.batched_cg.reference import Product

Scalar: TypeAlias = jax.Array | float

BATCHED_CG = Op(
    "batched_cg",
    (
        Variant("native", native.cannot, native.better_not, gain="each matrix stays in cache, or on the chip"),
        Variant("pallas", pallas.cannot, timed_on_hopper, gain="each matrix is read once and stays on the chip"),
        Variant("reference"),
    ),
)
BATCHED_CG_PRODUCT = Op("batched_cg_product", (Variant("reference"),))
OPS = (BATCHED_CG, BATCHED_CG_PRODUCT)


def batched_cg(
    system: jax.Array | Product,
    rhs: jax.Array,
    x0: jax.Array | None = None,
    *,
    tol: Scalar = 1e-5,
    maxiter: jax.Array | int | None = None,
    diagonal: jax.Array | None = None,
    implementation: Implementation | Choice | None = None,
) -> BatchedSolution:
    """Solves A x = b for many symmetric positive definite A at once (Hestenes and Stiefel 1952).

    Each system goes its own way: it stops at its own iteration, keeps its solution from then on, and has its own
    outcome; NaN in one never reaches another. The course of the iteration is that of
    `curvax.solvers.CG(stabilize_every=0)`, and depends neither on the scale of b nor on that of A.

    Leading axes broadcast as in NumPy. Several right-hand sides of one matrix are a batch axis of `rhs` against an axis
    of size 1, or none, of the matrices: (b, 1, n, n) with (b, k, n), or (n, n) with (k, n); the matrix is not copied.

    Outcomes, per system: CONVERGED; MAX_ITERATIONS; INACCURATE, where the recurrence of the residual met `tol` and the
    solution, in this dtype, does not, its residual being more than 2 `tol` |b|; NEGATIVE_CURVATURE, with the last
    iterate before that direction, or after a first one a step along it of length |p|^2 / (|p| |A p|) |b|; BREAKDOWN,
    where the curvature is zero to rounding (a singular matrix); NON_FINITE, where matrix or right-hand side hold NaN or
    infinity. With b = 0 the solution is 0 after no iterations.

    Args:
      system: dense matrices (..., n, n), float32, float64 or narrower (upcast), taken as symmetric: which triangle
        counts is not said. Or their product, v (..., n) -> (..., n), which must treat each system by itself.
      rhs: right-hand sides, (..., n).
      x0: where to start, (..., n); `None` for zero. A start that is worse than none is dropped, system by system.
      tol: stop at a residual of `tol` |b|; a scalar, or one per system. 1e-5 is what float32 attains on matrices of
        condition up to about 1e3.
      maxiter: most iterations, a scalar or one per system; `None` for 10 n, as in SciPy.
      diagonal: Jacobi preconditioner, (..., n): the diagonal of A, or anything near it. Entries that are not positive
        and finite count as the largest that is; a system without any goes without preconditioner.
      implementation: `None` for the best supported one. A product has the reference alone.

    Returns:
      The solutions, with outcome, iterations and true residual of each system. The arithmetic is in the widest dtype of
      matrices, `rhs`, `x0` and `diagonal`, at least float32.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: shapes or dtypes do not fit.
    """
    rhs, x0, diagonal = arrays(rhs, x0, diagonal)
    vectors = {"rhs": rhs} | ({} if x0 is None else {"x0": x0}) | ({} if diagonal is None else {"diagonal": diagonal})
    _check_vectors(vectors)
    product, matrices = (system, None) if callable(system) else (None, jnp.asarray(system))
    if matrices is not None:
        check_matrices("batched_cg", matrices, rhs)
    dtype = common_dtype(*vectors.values(), *(() if matrices is None else (matrices,)))
    tol = jnp.asarray(tol).astype(dtype)
    maxiter = jnp.asarray(10 * rhs.shape[-1] if maxiter is None else maxiter)
    maxiter = jnp.minimum(maxiter, jnp.iinfo(jnp.int32).max).astype(jnp.int32)  # 64 bits would wrap to a low limit
    own = {name: (array, 1) for name, array in vectors.items()} | {"tol": (tol, 0), "maxiter": (maxiter, 0)}
    batch = batch_shape("batched_cg", **own, **({} if matrices is None else {"matrices": (matrices, 2)}))
    rank = len(batch)
    rhs = align(rhs.astype(dtype), 1, rank)
    x0 = None if x0 is None else align(x0.astype(dtype), 1, rank)
    inverse = None if diagonal is None else align(_inverse(diagonal.astype(dtype)), 1, rank)
    tol, maxiter = align(tol, 0, rank), align(maxiter, 0, rank)
    if product is not None:
        select(BATCHED_CG_PRODUCT, implementation, Request.of(rhs))
        return reference.solve(_product(product), *reference.broadcast(batch, rhs, x0, tol, maxiter, inverse))
    matrices = align(widen_matrices(jnp.asarray(matrices), dtype), 2, rank)
    chosen = select(BATCHED_CG, implementation, Request.of(matrices, rhs)).implementation
    if chosen == "pallas":
        return pallas.solve(matrices, rhs, x0, tol, maxiter, inverse)
    if chosen == "native":
        return native.solve(matrices, rhs, x0, tol, maxiter, inverse, batch)
    return reference.solve_dense(matrices, *reference.broadcast(batch, rhs, x0, tol, maxiter, inverse))


def _check_vectors(vectors: dict[str, jax.Array]) -> None:
    """Raises TypeError unless all are (..., n) of floats."""
    check_floating("batched_cg", **vectors)
    shapes = {name: vector.shape for name, vector in vectors.items()}
    if any(len(shape) < 1 for shape in shapes.values()) or len({shape[-1] for shape in shapes.values()}) > 1:
        actual = ", ".join(f"{shape} of {name}" for name, shape in shapes.items())
        raise TypeError(f"batched_cg: vectors must end in one axis of the systems' size, got {actual}")


def _inverse(diagonal: jax.Array) -> jax.Array:
    """The inverse of a diagonal, scaled so that its least entry is 1: CG does not see the scale, and none overflows."""
    usable = (diagonal > 0) & jnp.isfinite(diagonal)
    largest = jnp.max(diagonal, axis=-1, keepdims=True, initial=0, where=usable)
    return jnp.where(usable, largest / jnp.where(usable, diagonal, jnp.ones_like(diagonal)), jnp.ones_like(diagonal))


def _product(product: Product) -> Product:
    """The product, with its result checked and cast to the dtype of the arithmetic."""

    def checked(v: jax.Array) -> jax.Array:
        result = product(v)
        if result.shape != v.shape:
            raise TypeError(f"batched_cg: the product of {v.shape} has shape {result.shape}: it must be the same")
        return result.astype(v.dtype)

    return checked
