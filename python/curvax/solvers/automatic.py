"""The choice between solvers, left to the planner."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from curvax.solvers.base import Lane, Solution, Solver, System
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Automatic(Solver):
    """Several solvers of one system; the planner picks one from the shapes of parameters and batch.

    The state holds every candidate's state, since it is made before a batch is seen.

    Attributes:
      candidates: the solvers to choose from.
    """

    candidates: tuple[Solver, ...] = dataclasses.field()

    def __post_init__(self) -> None:
        if not self.candidates:
            raise ValueError("Automatic needs at least one candidate solver.")

    @property
    def name(self) -> str:
        return "automatic: " + " | ".join(c.name for c in self.candidates)

    @property
    def lane(self) -> Lane:
        return self.candidates[0].lane

    @property
    def products(self) -> int:
        return max(c.products for c in self.candidates)

    def init(self, like: PyTree) -> tuple[Any, ...]:
        return tuple(c.init(like) for c in self.candidates)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        raise ValueError("the planner chooses a candidate before the system is solved: plan the method for a batch.")
