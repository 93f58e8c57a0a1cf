"""Any lineax solver as a curvax solver."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.solvers.base import (
    Lane,
    Result,
    Solution,
    Solver,
    System,
    UnitVector,
    audited,
    code,
    damped,
    relative_residual,
    solved,
)
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Lineax(Solver):
    """Passes the damped system to a `lineax.AbstractLinearSolver` as a symmetric operator.

    Attributes:
      solver: the lineax solver, for example `lineax.CG(rtol=1e-5, atol=0.0)`.
      positive_definite: tag the operator as positive semidefinite, which `lineax.CG` asks for. Set it to False for
        Hessians, with a solver that allows indefinite operators.

    Needs the `lineax` extra. A preconditioner of the system is passed on as lineax's "preconditioner" option. The
    right-hand side is scaled to unit norm first, so absolute tolerances of lineax are relative ones here. What lineax
    says is believed if the true residual bears it out.
    """

    solver: Any
    positive_definite: bool = True

    @property
    def name(self) -> str:
        return f"lineax {type(self.solver).__name__}"

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def tolerance(self) -> float:
        # Not every lineax solver iterates to a tolerance, and one may be traced.
        rtol = getattr(self.solver, "rtol", None)
        return float(rtol) if isinstance(rtol, int | float) else super().tolerance

    @property
    def products(self) -> int:
        return int(getattr(self.solver, "max_steps", None) or 0)

    def init(self, like: PyTree) -> tuple[()]:
        return ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        try:
            import lineax as lx
        except ImportError as error:
            raise ImportError("the Lineax adapter needs lineax: pip install 'curvax[lineax]'.") from error

        like = jax.eval_shape(lambda: rhs)
        tags = frozenset({lx.positive_semidefinite_tag if self.positive_definite else lx.symmetric_tag})
        operator = lx.FunctionLinearOperator(damped(system, lam), like, tags)
        options = {}
        if system.precondition is not None:
            options["preconditioner"] = lx.FunctionLinearOperator(
                system.precondition, like, frozenset({lx.positive_semidefinite_tag})
            )
        scaled = UnitVector.of(system.space, rhs)
        answer = lx.linear_solve(operator, scaled.unit, self.solver, options=options, throw=False)
        succeeded = answer.result == lx.RESULTS.successful
        limited = answer.result == lx.RESULTS.max_steps_reached
        result = jnp.where(
            succeeded,
            code(Result.CONVERGED),
            jnp.where(limited, code(Result.MAX_ITERATIONS), code(Result.BREAKDOWN)),
        )
        iterations = jnp.asarray(answer.stats.get("num_steps", 0), jnp.int32)
        residual = relative_residual(system, lam, scaled.unit, answer.value)
        residual = jnp.where(jnp.isfinite(scaled.size), residual, scaled.size)
        solution = audited(Solution(scaled.multiply(answer.value), result, iterations, residual, ()), self.tolerance)
        return self._blamed(system, scaled.unit, solution)

    def _blamed(self, system: System, b: PyTree, solution: Solution) -> Solution:
        """A solve that failed with a preconditioner that turns the right-hand side round failed because of it."""
        if system.precondition is None:
            return solution
        (along,) = system.space.dots(((b, system.precondition(b)),))
        bad = ~solved(solution.result) & (tree.max_abs(b) > 0) & ~((along > 0) & jnp.isfinite(along))
        return dataclasses.replace(solution, result=jnp.where(bad, code(Result.BAD_PRECONDITIONER), solution.result))
