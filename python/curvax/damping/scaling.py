"""What damping is measured by: lam I, or lam D with a diagonal D that follows the curvature.

With D the damped system is one with the identity again, in coordinates y = D^(1/2) s:

    (C + lam D) s = g        <=>        (D^-1/2 C D^-1/2 + lam I) y = D^-1/2 g,  s = D^-1/2 y

so that every solver of the one solves the other. An example: in units in which the curvature is C = diag(1, 1e6) and
g = (1, 1e3), lam = 1 with D = I gives s = (0.5, 1e-3), half of the first step and all of the second; with D = C it
gives half of both, as in any other units.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Linearization
from curvax.numbers import whole
from curvax.requirements import Cadence, Part, Requirement
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree


class Scaling(abc.ABC):
    """The diagonal D of the damped system (C + lam D) s = g.

    An implementor is a frozen dataclass with a state of fixed shapes. `refresh` reads the rows of a Gauss-Newton
    matrix.

    Attributes:
      every: steps from one refresh to the next.
    """

    every: int

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """Its name in the plan."""

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for: a refresh every `every` steps."""
        return (Requirement(Part.SCALING, Cadence((self.every,)), f"damping: {self.name}"),)

    @abc.abstractmethod
    def init(self, like: PyTree) -> Any:
        """The state before the first refresh, for upcast parameter shapes."""

    @abc.abstractmethod
    def refresh(self, state: Any, linearization: Linearization) -> Any:
        """The state after a look at the curvature; a look that is not finite changes nothing."""

    @abc.abstractmethod
    def root(self, state: Any) -> PyTree:
        """D^(1/2), positive and finite, an upcast tree like the parameters."""


@dataclasses.dataclass(frozen=True)
class Marquardt(Scaling):
    """D = the largest diag(C) so far, entry by entry: lam is a share of the curvature, whatever the units are.

    Marquardt (1963); the running maximum is that of MINPACK (Moré 1978): an entry whose curvature fades would otherwise
    lose its damping and run away (Osborne's and the penalty functions do). Entries that have seen no curvature have the
    largest of all, and no gradient. It costs one more parameter vector, and the exact diagonal of a Gauss-Newton matrix
    every `every` steps, about a product with it.

    Attributes:
      every: steps from one look at the diagonal to the next; 1.
      power: D = diag(C)^power; 1. The root of the diagonal, 1/2, lies between Marquardt's damping and lam I.
      max_bytes: bound on the memory of the diagonal's factors; 2 GiB.
    """

    every: int = 1
    power: float = 1.0
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        whole("every", self.every)
        if self.every < 1:
            raise ValueError(f"every must be at least 1, not {self.every}.")
        if not 0 < self.power <= 1:
            raise ValueError(f"power must be above 0 and at most 1, not {self.power}.")

    @property
    def name(self) -> str:
        power = "" if self.power == 1 else f"^{self.power:g}"
        return f"scaled by the largest diag(C){power} so far"

    def init(self, like: PyTree) -> PyTree:
        return tree.zeros_like(like)

    def refresh(self, state: PyTree, linearization: Linearization) -> PyTree:
        if linearization.rows is None:
            raise AssertionError("a scaled step linearizes with rows.")
        diagonal = linearization.rows.diagonal(self.max_bytes)

        def larger(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(jnp.isfinite(new), jnp.maximum(old, new.astype(old.dtype)), old)

        return jax.tree.map(larger, state, diagonal)

    def root(self, state: PyTree) -> PyTree:
        most = tree.max_abs(state)
        # Before any curvature was seen D is the identity.
        default = jnp.where(most > 0, most, jnp.ones_like(most))

        def leaf(d: jax.Array) -> jax.Array:
            return jnp.where(d > 0, d, default.astype(d.dtype)) ** jnp.asarray(self.power / 2, d.dtype)

        return jax.tree.map(leaf, state)
