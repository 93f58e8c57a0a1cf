"""Low-rank approximations of symmetric operators from their products with a block of vectors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels.dense_linalg import eigh, qr
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """U diag(values) U^T on flattened parameters (`curvax.tree.ravel`), positive semidefinite.

    Attributes:
      basis: U, (n, rank), orthonormal columns, in the widest dtype of the parameters and at least float32.
      values: (rank,), non-negative, descending; same dtype.
    """

    basis: jax.Array
    values: jax.Array


def columns_product(product: Callable[[PyTree], PyTree], like: PyTree) -> Callable[[jax.Array], jax.Array]:
    """`product` on matrices: (n, m) -> (n, m), column by column, as one batched product."""
    _, unravel = tree.ravel(tree.zeros_like(like))

    def on_vector(v: jax.Array) -> jax.Array:
        return tree.ravel(product(unravel(v)))[0].astype(v.dtype)

    return jax.vmap(on_vector, in_axes=1, out_axes=1)


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """Matrix product in the full precision of the inputs: no TF32 or bfloat16 passes on accelerators."""
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def orthonormal(columns: jax.Array) -> jax.Array:
    """Orthonormal (n, m) basis Q whose span holds the columns (n, m), n >= m, also where they depend on each other."""
    return qr(columns).q


def nystrom(test: jax.Array, image: jax.Array) -> LowRank:
    """The Nystrom approximation Y (W^T Y)^+ Y^T of C from an orthonormal W and Y = C W, for any scale of C.

    Columns that are zero in both are columns that there are not: their values are zero.

    With W^T Y = V D V^T and B = (Y + nu W) V (D + nu)^(-1/2), the approximation of C + nu I is B B^T. The eigenvalues
    D take the place of a Cholesky factor because they also tell how negative rounding (or C) has made W^T Y.
    """
    size = tree.norm(image)
    image = image / jnp.where(size == 0, jnp.ones_like(size), size)
    core = matmul(test.T, image)
    pairs = eigh((core + core.T) / 2)
    values, vectors = pairs.values, pairs.vectors
    shift = _shift(values, test.shape[0])
    halves = matmul(image + shift * test, vectors) / jnp.sqrt(jnp.maximum(values + shift, shift / 2))
    # The left singular vectors of B = Q R, and its squared singular values to rounding of the largest, which nu is.
    factors = qr(halves)
    pairs = eigh(matmul(factors.r, factors.r.T))
    values = jnp.maximum(pairs.values - shift, jnp.zeros_like(shift))
    return LowRank(matmul(factors.q, pairs.vectors)[:, ::-1], size * values[::-1])


def _shift(core_values: jax.Array, n: int) -> jax.Array:
    """nu for a problem scaled to |Y| = 1 (Frobenius).

    Rounding puts an error of about sqrt(n) eps into W^T Y. Twice its most negative eigenvalue is enough to make the
    shifted core positive definite; one beyond 100 times rounding is not rounding.
    """
    eps = float(jnp.finfo(core_values.dtype).eps)
    rounding = jnp.asarray(math.sqrt(n) * eps, core_values.dtype)
    negative = jnp.maximum(-core_values[0], jnp.zeros_like(rounding))
    shift = jnp.maximum(rounding, negative + negative)
    return jnp.where(negative > 100 * rounding, jnp.full_like(shift, 2), shift)
