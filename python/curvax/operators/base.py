"""What a linear operator is: something that multiplies vectors, knows their shapes, and makes other operators.

A vector is a tree of arrays like the parameters, one flat array of all of them (`curvax.tree.ravel`), or a matrix with
a flat vector in each column. An operator C of 3 parameters:

    C @ {"w": (2,), "b": ()}   ->  {"w": (2,), "b": ()}
    C @ (3,)                   ->  (3,)
    C @ (3, k)                 ->  (3, k)     k products in one batched pass

Operators are pytrees: they go through `jax.jit`, `jax.vmap` and `jax.lax.scan` as arguments like arrays. Sums,
products, multiples, shifts and restrictions of operators are operators.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.sketches import columns_product
from curvax.tree import PyTree

MAX_DENSE = 2**26
"""Entries of the largest matrix that `to_dense` makes unless more are allowed: 256 MiB in float32."""


class LinearOperator(abc.ABC):
    """A linear map from trees like `domain` to trees like `codomain`.

    An implementor is a frozen dataclass that is registered as a pytree. It must say both shapes, make a function that
    multiplies one tree (`linearized`), and know its transpose. Products are compiled once for equal shapes.
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
    def linearized(self) -> Callable[[PyTree], PyTree]:
        """v -> the product with one tree like `domain`, with whatever products have in common done now."""

    @abc.abstractmethod
    def transpose(self) -> LinearOperator:
        """The transpose."""

    def apply(self, v: PyTree) -> PyTree:
        """The product with one tree like `domain`."""
        return _product(self, v)

    def flat(self, v: jax.Array) -> jax.Array:
        """The product with one flat vector, (n,) -> (rows,)."""
        return _flat_product(self, v)

    def columns(self, matrix: jax.Array) -> jax.Array:
        """The products with the columns of a matrix, (n, k) -> (rows, k), as one batched product."""
        return _columns(self, matrix)

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
            return Product(self, v)
        domain = self.domain
        if _fits(domain, v):
            return self.apply(jax.tree.map(lambda x, like: jnp.asarray(x, like.dtype), v, domain))
        if isinstance(v, jax.Array | np.ndarray) and v.ndim in (1, 2) and v.shape[0] == self.shape[1]:
            flat = jnp.asarray(v).astype(self.dtype)
            return self.columns(flat) if flat.ndim == 2 else self.flat(flat)
        raise ValueError(
            f"an operator of shape {self.shape} multiplies trees like its domain, vectors ({self.shape[1]},) and "
            f"matrices ({self.shape[1]}, k), and got {_described(v)}."
        )

    def __add__(self, other: LinearOperator) -> LinearOperator:
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: LinearOperator) -> LinearOperator:
        return self + (-1.0) * other if isinstance(other, LinearOperator) else NotImplemented

    def __mul__(self, factor: float | jax.Array) -> LinearOperator:
        return Scaled(self, jnp.asarray(factor, self.dtype)) if np.ndim(factor) == 0 else NotImplemented

    __rmul__ = __mul__

    def __neg__(self) -> LinearOperator:
        return self * -1.0

    def shift(self, lam: float | jax.Array) -> LinearOperator:
        """C + lam I."""
        return Shifted(self, jnp.asarray(lam, self.dtype))

    def restrict(self, kept: PyTree) -> LinearOperator:
        """The rows and columns of some leaves of the domain: a principal submatrix.

        Args:
          kept: a tree of booleans like the domain, or a prefix of it; True keeps a leaf. The restricted operator's
            vectors are trees with `None` in the place of the others.
        """
        return Restricted.of(self, kept)

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


@jax.jit
def _product(operator: LinearOperator, v: PyTree) -> PyTree:
    return operator.linearized()(v)


@jax.jit
def _flat_product(operator: LinearOperator, v: jax.Array) -> jax.Array:
    _, unravel = tree.ravel(tree.zeros_like(operator.domain))
    return tree.ravel(operator.linearized()(unravel(v)))[0]


@jax.jit
def _columns(operator: LinearOperator, matrix: jax.Array) -> jax.Array:
    return columns_product(operator.linearized(), operator.domain)(matrix)


