"""What a linear operator is: something that multiplies vectors, knows their shapes, and makes other operators.

A vector is a tree of arrays like the parameters, one flat array of all of them (`curvax.tree.ravel`), or a matrix with
a flat vector in each column. An operator C of 3 parameters:

    C @ {"w": (2,), "b": ()}   ->  {"w": (2,), "b": ()}
    C @ (3,)                   ->  (3,)
    C @ (3, k)                 ->  (3, k)     k products in one batched pass

Operators are pytrees: they go through `jax.jit`, `jax.vmap` and `jax.lax.scan` as arguments like arrays. Methods that
make another operator import its file when they are called, as it imports this one.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.sketches import columns_product
from curvax.solvers import Solver
from curvax.tree import PyTree

if TYPE_CHECKING:
    from curvax.operators.inverse import Inverse

MAX_DENSE = 2**26
"""Entries of the largest matrix that `to_dense` makes unless more are allowed: 256 MiB in float32."""


class LinearOperator(abc.ABC):
    """A linear map from trees like `domain` to trees like `codomain`.

    An implementor is a frozen dataclass that is registered as a pytree. It must say both shapes, multiply one tree
    (`apply`) and know its transpose; `linearized` is for those whose products share work.
    """

    @property
    @abc.abstractmethod
    def domain(self) -> PyTree:
        """`jax.ShapeDtypeStruct`s of what it multiplies, in the dtypes in which it computes."""

    @property
    @abc.abstractmethod
    def codomain(self) -> PyTree:
        """Likewise of what comes out."""

    @property
    def is_symmetric(self) -> bool:
        """Whether it is its own transpose; no by default."""
        return False

    @property
    def is_positive(self) -> bool:
        """Whether it is symmetric and positive semidefinite by construction; no by default."""
        return False

    @abc.abstractmethod
    def apply(self, v: PyTree) -> PyTree:
        """The product with one tree like `domain`."""

    @abc.abstractmethod
    def transpose(self) -> LinearOperator:
        """The transpose."""

    def linearized(self) -> Callable[[PyTree], PyTree]:
        """`apply`, with whatever all products have in common done now: what a loop of products should call."""
        return self.apply

    def columns(self, matrix: jax.Array) -> jax.Array:
        """The products with the columns of a matrix, (n, k) -> (rows, k), as one batched product."""
        return columns_product(self.linearized(), self.domain)(matrix)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return tree.size(self.codomain), tree.size(self.domain)

    @property
    def dtype(self) -> np.dtype:
        """Of flat vectors: the widest one of the leaves, at least float32."""
        return tree.scalar_dtype(self.domain)

    @property
    def T(self) -> LinearOperator:
        """The transpose."""
        return self.transpose()

    def __matmul__(self, v: Any) -> Any:
        """The product with a tree, a flat vector (n,), the columns of a matrix (n, k), or another operator."""
        if isinstance(v, LinearOperator):
            from curvax.operators.algebra import Product

            return Product(self, v)
        if _fits(self.domain, v):
            return self.apply(jax.tree.map(lambda x, like: jnp.asarray(x).astype(like.dtype), v, self.domain))
        if isinstance(v, jax.Array | np.ndarray) and v.ndim in (1, 2) and v.shape[0] == self.shape[1]:
            flat = jnp.asarray(v).astype(self.dtype)
            if flat.ndim == 2:
                return self.columns(flat)
            _, unravel = tree.ravel(tree.zeros_like(self.domain))
            return tree.ravel(self.apply(unravel(flat)))[0]
        raise ValueError(
            f"an operator of shape {self.shape} multiplies trees like its domain, vectors ({self.shape[1]},) and "
            f"matrices ({self.shape[1]}, k), and got {_described(v)}."
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        from curvax.operators.algebra import Sum

        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | jax.Array) -> LinearOperator:
        from curvax.operators.algebra import Scaled

        return Scaled(self, jnp.asarray(factor, self.dtype)) if np.ndim(factor) == 0 else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shift(self, lam: float | jax.Array) -> LinearOperator:
        """C + lam I."""
        from curvax.operators.algebra import Shifted

        return Shifted(self, jnp.asarray(lam, self.dtype))

    def restrict(self, kept: PyTree) -> LinearOperator:
        """The rows and columns of some leaves of the domain: a principal submatrix.

        Args:
          kept: a tree of booleans like the domain, or a prefix of it; True keeps a leaf. The restricted operator's
            vectors are trees with `None` in the place of the others.
        """
        from curvax.operators.algebra import Restricted

        return Restricted.of(self, kept)

    def inverse(self, lam: float | jax.Array = 0.0, *, solver: Solver | None = None) -> Inverse:
        """(C + lam I)^-1; see `operators.inverse`."""
        from curvax.operators.inverse import solved_inverse

        return solved_inverse(self, lam, solver)

    def as_scipy(self) -> Any:
        """A `scipy.sparse.linalg.LinearOperator`; see `operators.as_scipy`."""
        from curvax.operators.convert import as_scipy

        return as_scipy(self)

    def as_lineax(self) -> Any:
        """A `lineax.FunctionLinearOperator`; see `operators.as_lineax`."""
        from curvax.operators.convert import as_lineax

        return as_lineax(self)

    def to_dense(self, max_entries: int = MAX_DENSE) -> jax.Array:
        """The matrix (rows, columns), from one batched product with the identity.

        Raises:
          ValueError: it has more than `max_entries` entries.
        """
        rows, columns = self.shape
        if rows * columns > max_entries:
            raise ValueError(
                f"a dense matrix of this operator has {rows} x {columns} entries, more than max_entries={max_entries}: "
                "restrict the operator to some leaves, or allow more."
            )
        return self @ jnp.eye(columns, dtype=self.dtype)


def _fits(domain: PyTree, v: Any) -> bool:
    if jax.tree.structure(domain) != jax.tree.structure(v):
        return False
    return all(np.shape(x) == like.shape for x, like in zip(jax.tree.leaves(v), jax.tree.leaves(domain), strict=True))


def _described(v: Any) -> str:
    if isinstance(v, jax.Array | np.ndarray):
        return f"an array of shape {v.shape}"
    return f"a tree of shapes {[np.shape(x) for x in jax.tree.leaves(v)]}"
