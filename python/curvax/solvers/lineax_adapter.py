"""Any lineax solver as a curvax solver."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax.solvers.base import Lane, Result, Solution, Solver, System, code, damped, relative_residual
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Lineax(Solver):
    """Passes the damped system to a `lineax.AbstractLinearSolver` as a symmetric operator.

    Attributes:
      solver: the lineax solver, for example `lineax.CG(rtol=1e-5, atol=0.0)`.
      positive_definite: tag the operator as positive semidefinite, which `lineax.CG` asks for. Set it to False for
        Hessians, with a solver that allows indefinite operators.

    Needs the `lineax` extra. A preconditioner of the system is passed on as lineax's "preconditioner" option.
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
        answer = lx.linear_solve(operator, rhs, self.solver, options=options, throw=False)
        succeeded = answer.result == lx.RESULTS.successful
        limited = answer.result == lx.RESULTS.max_steps_reached
        result = jnp.where(
            succeeded,
            code(Result.CONVERGED),
            jnp.where(limited, code(Result.MAX_ITERATIONS), code(Result.BREAKDOWN)),
        )
        iterations = jnp.asarray(answer.stats.get("num_steps", 0), jnp.int32)
        residual = relative_residual(system, lam, rhs, answer.value)
        return Solution(answer.value, result, iterations, residual, ())
