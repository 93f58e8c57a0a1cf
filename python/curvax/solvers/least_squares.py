"""Damped least squares: the row system without a squared condition number.

With A = S^T J the damped Gauss-Newton system is the normal equations of a least-squares problem:

    (C + lam I) s = g,  C = A^T A,  g = A^T t        <=>        min over s of |A s - t|^2 + lam |s|^2

Whoever forms C or the Gram matrix A A^T squares the condition number of A, and half of the digits of a small singular
value are lost before anything is solved. An example in six digits: A = ((1, 1), (1e-4, 0)) has singular values 1.4 and
7e-5, and A^T A = ((1 + 1e-8, 1), (1, 1)) is singular to rounding. Solvers of this module work on A itself.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels._dispatch import Choice, Implementation
from curvax.solvers.base import Lane, Result, Solution, Solver, System, code
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """min over s of |A s - t|^2 + lam |s|^2; t and lam come with the call.

    Attributes:
      multiply: v -> A v, a parameter vector to a row vector (rows,).
      transpose: w -> A^T w.
      rows: number of rows of A.
      factorize: implementation of the op `qr` for solvers that form A; `None` takes the best supported one.
    """

    multiply: Callable[[PyTree], jax.Array]
    transpose: Callable[[jax.Array], PyTree]
    rows: int
    factorize: Implementation | Choice | None = None

    def rest(self, gradient: PyTree, lam: jax.Array, s: PyTree) -> PyTree:
        """g - (A^T A + lam I) s."""
        bent = tree.axpy(lam, s, self.transpose(self.multiply(s)))
        return jax.tree.map(jnp.subtract, gradient, bent)


class LeastSquaresSolver(Solver):
    """A solver of damped least squares, which `RowSpace` gives the rows.

    An implementor writes `least_squares`. Its result code speaks for the least-squares problem: CONVERGED is a small
    residual or one at the rounding of A (`judged`), since on an ill-conditioned A rounding alone may leave a residual
    of the normal equations that is as large as g.
    """

    @property
    def lane(self) -> Lane:
        return Lane.ROW

    @property
    def keeps_digits(self) -> bool:
        return True

    def init(self, like: PyTree) -> tuple[()]:
        return ()

    @abc.abstractmethod
    def least_squares(self, problem: LeastSquares, t: jax.Array | None, gradient: PyTree, lam: jax.Array) -> Solution:
        """Solves (A^T A + lam I) s = g.

        Args:
          problem: A.
          t: with A^T t = g, (rows,); `None` where g is not known to lie in the range of A^T.
          gradient: g.
          lam: damping.

        Returns:
          s in parameter space, its result judged, its residual |g - (A^T A + lam I) s| / |g|.
        """

    def several_least_squares(self, problem: LeastSquares, t: jax.Array, gradient: PyTree, lams: jax.Array) -> Solution:
        """`least_squares` for every damping of `lams`, (k,), of a solver that `solves_several`."""
        del problem, t, gradient, lams
        raise ValueError(f"{self.name} solves for one lam at a time: take QR, Eigen, or MultiShiftCG.")

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        raise ValueError(f"{self.name} solves through the rows of a Gauss-Newton matrix: wrap it as RowSpace(...).")


def judged(problem: LeastSquares, t: jax.Array, lam: jax.Array, s: PyTree, norm: jax.Array) -> tuple[jax.Array, ...]:
    """(relative residual of the normal equations, backward error of the least-squares problem) of a solution.

    With w = t - A s and n = A^T w - lam s the first is |n| / |A^T t|, and the second |n| / (|M| |(w, sqrt(lam) s)|),
    M = (A; sqrt(lam) I): s is the exact solution for an A that differs by so much (Stewart 1977), which is all that a
    solver can promise.

    Args:
      norm: of M, an estimate.
    """
    w = t - problem.multiply(s)
    n = tree.axpy(-lam, s, problem.transpose(w))
    size = tree.norm(n)
    below = norm * jnp.hypot(tree.norm(w), jnp.sqrt(lam.astype(size.dtype)) * tree.norm(s))
    backward = jnp.where(size > 0, size / jnp.where(below > 0, below, jnp.ones_like(below)), jnp.zeros_like(size))
    return tree.relative_norm(n, problem.transpose(t)), backward


def verdict(result: jax.Array, residual: jax.Array, backward: jax.Array, tolerance: float) -> jax.Array:
    """`result` as far as residual and backward error (`judged`) bear it out."""
    slack, rounding = 10 * tolerance, float(jnp.finfo(residual.dtype).eps) ** 0.5
    borne_out = (residual <= max(slack, rounding)) | (backward <= rounding)
    result = jnp.where((result == int(Result.CONVERGED)) & ~borne_out, code(Result.INACCURATE), result)
    return jnp.where(jnp.isfinite(residual), result, code(Result.NON_FINITE))


def woodbury(
    solve: Callable[[jax.Array], Solution], problem: LeastSquares, gradient: PyTree, lam: jax.Array
) -> Solution:
    """(A^T A + lam I)^-1 g of any g, by Woodbury's identity: s = (g - x) / lam, x the solution for t = A g.

    It subtracts like from like, so the residual of the first answer is solved for once more.

    Args:
      solve: t -> the solution of min |A s - t|^2 + lam |s|^2.
    """

    def once(v: PyTree) -> tuple[Solution, PyTree]:
        solution = solve(problem.multiply(v))
        return solution, tree.scale(1 / lam, jax.tree.map(jnp.subtract, v, solution.value))

    solution, first = once(gradient)
    value = tree.add(first, once(problem.rest(gradient, lam, first))[1])
    residual = tree.relative_norm(problem.rest(gradient, lam, value), gradient)
    return dataclasses.replace(solution, value=value, residual=residual)
