"""Operators whose eigenvalues are at hand: a diagonal, low rank and a multiple of the identity, Kronecker factors.

All are U diag(s) U^T + rest (I - U U^T) for some orthonormal U that is kept in a form of its own. A function of one is
the function of its eigenvalues, exactly and for the price of a product:

    (C + lam I)^-1          1 / (s + lam),         1 / (rest + lam)
    (C + lam I)^(-1/2)      (s + lam)^(-1/2),      ...                    to sample from N(0, (C + lam I)^-1)
    log det (C + lam I)     sum of log(s + lam) + (n - rank) log(rest + lam)
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.operators.base import SymmetricOperator
from curvax.preconditioners.factor_inverses import into_basis, out_of_basis
from curvax.sketches import matmul
from curvax.structure.blocks import KroneckerBlocks
from curvax.tree import PyTree

Function = Callable[[jax.Array], jax.Array]


class Factored(SymmetricOperator):
    """A symmetric operator with known eigenvalues. An implementor writes `multiply`, `mapped` and `summed`."""

    @abc.abstractmethod
    def multiply(self, v: PyTree) -> PyTree:
        """The product with one tree."""

    @abc.abstractmethod
    def mapped(self, function: Function) -> Self:
        """The operator with the same eigenvectors and `function` of each eigenvalue; it acts on arrays of them."""

    @abc.abstractmethod
    def summed(self, function: Function) -> jax.Array:
        """The sum of `function` over all eigenvalues."""

    def linearized(self) -> Callable[[PyTree], PyTree]:
        return self.multiply

    def shift(self, lam: float | jax.Array) -> Self:
        """C + lam I, factored likewise."""
        return self.mapped(lambda s: s + jnp.asarray(lam, s.dtype))

    def shifted_inverse(self, lam: float | jax.Array = 0.0) -> Self:
        """(C + lam I)^-1, factored too; infinite where an eigenvalue of C + lam I is zero."""
        return self.mapped(lambda s: 1 / (s + jnp.asarray(lam, s.dtype)))

    def inverse_root(self, lam: float | jax.Array) -> Self:
        """The symmetric (C + lam I)^(-1/2): of standard normal vectors it makes samples of N(0, (C + lam I)^-1)."""
        return self.mapped(lambda s: jax.lax.rsqrt(s + jnp.asarray(lam, s.dtype)))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Diagonal(Factored):
    """diag(values), the values a tree like the parameters."""

    values: PyTree

    @property
    def domain(self) -> PyTree:
        return tree.upcast_shapes(self.values)

    def multiply(self, v: PyTree) -> PyTree:
        return jax.tree.map(lambda d, x: d.astype(x.dtype) * x, self.values, v)

    def mapped(self, function: Function) -> Diagonal:
        return Diagonal(jax.tree.map(function, tree.upcast(self.values)))

    def summed(self, function: Function) -> jax.Array:
        dtype = self.dtype
        sums = [jnp.sum(function(x)).astype(dtype) for x in jax.tree.leaves(tree.upcast(self.values))]
        return sum(sums, start=jnp.zeros((), dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankPlusIdentity(Factored):
    """U diag(values) U^T + rest (I - U U^T).

    Attributes:
      basis: U, (n, rank), orthonormal columns on flat vectors.
      values: (rank,).
      rest: the eigenvalue of everything orthogonal to U, a scalar; zero of a matrix of low rank.
      like: zeros like a vector, for its shapes.
    """

    basis: jax.Array
    values: jax.Array
    rest: jax.Array
    like: PyTree

    @property
    def domain(self) -> PyTree:
        return tree.upcast_shapes(self.like)

    def multiply(self, v: PyTree) -> PyTree:
        flat, unravel = tree.ravel(v)
        inside = matmul(self.basis.T, flat)
        return unravel(self.rest * flat + matmul(self.basis, (self.values - self.rest) * inside))

    def mapped(self, function: Function) -> LowRankPlusIdentity:
        return dataclasses.replace(self, values=function(self.values), rest=function(self.rest))

    def summed(self, function: Function) -> jax.Array:
        n, rank = self.basis.shape
        # Nothing is left at full rank, whatever the function makes of a rest that is not there.
        others = (n - rank) * function(self.rest) if n > rank else jnp.zeros((), self.values.dtype)
        return jnp.sum(function(self.values)) + others


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KroneckerEigen(Factored):
    """A block (U kron V) diag(s) (U kron V)^T per layer, and a diagonal on the other leaves.

    Attributes:
      bases: per Kronecker block U, (G, n, n) or `None` for the identity, and V, (G, m, m).
      values: per Kronecker block s, (G, n, m).
      diagonal: per diagonal block its values, leaf-shaped.
      rest: the eigenvalue of entries that belong to no block, which no output depends on.
      like: zeros like a vector.
      blocks: which entries belong to which block; static.
    """

    bases: list[tuple[jax.Array | None, jax.Array]]
    values: list[jax.Array]
    diagonal: list[jax.Array]
    rest: jax.Array
    like: PyTree
    blocks: KroneckerBlocks = dataclasses.field(metadata={"static": True})

    @property
    def domain(self) -> PyTree:
        return tree.upcast_shapes(self.like)

    def multiply(self, v: PyTree) -> PyTree:
        def multiply(index: int, entries: jax.Array) -> jax.Array:
            u, w = self.bases[index]
            return out_of_basis(u, w, self.values[index] * into_basis(u, w, entries))

        return self.blocks.map_entries(
            v, multiply, lambda index, x: self.diagonal[index] * x, lambda x: self.rest.astype(x.dtype) * x
        )

    def mapped(self, function: Function) -> KroneckerEigen:
        values, diagonal = [function(s) for s in self.values], [function(d) for d in self.diagonal]
        return dataclasses.replace(self, values=values, diagonal=diagonal, rest=function(self.rest))

    def summed(self, function: Function) -> jax.Array:
        parts = [*self.values, *self.diagonal]
        idle = tree.size(self.domain) - sum(math.prod(x.shape) for x in parts)
        total = sum((jnp.sum(function(x)) for x in parts), start=jnp.zeros((), self.blocks.dtype))
        return total + idle * function(self.rest) if idle else total


def low_rank(basis: jax.Array, values: jax.Array, like: Any, rest: float | jax.Array = 0.0) -> LowRankPlusIdentity:
    """U diag(values) U^T + rest (I - U U^T) on trees like `like`: eigenpairs, a Nystrom approximation.

    Args:
      basis: (n, rank) with orthonormal columns, on flat vectors (`curvax.tree.ravel`).
      values: (rank,).
      like: a tree of arrays or shapes, n numbers.
      rest: the eigenvalue of everything else.

    Raises:
      ValueError: the shapes do not fit each other.
    """
    n = tree.size(like)
    if basis.ndim != 2 or basis.shape[0] != n or values.shape != basis.shape[1:]:
        raise ValueError(
            f"a basis {basis.shape} and values {values.shape} do not fit {n} parameters: pass ({n}, rank) and (rank,)."
        )
    dtype = tree.scalar_dtype(like)
    arrays = basis.astype(dtype), values.astype(dtype), jnp.asarray(rest, dtype)
    return LowRankPlusIdentity(*arrays, tree.zeros_like(like))
