"""What solvers by iteration have in common: two limits, and the code of one that goes on."""

from __future__ import annotations

import dataclasses

from curvax.solvers.base import Lane, Solver
from curvax.tree import PyTree

RUNNING = -1
"""In the place of a `Result` while nothing has ended the iteration."""


def check_limits(solver: Solver, **least: int) -> None:
    """Raises ValueError for a field below its least value; what is traced is not known yet."""
    for field, value in least.items():
        own = getattr(solver, field)
        if isinstance(own, int | float) and not own >= value:
            raise ValueError(f"{field} must be at least {value}, not {own}.")


@dataclasses.dataclass(frozen=True)
class KrylovSolver(Solver):
    """A solver in parameter space that ends at a relative residual or at a number of iterations, without a state.

    Attributes:
      tol: relative residual at which it ends.
      maxiter: most iterations, with a product each.
    """

    tol: float = 1e-5
    maxiter: int = 20

    def __post_init__(self) -> None:
        check_limits(self, maxiter=1, tol=0)

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def tolerance(self) -> float:
        return self.tol

    def init(self, like: PyTree) -> PyTree:
        return ()
