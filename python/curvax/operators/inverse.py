"""(C + lam I)^-1 as an operator, by any solver of curvax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.numbers import check_not_negative
from curvax.operators.base import LinearOperator, SymmetricOperator, check_square
from curvax.operators.factored import Factored
from curvax.solvers import CG, MINRES, Cholesky, Lane, Solution, Solver, System
from curvax.tree import PyTree

EXACT_UP_TO = 1024
"""Parameters up to which the default solver factorizes the matrix: n products and n^3 / 3, a second at most."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverse(SymmetricOperator):
    """(C + lam I)^-1, each product one solve.

    Attributes:
      operator: C, symmetric.
      lam: the shift, a scalar.
      solver: how systems are solved; static.
    """

    operator: LinearOperator
    lam: jax.Array
    solver: Solver = dataclasses.field(metadata={"static": True})

    @property
    def domain(self) -> PyTree:
        return self.operator.domain

    @property
    def is_positive(self) -> bool:
        return self.operator.is_positive

    def linearized(self) -> Callable[[PyTree], PyTree]:
        solve = self._repeated()
        return lambda v: solve(v).value

    def solve(self, v: PyTree) -> Solution:
        """The solution for one right-hand side, with its `Result`, iterations and true relative residual."""
        return _solve(self, v)

    def solve_columns(self, matrix: jax.Array) -> Solution:
        """The solutions for the columns of (n, k): values (n, k), and an outcome for each.

        Raises:
          ValueError: another number of rows.
        """
        if matrix.ndim != 2 or matrix.shape[0] != self.shape[0]:
            raise ValueError(f"pass right-hand sides in columns, ({self.shape[0]}, k); got {matrix.shape}.")
        return _solve_columns(self, matrix.astype(self.dtype))

    def _repeated(self) -> Callable[[PyTree], Solution]:
        system = System(self.operator.linearized())
        return self.solver.repeated(system, tree.zeros_like(self.domain), self.lam)


@jax.jit
def _solve(inverse: Inverse, v: PyTree) -> Solution:
    return inverse._repeated()(v)


@jax.jit
def _solve_columns(inverse: Inverse, matrix: jax.Array) -> Solution:
    _, unravel = tree.ravel(tree.zeros_like(inverse.domain))
    solve = inverse._repeated()

    def one(column: jax.Array) -> Solution:
        solution = solve(unravel(column))
        return dataclasses.replace(solution, value=tree.ravel(solution.value)[0], state=())

    solutions = jax.vmap(one, in_axes=1)(matrix)
    return dataclasses.replace(solutions, value=solutions.value.T)


def inverse(
    operator: LinearOperator, lam: float | jax.Array = 0.0, *, solver: Solver | None = None
) -> Inverse | Factored:
    """(C + lam I)^-1.

    Args:
      operator: C, symmetric. Of factored operators the inverse is exact and factored too, and takes no solver.
      lam: the shift, not negative; zero (default) inverts C itself.
      solver: a solver of `curvax.solvers` that works in parameter space. By default Cholesky up to 1,024 parameters,
        and beyond that CG to a relative residual of 1e-6, or MINRES if C may be indefinite. How a solve ended is in
        `inverse.solve(v).result`.

    Raises:
      TypeError, ValueError: an operator that is not symmetric, a negative lam, a solver for another kind of system.
    """
    check_square(operator, "inverse")
    check_not_negative("lam", lam)
    if isinstance(operator, Factored):
        if solver is not None:
            raise ValueError("the inverse of a factored operator is known in closed form: leave `solver` out.")
        return operator.shifted_inverse(lam)
    solver = _default(operator) if solver is None else solver
    if solver.lane is not Lane.PARAMETER:
        raise ValueError(
            f"{solver.name} does not solve for parameters: take CG, Cholesky, MINRES, Eigen or a relative."
        )
    return Inverse(operator, jnp.asarray(lam, operator.dtype), solver)


def _default(operator: LinearOperator) -> Solver:
    if operator.shape[0] <= EXACT_UP_TO:
        return Cholesky()
    return CG(tol=1e-6, maxiter=1000) if operator.is_positive else MINRES(tol=1e-6, maxiter=1000)
