"""In which form the curvature of a posterior is kept: full, low rank, diagonal, Kronecker factors.

All are seen through the prior: with P the prior's precision and s = 1 / noise^2

    s H + P  =  P^(1/2) (I + M) P^(1/2),         M = s P^(-1/2) H P^(-1/2)

M has the form that H has, as P is one number on each leaf (each block), and known eigenvalues m. So

    log det (s H + P) - log det P = sum log(1 + m),      (s H + P)^-1 = P^(-1/2) (I + M)^-1 P^(-1/2)

and nothing is factorized anew for another noise or another number as the prior. Only a full or low-rank H under a prior
with a number for each leaf has other eigenvectors with every prior: of rank r it takes an r x r factorization.
"""

from __future__ import annotations

import abc
import dataclasses

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels.dense_linalg import cholesky, eigh, triangular_solve
from curvax.laplace.prior import Prior
from curvax.operators import Diagonal as DiagonalOperator
from curvax.operators import (
    Factored,
    KroneckerEigen,
    LowRankPlusIdentity,
    diagonal,
    ekfac,
    kfac,
    low_rank,
    nystrom,
)
from curvax.operators.curvature import ModelArguments
from curvax.sketches import matmul
from curvax.tree import PyTree


class WeightCurvature(abc.ABC):
    """H, the curvature of the data's negative log-likelihood at noise 1. An implementor is a pytree."""

    @abc.abstractmethod
    def whitened(self, scale: jax.Array, prior: Prior) -> Factored:
        """M = scale P^(-1/2) H P^(-1/2)."""

    def log_det(self, scale: jax.Array, prior: Prior) -> jax.Array:
        """log det (I + M), differentiable in both."""
        return self.whitened(scale, prior).summed(jnp.log1p)

    def groups(self, leaves: int) -> tuple[int, ...]:
        """Which of so many leaves have one precision: the number of a group for each."""
        return tuple(range(leaves))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DiagonalCurvature(WeightCurvature):
    """diag(values)."""

    operator: DiagonalOperator

    def whitened(self, scale: jax.Array, prior: Prior) -> DiagonalOperator:
        return DiagonalOperator(tree.scale(scale, prior.scaled(tree.upcast(self.operator.values), -1.0)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerCurvature(WeightCurvature):
    """Kronecker blocks, and a diagonal elsewhere."""

    operator: KroneckerEigen

    def whitened(self, scale: jax.Array, prior: Prior) -> KroneckerEigen:
        operator, names = self.operator, tree.places(self.operator.like)
        blocks = operator.blocks
        precisions = [prior.shared(leaves, names) for leaves in self._leaves()]
        values = [scale.astype(v.dtype) / p.astype(v.dtype) * v
                  for v, p in zip(operator.values, precisions, strict=True)]  # fmt: skip
        rest = [
            (scale / prior.leaves[block.leaf]).astype(v.dtype) * v
            for v, block in zip(operator.diagonal, blocks.diagonal, strict=True)
        ]
        return dataclasses.replace(operator, values=values, diagonal=rest)

    def groups(self, leaves: int) -> tuple[int, ...]:
        group = list(range(leaves))
        for block in self._leaves():
            least = min(group[i] for i in block)
            joined = {group[i] for i in block}
            group = [least if g in joined else g for g in group]
        return tuple(group)

    def _leaves(self) -> list[tuple[int, ...]]:
        blocks = self.operator.blocks.kronecker
        return [(b.leaf,) if b.bias is None else (b.leaf, b.bias.leaf) for b in blocks]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpectralCurvature(WeightCurvature):
    """U diag(values) U^T, of all eigenvectors or of some."""

    operator: LowRankPlusIdentity

    def whitened(self, scale: jax.Array, prior: Prior) -> LowRankPlusIdentity:
        if prior.uniform:
            return dataclasses.replace(self.operator, values=scale / prior.leaves[0] * self.operator.values)
        w = self._columns(scale, prior)
        if w.shape[1] >= w.shape[0]:
            pairs = eigh(matmul(w, w.T))
            return dataclasses.replace(self.operator, basis=pairs.vectors, values=jnp.maximum(pairs.values, 0))
        # M = W W^T has the eigenvalues of W^T W = Q d Q^T, and the eigenvectors W Q d^(-1/2).
        pairs = eigh(matmul(w.T, w))
        least = w.shape[1] * jnp.finfo(w.dtype).eps * pairs.values[-1]
        kept = pairs.values > least
        values = jnp.where(kept, pairs.values, 0)
        basis = matmul(w, pairs.vectors) * jnp.where(kept, jax.lax.rsqrt(jnp.where(kept, pairs.values, 1)), 0)
        return dataclasses.replace(self.operator, basis=basis, values=values)

    def log_det(self, scale: jax.Array, prior: Prior) -> jax.Array:
        if prior.uniform:
            return super().log_det(scale, prior)
        w = self._columns(scale, prior)
        return log_det_definite(jnp.eye(w.shape[1], dtype=w.dtype) + matmul(w.T, w))

    def _columns(self, scale: jax.Array, prior: Prior) -> jax.Array:
        """W with M = W W^T."""
        operator = self.operator
        values = jnp.sqrt(scale * jnp.maximum(operator.values, 0))
        return operator.basis * values / jnp.sqrt(prior.flat())[:, None]


@jax.custom_jvp
def log_det_definite(matrix: jax.Array) -> jax.Array:
    """log det of a symmetric positive definite matrix."""
    return 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky(matrix).lower)))


