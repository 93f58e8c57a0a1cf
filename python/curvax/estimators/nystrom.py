"""Randomized Nystrom approximation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.estimators.base import LowRankEstimator, Product, check_count
from curvax.kernels.dense_linalg import eigh
from curvax.sketches import LowRank, columns_product, matmul, nystrom, orthonormal
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
        return _rayleigh_ritz(multiply, image) if self.indefinite else nystrom(test, image)


def _rayleigh_ritz(multiply: Callable[[jax.Array], jax.Array], image: jax.Array) -> LowRank:
    """Eigenpairs of C restricted to the range of Y, negative values set to zero."""
    q = orthonormal(image)
    core = matmul(q.T, multiply(q))
    pairs = eigh((core + core.T) / 2)
    values = jnp.maximum(pairs.values, jnp.zeros_like(pairs.values))
    return LowRank(matmul(q, pairs.vectors)[:, ::-1], values[::-1])
