"""Operators made of operators: sums, multiples, shifts, restrictions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax import tree
from curvax.operators.base import LinearOperator
from curvax.tree import PyTree


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

    def apply(self, v: PyTree) -> PyTree:
        return tree.add(self.first.apply(v), self.second.apply(v))

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

    def apply(self, v: PyTree) -> PyTree:
        return self.first.apply(self.second.apply(v))

    def linearized(self) -> Callable[[PyTree], PyTree]:
        first, second = self.first.linearized(), self.second.linearized()
        return lambda v: first(second(v))

    def transpose(self) -> LinearOperator:
        return Product(self.second.transpose(), self.first.transpose())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scaled(LinearOperator):
    """factor A. Its sign may be traced, so that it says of no multiple that it is positive."""

    operator: LinearOperator
    factor: jax.Array

    @property
    def domain(self) -> PyTree:
        return self.operator.domain

    @property
    def codomain(self) -> PyTree:
        return self.operator.codomain

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    def apply(self, v: PyTree) -> PyTree:
        return tree.scale(self.factor, self.operator.apply(v))

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: tree.scale(self.factor, product(v))

    def transpose(self) -> LinearOperator:
        return Scaled(self.operator.transpose(), self.factor)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shifted(LinearOperator):
    """A + lam I, of a square A. It is positive where A is and lam is not negative, which is the caller's to see to."""

    operator: LinearOperator
    lam: jax.Array

    @property
    def domain(self) -> PyTree:
        return self.operator.domain

    @property
    def codomain(self) -> PyTree:
        return self.operator.codomain

    @property
    def is_symmetric(self) -> bool:
        return self.operator.is_symmetric

    @property
    def is_positive(self) -> bool:
        return self.operator.is_positive

    def apply(self, v: PyTree) -> PyTree:
        return tree.axpy(self.lam, v, self.operator.apply(v))

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: tree.axpy(self.lam, v, product(v))

    def transpose(self) -> LinearOperator:
        return Shifted(self.operator.transpose(), self.lam)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Restricted(LinearOperator):
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
    def codomain(self) -> PyTree:
        return self.domain

    @property
    def is_symmetric(self) -> bool:
        return True

    @property
    def is_positive(self) -> bool:
        return self.operator.is_positive

    def apply(self, v: PyTree) -> PyTree:
        return self._kept(self.operator.apply(self._filled(v)))

    def linearized(self) -> Callable[[PyTree], PyTree]:
        product = self.operator.linearized()
        return lambda v: self._kept(product(self._filled(v)))

    def transpose(self) -> LinearOperator:
        return self

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


def finite_float(name: str, value: float | jax.Array) -> None:
    """Raises for a known number that is negative or not finite."""
    if isinstance(value, int | float | np.floating) and not (0 <= float(value) < float("inf")):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value}.")