class SymmetricOperator(LinearOperator):
    """One that is its own transpose."""

    @property
    def codomain(self) -> PyTree:
        return self.domain

    @property
    def is_symmetric(self) -> bool:
        return True

    def transpose(self) -> LinearOperator:
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sum(LinearOperator):
    """A + B, of equal shapes."""

    first: LinearOperator
    second: LinearOperator

    def __post_init__(self) -> None:
        # As a pytree it also holds tracers, and whatever a transformation puts in their place.
        both = (self.first, self.second)
        if all(isinstance(x, LinearOperator) for x in both) and self.first.shape != self.second.shape:
            raise ValueError(f"operators of shapes {self.first.shape} and {self.second.shape} do not add up.")

    @property
    def domain(self) -> PyTree:
        return self.first.domain

    @property
    def codomain(self) -> PyTree:
        return self.first.codomain

    @property
    def is_symmetric(self) -> bool:
        return self.first.is_symmetric and self.second.is_symmetric

    @property
    def is_positive(self) -> bool:
        return self.first.is_positive and self.second.is_positive

    def linearized(self) -> Callable[[PyTree], PyTree]:
        first, second = self.first.linearized(), self.second.linearized()
        return lambda v: tree.add(first(v), second(v))

    def transpose(self) -> LinearOperator:
        return Sum(self.first.transpose(), self.second.transpose())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Product(LinearOperator):
    """A B: first B, then A. Whether that is symmetric nobody looks at."""

    first: LinearOperator
    second: LinearOperator

    def __post_init__(self) -> None:
        both = (self.first, self.second)
        if all(isinstance(x, LinearOperator) for x in both) and self.first.shape[1] != self.second.shape[0]:
            raise ValueError(f"operators of shapes {self.first.shape} and {self.second.shape} do not multiply.")

    @property
    def domain(self) -> PyTree:
        return self.second.domain

    @property
    def codomain(self) -> PyTree:
        return self.first.codomain

    def linearized(self) -> Callable[[PyTree], PyTree]:
        first, second = self.first.linearized(), self.second.linearized()
        return lambda v: first(second(v))

    def transpose(self) -> LinearOperator:
        return Product(self.second.transpose(), self.first.transpose())


@dataclasses.dataclass(frozen=True)
class _Combined(LinearOperator):
    """An operator and a multiple of the identity or of itself: of its shapes, and symmetric where it is."""

    operator: LinearOperator

    @property
    def domain(self) -> PyTree:
        return self.operator.domain

    @property
    def codomain(self) -> PyTree:
        return self.operator.codomain

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    def transpose(self) -> LinearOperator:
        return dataclasses.replace(self, operator=self.operator.transpose())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(_Combined):
    """factor A. Its sign may be traced, so that it says of no multiple that it is positive."""

    factor: jax.Array

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: tree.scale(self.factor, product(v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shifted(_Combined):
    """A + lam I, of a square A. It is positive where A is and lam is not negative, which is the caller's to see to."""

    lam: jax.Array

    @property
    def is_positive(self) -> bool:
        return self.operator.is_positive

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: tree.axpy(self.lam, v, product(v))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Restricted(SymmetricOperator):
    """The rows and columns of some leaves of a symmetric operator's domain.

    Attributes:
      operator: the operator.
      kept: for each leaf of its domain, whether it stays; static.
    """

    operator: LinearOperator
    kept: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(operator: LinearOperator, kept: PyTree) -> Restricted:
        """From a tree of booleans, or a prefix of one."""
        if not operator.is_symmetric:
            raise ValueError("only a symmetric operator is restricted to leaves: restrict the parameters instead.")
        try:
            full = jax.tree.map(lambda keep, part: jax.tree.map(lambda _: bool(keep), part), kept, operator.domain)
        except ValueError as error:
            raise ValueError("`kept` must be a tree of booleans like the operator's domain, or a prefix.") from error
        flags = tuple(jax.tree.leaves(full))
        if not any(flags):
            raise ValueError("`kept` keeps no leaf: an operator needs one at least.")
        return Restricted(operator, flags)

    @property
    def domain(self) -> PyTree:
        return self._kept(self.operator.domain)

    @property
    def is_positive(self) -> bool:
        return self.operator.is_positive

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: self._kept(product(self._filled(v)))

    def _kept(self, v: PyTree) -> PyTree:
        leaves, structure = jax.tree.flatten(v)
        return jax.tree.unflatten(structure, [x if k else None for x, k in zip(leaves, self.kept, strict=True)])

    def _filled(self, v: PyTree) -> PyTree:
        shapes, structure = jax.tree.flatten(self.operator.domain)
        parts = iter(jax.tree.leaves(v))
        # What is left out of the vector is zero there.
        leaves = [next(parts) if k else jnp.zeros(x.shape, x.dtype) for x, k in zip(shapes, self.kept, strict=True)]
        return jax.tree.unflatten(structure, leaves)


def check_square(operator: Any, what: str) -> LinearOperator:
    """The operator, if it is one that is symmetric; `what` asks for it.

    Raises:
      TypeError, ValueError: it is none, or not symmetric.
    """
    if not isinstance(operator, LinearOperator):
        raise TypeError(f"{what} takes an operator of curvax.operators, got a {type(operator).__name__}.")
    if not operator.is_symmetric:
        raise ValueError(f"{what} takes a symmetric operator, and this one is not known to be one.")
    return operator


def _fits(domain: PyTree, v: Any) -> bool:
    if jax.tree.structure(domain) != jax.tree.structure(v):
        return False
    return all(np.shape(x) == like.shape for x, like in zip(jax.tree.leaves(v), jax.tree.leaves(domain), strict=True))


def _described(v: Any) -> str:
    if isinstance(v, jax.Array | np.ndarray):
        return f"an array of shape {v.shape}"
    return f"a tree of shapes {[np.shape(x) for x in jax.tree.leaves(v)]}"