@log_det_definite.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (matrix,), (change,) = primals, tangents
    return log_det_definite(matrix), jnp.sum(_inverse(matrix) * change)


@jax.custom_jvp
def _inverse(matrix: jax.Array) -> jax.Array:
    lower = cholesky(matrix).lower
    half = triangular_solve(lower, jnp.eye(len(matrix), dtype=matrix.dtype))
    return matmul(half.T, half)


@_inverse.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    inverse = _inverse(primals[0])
    return inverse, -matmul(inverse, matmul(tangents[0], inverse))


class Form(abc.ABC):
    """What of the curvature is measured. A form of your own returns one of the `WeightCurvature`s above."""

    @abc.abstractmethod
    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        """From a model, a loss that is summed, parameters and data."""


@dataclasses.dataclass(frozen=True)
class Full(Form):
    """All of it, n x n: n products and an eigendecomposition, for up to a few thousand parameters."""

    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        matrix = arguments.matrix().to_dense()
        pairs = eigh((matrix + matrix.T) / 2)
        return SpectralCurvature(low_rank(pairs.vectors, jnp.maximum(pairs.values, 0), _like(arguments)))


@dataclasses.dataclass(frozen=True)
class LowRank(Form):
    """The dominant part, by a randomized Nystrom approximation (`operators.nystrom`).

    Attributes:
      rank: number of eigenvectors, and of products.
      seed: of the random directions; 0 by default.
    """

    rank: int
    seed: int = 0

    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        return SpectralCurvature(nystrom(arguments.matrix(), self.rank, jax.random.key(self.seed)))


@dataclasses.dataclass(frozen=True)
class Diagonal(Form):
    """The exact diagonal (`operators.diagonal`): cheapest, and blind to correlations."""

    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        return DiagonalCurvature(diagonal(**_keywords(arguments)))


@dataclasses.dataclass(frozen=True)
class KFAC(Form):
    """A Kronecker product for each layer (`operators.kfac`): the usual choice for networks."""

    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        return KroneckerCurvature(kfac(**_keywords(arguments)))


@dataclasses.dataclass(frozen=True)
class EKFAC(Form):
    """Kronecker eigenvectors with the true diagonal along them (`operators.ekfac`); it walks the data twice."""

    def measure(self, arguments: ModelArguments) -> WeightCurvature:
        return KroneckerCurvature(ekfac(**_keywords(arguments)))


def _keywords(arguments: ModelArguments) -> dict[str, PyTree]:
    return {field.name: getattr(arguments, field.name) for field in dataclasses.fields(ModelArguments)}


def _like(arguments: ModelArguments) -> PyTree:
    return arguments.matrix().domain
