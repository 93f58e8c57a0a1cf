"""Gauss-Newton matrices in factored form, from data: K-FAC, EKFAC, the exact diagonal, low rank.

Sums over the examples of several batches are the batches' sums by their shares, so that factors of a data set in pieces
are those of the data set in one piece, to rounding.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Curvature, Evaluation, FisherType, GaussNewton, Linearization, Needs
from curvax.eigenbases import eigenbasis
from curvax.estimators import RandomizedNystrom
from curvax.keywords import spread
from curvax.operators.base import LinearOperator
from curvax.operators.curvature import At, CurvatureOperator, ModelArguments, StreamedCurvature
from curvax.operators.factored import Diagonal, KroneckerEigen, LowRankPlusIdentity, low_rank
from curvax.preconditioners._blocks import measured
from curvax.preconditioners.factor_inverses import eigen
from curvax.preconditioners.kfac import MAX_WIDTH
from curvax.structure.blocks import KroneckerBlocks
from curvax.structure.kronecker import FactorSums, WeightSharing, projected_squares
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree

Bases = list[tuple[jax.Array | None, jax.Array]]


@spread(ModelArguments)
def kfac(arguments: ModelArguments) -> KroneckerEigen:
    """One Kronecker product per layer for the Gauss-Newton matrix (Martens and Grosse 2015), a diagonal elsewhere."""
    matrix = arguments.matrix()
    source = _Source.of(matrix, arguments.fisher)
    sums = _total(matrix, source, _Source.factor_sums)
    bases, values = _decomposed(sums)
    return source.operator(matrix, bases, values, sums.diagonal)


@spread(ModelArguments)
def ekfac(arguments: ModelArguments) -> KroneckerEigen:
    """K-FAC's eigenvectors, and along them the true diagonal of the Gauss-Newton matrix (George et al. 2018).

    Of all matrices with these eigenvectors it is the closest one in Frobenius norm. It walks the data twice.
    """
    matrix = arguments.matrix()
    source = _Source.of(matrix, arguments.fisher)
    sums = _total(matrix, source, _Source.factor_sums)
    bases, _ = _decomposed(sums)
    values = _total(matrix, source, _Source.squares, bases)
    return source.operator(matrix, bases, values, sums.diagonal)


@dataclasses.dataclass(frozen=True)
class DiagonalArguments(ModelArguments):
    """The same, and a bound.

    Attributes:
      max_bytes: bound on the memory of factors and formed rows, 2 GiB by default.
    """

    _: dataclasses.KW_ONLY
    max_bytes: int = DEFAULT_MAX_BYTES


@spread(DiagonalArguments)
def diagonal(arguments: DiagonalArguments) -> Diagonal:
    """The exact diagonal of the Gauss-Newton matrix, from the model's layers and without its rows."""
    matrix = arguments.matrix()
    return Diagonal(_total(matrix, _RowSquares(matrix.curvature, arguments.max_bytes), _RowSquares.of_batch))


def nystrom(operator: LinearOperator, rank: int, key: jax.Array) -> LowRankPlusIdentity:
    """A positive semidefinite operator's dominant part, from `rank` products with random vectors.

    See Frangella, Tropp and Udell, "Randomized Nystrom Preconditioning" (2023).

    Args:
      operator: symmetric and positive semidefinite; of an indefinite one the non-negative part, at twice the products.
      rank: columns; a few more than the number of eigenvalues one is after.
      key: random key.
    """
    estimator = RandomizedNystrom(rank, indefinite=not operator.is_positive)
    pairs = estimator.low_rank(operator.linearized(), operator.domain, key)
    return low_rank(pairs.basis, pairs.values, operator.domain)


@jax.jit
def _decomposed(sums: FactorSums) -> tuple[Bases, list[jax.Array]]:
    """Eigenvectors of both factors of each block, and the products of their eigenvalues."""
    pairs = eigen(*sums.factors(), eigenbasis)
    values = [
        jnp.maximum(e.input_values, 0)[..., :, None] * jnp.maximum(e.output_values, 0)[..., None, :] for e in pairs
    ]
    return [(e.input_vectors, e.output_vectors) for e in pairs], values


def _total(
    matrix: CurvatureOperator | StreamedCurvature,
    source: _Source | _RowSquares,
    measure: Callable[..., PyTree],
    beside: PyTree = None,
) -> PyTree:
    """The sum over batches of `measure(source, params, evaluation, beside)` by their shares.

    One program serves all batches of equal shapes, and later calls with an equal source.
    """
    total = None
    for index, (batch, share) in enumerate(zip(matrix.batches, matrix.shares, strict=True)):
        term = _scaled(source, measure, matrix.at, batch, jnp.asarray(index, jnp.int32), (share, beside))
        total = term if total is None else tree.add(total, term)
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scaled(
    source: _Source | _RowSquares,
    measure: Callable[..., PyTree],
    at: At,
    batch: Any,
    index: jax.Array,
    by: tuple[jax.Array, PyTree],
) -> PyTree:
    share, beside = by
    term = measure(source, at.params, at.evaluation(batch, index), beside)
    return jax.tree.map(lambda x: share.astype(x.dtype) * x, term)


@dataclasses.dataclass(frozen=True)
class _RowSquares:
    """Where the diagonal is measured; it can be hashed, as programs are known by it."""

    curvature: Curvature
    max_bytes: int

    def of_batch(self, params: PyTree, evaluation: Evaluation, _: None) -> PyTree:
        rows = self.curvature.linearize(params, evaluation, Needs(rows=True)).rows
        assert rows is not None
        return rows.diagonal(self.max_bytes)


@dataclasses.dataclass(frozen=True)
class _Source:
    """What factors are measured of; it can be hashed likewise."""

    curvature: GaussNewton
    blocks: KroneckerBlocks
    fisher: FisherType

    @staticmethod
    def of(matrix: CurvatureOperator | StreamedCurvature, fisher: FisherType) -> _Source:
        curvature = matrix.curvature
        assert isinstance(curvature, GaussNewton)
        evaluation = curvature.prepare(matrix.at.params, matrix.at.evaluation(next(iter(matrix.batches)), 0))
        return _Source(curvature, curvature.blocks(matrix.at.params, evaluation).narrowed(MAX_WIDTH), fisher)

    def factor_sums(self, params: PyTree, evaluation: Evaluation, _: None) -> FactorSums:
        return measured(self.blocks, *self._seen(params, evaluation), WeightSharing.EXPAND)[0]

    def squares(self, params: PyTree, evaluation: Evaluation, bases: Bases) -> list[jax.Array]:
        _, total = measured(self.blocks, *self._seen(params, evaluation), WeightSharing.EXPAND)
        return total(lambda examples: projected_squares(self.blocks, examples, bases))

    def _seen(self, params: PyTree, evaluation: Evaluation) -> tuple[Linearization, FisherType, jax.Array]:
        linearization = self.curvature.linearize(params, evaluation, Needs(factors=True))
        key = jax.random.key(0) if evaluation.sample_key is None else evaluation.sample_key
        return linearization, self.fisher, key

    def operator(
        self,
        matrix: CurvatureOperator | StreamedCurvature,
        bases: Bases,
        values: list[jax.Array],
        rest: list[jax.Array],
    ) -> KroneckerEigen:
        zero = jnp.zeros((), self.blocks.dtype)
        return KroneckerEigen(bases, values, rest, zero, tree.zeros_like(matrix.domain), self.blocks)
