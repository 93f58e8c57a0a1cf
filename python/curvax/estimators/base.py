"""What an estimator is: of the diagonal, of the trace, of the dominant eigenspace."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax

from curvax.curvature import Linearization
from curvax.kernels._dispatch import Choice, Op, Request
from curvax.kernels.diagonal_update import DiagonalEstimate
from curvax.numbers import is_known, whole
from curvax.sketches import LowRank as LowRank
from curvax.tree import PyTree
from curvax.work import Cost, StepWork

Product: TypeAlias = Callable[[PyTree], PyTree]


class DiagonalEstimator(abc.ABC):
    """Estimates the diagonal of a symmetric curvature C, for a preconditioner that divides by it.

    An implementor is a frozen dataclass. It must say what `diagonal` reads of a linearization (`needs_product`,
    `needs_sampling`; `needs_rows` where it does) and write `diagonal`. The rest has defaults: `cost` counts a trace
    unless a formula is given, `kernels` and `with_kernels` are for those that call ops.
    """

    @property
    @abc.abstractmethod
    def needs_product(self) -> bool:
        """Whether `diagonal` calls `linearization.product`."""

    @property
    @abc.abstractmethod
    def needs_sampling(self) -> bool:
        """Whether `diagonal` calls `linearization.sampled_gradient`."""

    @property
    def needs_rows(self) -> bool:
        """Whether `diagonal` reads `linearization.rows`."""
        return False

    def cost(self, work: StepWork) -> Cost:
        """Predicted work of one estimate; by default that of the refresh which it serves, counted on its trace."""
        return work.refresh

    @abc.abstractmethod
    def diagonal(self, linearization: Linearization, key: jax.Array) -> PyTree:
        """An estimate of diag(C), with the structure, shapes and (upcast) dtypes of `linearization.params_like`."""

    def estimate(self, linearization: Linearization, key: jax.Array) -> DiagonalEstimate:
        """The same estimate as its factors, where they are cheaper to hand on than their product."""
        return DiagonalEstimate((self.diagonal(linearization, key),))

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The ops that an estimate calls for upcast parameters of these shapes, and what it asks of them."""
        del upcast
        return ()

    def with_kernels(self, choices: Mapping[str, Choice]) -> DiagonalEstimator:
        """The same estimator with the planner's choices for its ops, by name."""
        del choices
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TraceEstimate:
    """An estimated trace.

    Attributes:
      value: scalar estimate, in the widest dtype of the parameters and at least float32.
      standard_error: its estimated standard deviation, likewise; infinite where one sample leaves it unknown.
      products: number of curvature products spent; static.
    """

    value: jax.Array
    standard_error: jax.Array
    products: int = dataclasses.field(metadata={"static": True})


class TraceEstimator(abc.ABC):
    """Estimates the trace of a symmetric linear operator, unbiased.

    An implementor is a frozen dataclass with a `trace`, which says in its result how many products it took.
    """

    @abc.abstractmethod
    def trace(self, product: Product, like: PyTree, key: jax.Array) -> TraceEstimate:
        """Estimates the trace of `product`.

        Args:
          product: v -> C v on upcast trees shaped as `like`; it is vmapped.
          like: arrays or `jax.ShapeDtypeStruct`s.
          key: the only source of randomness.
        """


class LowRankEstimator(abc.ABC):
    """Approximates the dominant eigenspace of a symmetric linear operator.

    An implementor is a frozen dataclass with a `low_rank`.
    """

    @abc.abstractmethod
    def low_rank(self, product: Product, like: PyTree, key: jax.Array) -> LowRank:
        """A low-rank approximation of `product`; arguments as in `TraceEstimator.trace`."""


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raises for a setting that is not an integer of at least `least`."""
    if not is_known(value):
        whole(name, value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a Python integer, got {value!r}.")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")
