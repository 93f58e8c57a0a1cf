"""A solver whose system lives in row space, batch times outputs, instead of parameter space."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from curvax import tree
from curvax.solvers.base import Lane, Solution, Solver, System
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class RowSpace(Solver):
    """Solves the damped Gauss-Newton system through its rows; the row lane does the translation.

    Attributes:
      solver: solves the row system: `Cholesky` (exact), `CG`, or an adapter.
      momentum: SPRING's mu: the previous direction s' enters as (C + lam I) s = g + lam mu s' (Goldshlager, Abrahamsen
        and Lin 2024). 0 is the plain damped system.
      max_bytes: bound on the memory of explicit rows.
    """

    solver: Solver
    momentum: float = 0.0
    max_bytes: int = DEFAULT_MAX_BYTES

    def __post_init__(self) -> None:
        if self.solver.lane is not Lane.PARAMETER:
            raise ValueError(f"RowSpace takes a solver of a plain linear system, not {self.solver.name}.")

    @property
    def name(self) -> str:
        spring = f", momentum {self.momentum:g}" if self.momentum else ""
        return f"row-space {self.solver.name}{spring}"

    @property
    def lane(self) -> Lane:
        return Lane.ROW

    @property
    def tolerance(self) -> float:
        # Of the row system; in parameter space, where the residual is taken, the rounding of two more products adds up.
        return max(self.solver.tolerance, 1e-2)

    @property
    def products(self) -> int:
        return self.solver.products

    @property
    def keeps_direction(self) -> bool:
        """Whether the previous direction is state: for momentum, or as the source of a warm start.

        A row vector belongs to its batch and means nothing for the next; the direction lives in parameter space and
        keeps its shape.
        """
        return self.momentum != 0 or bool(jax.tree.leaves(self.solver.init(jax.ShapeDtypeStruct((1,), "float32"))))

    def init(self, like: PyTree) -> PyTree:
        return tree.zeros_like(like) if self.keeps_direction else ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        """Solves a row system that the row lane has set up; the lane owns the state."""
        return self.solver.solve(system, rhs, state, lam)
