"""Randomized Nystrom approximation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.estimators._columns import columns_product, matmul, orthonormal
from curvax.estimators.base import LowRank, LowRankEstimator, Product, check_count
from curvax.kernels.dense_linalg import eigh, qr
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class RandomizedNystrom(LowRankEstimator):
    """Positive semidefinite low-rank approximation of C from its products with random vectors.

    With Y = C W for an orthonormal W (n, rank), the Nystrom approximation Y (W^T Y)^+ Y^T is never above C and is C
    itself if the rank suffices. It is computed for C + nu I, with nu at the level of rounding relative to |Y|, and nu
    is taken off its eigenvalues: see Frangella, Tropp and Udell, "Randomized Nystrom Preconditioning" (2023),
    algorithm 2.1, and Tropp, Yurtsever, Udell and Cevher, "Fixed-Rank Approximation of a Positive-Semidefinite Matrix
    from Streaming Data" (2017).

    Attributes:
      rank: number of columns; where there are fewer parameters, their number. A few more than the rank one is after
        (six, say) keep W^T Y well conditioned.
      indefinite: whether C may have negative eigenvalues (a Hessian). True spends a second product on each column and
        gives the non-negative part of the Rayleigh-Ritz approximation of C on the range of Y, whose values never
        exceed C's largest. False (default, right for Gauss-Newton and Fisher matrices) costs `rank` products; W^T Y
        of an indefinite C can be nearly singular where Y is not, so when W^T Y shows negative eigenvalues beyond
        rounding the shift is raised to 2 |Y| (Frobenius): the values stay finite, at most 7 |Y|, but are of little
        use.
    """

    rank: int
    indefinite: bool = False

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def low_rank(self, product: Product, like: PyTree, key: jax.Array) -> LowRank:
        n, dtype = tree.size(like), tree.scalar_dtype(like)
        rank = min(self.rank, n)
        if not n:
            return LowRank(jnp.zeros((0, 0), dtype), jnp.zeros((0,), dtype))
        multiply = columns_product(product, like)
        test = orthonormal(jax.random.normal(key, (n, rank), dtype))
        image = multiply(test)
        return _rayleigh_ritz(multiply, image) if self.indefinite else _nystrom(test, image)


def _nystrom(test: jax.Array, image: jax.Array) -> LowRank:
    """The approximation from W and Y = C W, for any scale of C.

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


def _rayleigh_ritz(multiply: Callable[[jax.Array], jax.Array], image: jax.Array) -> LowRank:
    """Eigenpairs of C restricted to the range of Y, negative values set to zero."""
    q = orthonormal(image)
    core = matmul(q.T, multiply(q))
    pairs = eigh((core + core.T) / 2)
    values = jnp.maximum(pairs.values, jnp.zeros_like(pairs.values))
    return LowRank(matmul(q, pairs.vectors)[:, ::-1], values[::-1])
