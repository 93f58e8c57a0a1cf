"""Bounds on the update itself, after the learning rate: an update beyond the bound is shortened to it.

    direction s --transform--> update u = -lr s --bound--> min(1, bound / size(u)) u

A bound on the direction (`clip_norm`, `clip_value`) leaves the length of a step to the learning rate; one on the update
holds at whatever rate. An example: u = (3, 4) under `NormBound(1)` becomes (0.6, 0.8), under `EntryBound(1)` (1, 1).
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.numbers import Number, check_positive, shown
from curvax.requirements import EVERY_STEP, Part, Requirement
from curvax.tree import PyTree


class StepBound(abc.ABC):
    """A bound on the update of a step.

    An implementor is a frozen dataclass. It must say `name` and write `apply`, a pure function.

    Attributes:
      needs_product: whether `apply` calls `bend`, one curvature product in every step.
    """

    needs_product: bool = False

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for."""
        return (Requirement(Part.BOUND, EVERY_STEP, self.name),)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The bound's name in the plan."""

    @abc.abstractmethod
    def apply(self, update: PyTree, bend: Callable[[], jax.Array]) -> PyTree:
        """The update within the bound.

        Args:
          update: u, what is to be added to the parameters, upcast.
          bend: () -> u.Cu with the undamped curvature C of the step; only for bounds with `needs_product`.
        """


@dataclasses.dataclass(frozen=True)
class NormBound(StepBound):
    """|u| <= norm: SPRING's min(1, sqrt(C) / |lr d|) with norm = sqrt(C) (Goldshlager, Abrahamsen and Lin 2024).

    Attributes:
      norm: largest Euclidean norm of an update, in units of the parameters; may be traced.
    """

    norm: Number

    def __post_init__(self) -> None:
        check_positive("norm", self.norm)

    @property
    def name(self) -> str:
        return f"norm of the update at most {shown(self.norm)}"

    def apply(self, update: PyTree, bend: Callable[[], jax.Array]) -> PyTree:
        del bend
        return _shortened(update, tree.norm(update), self.norm)


@dataclasses.dataclass(frozen=True)
class CurvatureBound(StepBound):
    """u.Cu <= squared: the norm constraint of FermiNet and kfac-jax, lr^2 d.Fd <= c (Ba, Grosse and Martens 2017).

    Here F is the method's own curvature C on the step's batch, by one product. kfac-jax takes d.g in place of d.Fd,
    which is the same where d solves the undamped system, and costs no product.

    Attributes:
      squared: largest u.Cu, c, in units of the loss; FermiNet has 1e-3. May be traced.
    """

    squared: Number
    needs_product = True

    def __post_init__(self) -> None:
        check_positive("squared", self.squared)

    @property
    def name(self) -> str:
        return f"curvature norm of the update, u.Cu at most {shown(self.squared)}"

    def apply(self, update: PyTree, bend: Callable[[], jax.Array]) -> PyTree:
        size = jnp.abs(bend())
        return _shortened(update, jnp.sqrt(size), jnp.sqrt(jnp.asarray(self.squared, size.dtype)))


@dataclasses.dataclass(frozen=True)
class EntryBound(StepBound):
    """|u_i| <= entry: no parameter moves further than that in one step.

    It turns the update where the others shorten it, as clipping does.

    Attributes:
      entry: largest magnitude of an entry of an update, in units of the parameters; may be traced.
    """

    entry: Number

    def __post_init__(self) -> None:
        check_positive("entry", self.entry)

    @property
    def name(self) -> str:
        return f"entries of the update at most {shown(self.entry)}"

    def apply(self, update: PyTree, bend: Callable[[], jax.Array]) -> PyTree:
        del bend
        bounds = jax.tree.map(lambda u: jnp.asarray(self.entry, u.dtype), update)
        return jax.tree.map(lambda u, b: jnp.clip(u, -b, b), update, bounds)


def _shortened(update: PyTree, size: jax.Array, bound: Number) -> PyTree:
    """`update`, of that size, times min(1, bound / size)."""
    bound = jnp.asarray(bound, size.dtype)
    beyond = size > bound
    return tree.scale(
        jnp.where(beyond, bound / jnp.where(beyond, size, jnp.ones_like(size)), 1).astype(size.dtype), update
    )
