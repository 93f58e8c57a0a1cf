"""The damped row system by a QR factorization, for explicit small Jacobians.

With M = (A; sqrt(lam) I), or (A^T; sqrt(lam) I) where that has fewer columns, the numbers being those of the comments:

    1. A, by as many products as it has rows or columns, whichever are fewer
    2. M = Q R, k = min(rows, parameters) columns
    3. more rows than parameters      s = R^-1 Q_1^T t           Q_1 the rows of Q beside A
       fewer                          s = Q_1 R^-T t             the least-norm solution of (A  sqrt(lam) I) (s; z) = t

For several lam A = Q_0 R_0 is factorized once, and 2. takes (R_0; sqrt(lam) I), a small matrix, for each: min |A s - t|
has the solution of min |R_0 s - Q_0^T t|, and likewise on the other side.

Neither squares the condition number (Golub 1965; Björck 1996, sections 2.4 and 2.7). An example: A = (3) and lam = 16
have M = (3, 4)^T, R = 5 and Q_1 = 3 / 5, so s = 3 t / 25, as (9 + 16) s = 3 t says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Choice, Implementation, Op, Request
from curvax.kernels.dense_linalg import QR as QR_OP
from curvax.kernels.dense_linalg import eigh, qr, triangular_solve
from curvax.sketches import matmul
from curvax.solvers.base import Result, Solution, code
from curvax.solvers.dense import by_magnitude
from curvax.solvers.least_squares import LeastSquares, LeastSquaresSolver, judged, verdict, woodbury
from curvax.tree import PyTree
from curvax.work import Cost, SolveCost, SystemWork

# Operations around the factorization: forming A, stacking, two products, a triangular solve, the residual.
_LAUNCHES, _PASSES = 60.0, 8.0
# Two each for R and Q, at half of the rate of a Cholesky factorization: panels are half of the work.
_FLOPS = 8.0


@dataclasses.dataclass(frozen=True)
class QR(LeastSquaresSolver):
    """QR factorization of the damped rows, on whichever side is smaller.

    Its error grows with the condition number of A where that of `Cholesky` grows with its square: on a fit of condition
    1e8 in float64 it keeps eight digits and Cholesky none. Memory is (rows + parameters) times the smaller of both, and
    time that times the smaller once more: for some hundred parameters or rows. Where R is singular to rounding (lam = 0
    and dependent columns) the eigenvalues of R^T R decide what is left out, and the result is SINGULAR.
    """

    @property
    def exact(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "QR"

    @property
    def products(self) -> int:
        return 0

    def matrix_size(self, parameters: int, rows: Callable[[], int]) -> int | None:
        return min(parameters, rows())

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        n, m, dtype = tree.size(like), rows(), tree.scalar_dtype(like)
        return ((QR_OP, Request.of(jax.ShapeDtypeStruct((n + m, min(n, m)), dtype))),)

    def system_cost(self, system: SystemWork) -> SolveCost:
        m, n = system.unknowns, system.parameters
        small, entries = min(m, n), float((m + n) * min(m, n))
        forming = dataclasses.replace(system.product.times(small / 2), launches=system.product.launches)
        flops = _FLOPS * entries * small
        dense = Cost(flops, _PASSES * system.itemsize * entries, launches=_LAUNCHES, factorization=flops)
        memory = system.memory + 4.0 * system.itemsize * entries
        return SolveCost(dataclasses.replace(forming + dense, memory=memory), f"{n} parameters")

    @property
    def solves_several(self) -> bool:
        return True

    def several_least_squares(self, problem: LeastSquares, t: jax.Array, gradient: PyTree, lams: jax.Array) -> Solution:
        flat, unravel = tree.ravel(gradient)
        a, tall = _explicit(problem, flat, unravel)
        first = qr(a, implementation=problem.factorize)
        r, q = first.r, first.q
        t = t.astype(a.dtype)
        inner = matmul(q.T, t) if tall else t

        def at(lam: jax.Array) -> Solution:
            solution = _Factors.of(r, lam, tall=tall, implementation=problem.factorize).solve(inner)
            return dataclasses.replace(solution, value=unravel(solution.value if tall else matmul(q, solution.value)))

        # One after the other: under vmap the eigenvalues of a singular R would be computed in any case.
        return jax.lax.map(at, lams)

    def least_squares(self, problem: LeastSquares, t: jax.Array | None, gradient: PyTree, lam: jax.Array) -> Solution:
        flat, unravel = tree.ravel(gradient)
        a, tall = _explicit(problem, flat, unravel)
        factors = _Factors.of(a, lam, tall=tall, implementation=problem.factorize)
        if t is not None:
            solution = factors.solve(t)
        elif factors.tall:
            solution = factors.solve_gradient(flat)
        else:
            explicit = LeastSquares(factors.multiply, factors.transpose, problem.rows)
            solution = woodbury(factors.solve, explicit, flat, lam)
        return dataclasses.replace(solution, value=unravel(solution.value))


def _explicit(problem: LeastSquares, like: jax.Array, unravel: Callable[[jax.Array], PyTree]) -> tuple[jax.Array, bool]:
    """(A, True) if it has at least as many rows as columns, else (A^T, False)."""
    # 1.
    tall = problem.rows >= like.size
    basis = jnp.eye(min(problem.rows, like.size), dtype=like.dtype)
    if tall:
        a = jax.vmap(lambda v: problem.multiply(unravel(v)), out_axes=1)(basis)
    else:
        a = jax.vmap(lambda w: tree.ravel(problem.transpose(w))[0], out_axes=1)(basis)
    return a.astype(like.dtype), tall


@dataclasses.dataclass(frozen=True)
class _Factors:
    """A and the factors of its damped form, over raveled parameter vectors.

    Attributes:
      a: (columns of M beside the diagonal): A if `tall`, else A^T.
      q: the rows of Q beside A; r: R.
      tall: A has at least as many rows as columns.
      lam: damping.
      result: CONVERGED, SINGULAR or NON_FINITE.
    """

    a: jax.Array
    q: jax.Array
    r: jax.Array
    tall: bool
    lam: jax.Array
    result: jax.Array

    @staticmethod
    def of(a: jax.Array, lam: jax.Array, *, tall: bool, implementation: Implementation | Choice | None) -> _Factors:
        # 2.
        damped = jnp.concatenate([a, jnp.sqrt(lam.astype(a.dtype)) * jnp.eye(a.shape[1], dtype=a.dtype)])
        factors = qr(damped, implementation=implementation)
        pivots = jnp.abs(jnp.diagonal(factors.r))
        rounding = damped.shape[0] * float(jnp.finfo(a.dtype).eps)
        regular = jnp.min(pivots) > rounding * jnp.max(pivots)
        result = jnp.where(regular, code(Result.CONVERGED), code(Result.SINGULAR))
        result = jnp.where(factors.result == int(Result.CONVERGED), result, code(Result.NON_FINITE))
        return _Factors(a, factors.q[: a.shape[0]], factors.r, tall, lam, result)

    def multiply(self, v: jax.Array) -> jax.Array:
        return matmul(self.a if self.tall else self.a.T, v)

    def transpose(self, w: jax.Array) -> jax.Array:
        return matmul(self.a.T if self.tall else self.a, w)

    def solve(self, t: jax.Array) -> Solution:
        """min |A s - t|^2 + lam |s|^2."""
        t = t.astype(self.a.dtype)

        def regular() -> jax.Array:
            # 3.
            if self.tall:
                return self._triangular(matmul(self.q.T, t), transpose=False)
            return matmul(self.q, self._triangular(t, transpose=True))

        def singular() -> jax.Array:
            inner = self._by_eigenvalues(self.transpose(t) if self.tall else t)
            return inner if self.tall else self.transpose(inner)

        return self._solution(jax.lax.cond(self.result == int(Result.SINGULAR), singular, regular), t)

    def solve_gradient(self, g: jax.Array) -> Solution:
        """R^T R s = g for a g of any origin, refined once; of a tall A."""

        def once(v: jax.Array) -> jax.Array:
            return jax.lax.cond(
                self.result == int(Result.SINGULAR),
                lambda: self._by_eigenvalues(v),
                lambda: self._triangular(self._triangular(v, transpose=True), transpose=False),
            )

        problem = LeastSquares(self.multiply, self.transpose, self.a.shape[0])
        s = once(g)
        s = s + once(problem.rest(g, self.lam, s))
        residual = tree.relative_norm(problem.rest(g, self.lam, s), g)
        return Solution(s, self.result, jnp.zeros((), jnp.int32), residual, ())

    def _triangular(self, b: jax.Array, *, transpose: bool) -> jax.Array:
        """R^-1 b, or R^-T b."""
        # R is the transpose of a lower triangle.
        return triangular_solve(self.r.T, b[:, None], transpose=not transpose)[:, 0]

    def _by_eigenvalues(self, b: jax.Array) -> jax.Array:
        return by_magnitude(eigh(matmul(self.r.T, self.r)), b, jnp.zeros_like(self.lam))[0]

    def _solution(self, s: jax.Array, t: jax.Array) -> Solution:
        problem = LeastSquares(self.multiply, self.transpose, t.size)
        residual, backward = judged(problem, t, self.lam, s, tree.norm(self.r))
        result = verdict(self.result, residual, backward, 1e-2)
        return Solution(s, result, jnp.zeros((), jnp.int32), residual, ())
