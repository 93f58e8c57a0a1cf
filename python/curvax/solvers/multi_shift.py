"""Conjugate gradients for several dampings in one Krylov space.

C + lam_j I has the Krylov space of C whatever lam_j is, and the residuals of all systems are parallel: r_j = zeta_j r.
So one system, that of the least lam, is iterated, and the others follow by scalars (Frommer and Maass, "Fast CG-based
methods for Tikhonov-Phillips regularization", 1999). With sigma_j = lam_j - least, and the numbers of the comments:

    r = p = b
    repeat
      1.  q = (C + least I) p,  alpha = r.r / p.q         one product for all
      2.  rho_j = 1 / (1 + sigma_j alpha + (1 - rho_j of before) alpha beta of before / alpha of before)
      3.  x_j += alpha rho_j p_j,  zeta_j *= rho_j
      4.  r -= alpha q,  beta = r.r / r.r of before
      5.  p_j = zeta_j r + beta rho_j^2 p_j

An example: C = diag(1, 4), b = (1, 0) and lam = (0, 1): alpha = 1 solves the first system, rho_2 = 1 / 2 the second,
x_2 = (1/2, 0).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.solvers.base import Result, Solution, System, UnitVector, code
from curvax.solvers.krylov import RUNNING, KrylovSolver
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    """Vectors and scalars after i iterations; x, p, rho, zeta have an axis of the dampings in front."""

    x: PyTree
    p: PyTree
    rho: jax.Array
    zeta: jax.Array
    base: PyTree  # search direction of the system that is iterated
    r: PyTree
    rr: jax.Array
    alpha: jax.Array
    beta: jax.Array
    i: jax.Array
    result: jax.Array  # -1 while running


@dataclasses.dataclass(frozen=True)
class MultiShiftCG(KrylovSolver):
    """Solves for several lam at the products of one solve; starts at zero, without a preconditioner.

    Both would cost the residuals their being parallel. Each further lam costs two vectors of memory and their updates.
    For one lam it makes the iterates of `CG`.

    Attributes:
      tol: relative residual at which the system of the least lam, the slowest, stops; 1e-5, as of `CG`.
      maxiter: most iterations; 20, as of `CG`.
    """

    @property
    def solves_several(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return f"multi-shift CG (at most {self.maxiter} iterations, tolerance {self.tol:g})"

    @property
    def products(self) -> int:
        return self.maxiter + 1

    def iterations(self, rank: int) -> tuple[int, str]:
        count = min(self.maxiter, rank + 1) if self.tol > 0 else self.maxiter
        return count, f"at most {count} iterations"

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        solution = jax.tree.map(lambda x: x[0], self.solve_several(system, rhs, lam[None]))
        rest = jax.tree.map(jnp.subtract, rhs, tree.axpy(lam, solution.value, system.product(solution.value)))
        return dataclasses.replace(solution, residual=tree.relative_norm(rest, rhs))

    def solve_several(self, system: System, rhs: PyTree, lams: jax.Array) -> Solution:
        if system.precondition is not None:
            raise ValueError(
                "multi-shift CG takes no preconditioner, which would belong to one lam: drop it, or take CG."
            )
        scaled = UnitVector.of(system.space, rhs)
        b, dtype = scaled.unit, scaled.size.dtype
        lams = lams.astype(dtype)
        least = jnp.min(lams)
        end = jax.lax.while_loop(
            lambda at: (at.result == RUNNING) & (at.i < self.maxiter),
            lambda at: self._advance(system, least, lams - least, at),
            self._begin(system, b, lams),
        )
        solved = end.zeta * jnp.sqrt(end.rr) <= self.tol
        stopped = jnp.where(end.result == RUNNING, code(Result.MAX_ITERATIONS), end.result)
        result = jnp.where(solved, code(Result.CONVERGED), stopped)
        result = jnp.where(jnp.isfinite(scaled.size) & jnp.isfinite(end.rr), result, code(Result.NON_FINITE))
        value = jax.vmap(scaled.multiply)(end.x)
        count = jnp.full(lams.shape, end.i)
        return Solution(value, result, count, jnp.full(lams.shape, jnp.nan, dtype), ())

    def _begin(self, system: System, b: PyTree, lams: jax.Array) -> _Iteration:
        p = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lams.shape, *x.shape)), b)
        (rr,) = system.space.dots(((b, b),))
        one, ones = jnp.ones((), lams.dtype), jnp.ones_like(lams)
        running = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), jnp.asarray(RUNNING, jnp.int32))
        return _Iteration(
            jax.tree.map(jnp.zeros_like, p), p, ones, ones, b, b, rr, one, jnp.zeros_like(one),
            jnp.zeros((), jnp.int32), running,
        )  # fmt: skip

    def _advance(self, system: System, least: jax.Array, sigma: jax.Array, at: _Iteration) -> _Iteration:
        space = system.space
        # 1.
        q = tree.axpy(least, at.base, system.product(at.base))
        pq, pp, qq = space.dots(((at.base, q), (at.base, at.base), (q, q)))
        eps = float(jnp.finfo(pq.dtype).eps)
        positive = pq > eps * jnp.sqrt(pp * qq)
        alpha = jnp.where(positive, at.rr / jnp.where(positive, pq, jnp.ones_like(pq)), jnp.zeros_like(pq))
        # 2.
        rho = 1 / (1 + sigma * alpha + (1 - at.rho) * alpha * at.beta / at.alpha)
        # 3.
        x = jax.vmap(tree.axpy)(alpha * rho, at.p, at.x)
        zeta = at.zeta * rho
        # 4.
        r = tree.axpy(-alpha, q, at.r)
        (rr,) = space.dots(((r, r),))
        beta = rr / jnp.where(at.rr > 0, at.rr, jnp.ones_like(at.rr))
        # 5.
        p = jax.vmap(lambda z, w, d: tree.axpy(w, d, tree.scale(z, r)))(zeta, beta * jnp.square(rho), at.p)
        ended = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), jnp.asarray(RUNNING, jnp.int32))
        flat = jnp.where(pq < 0, code(Result.NEGATIVE_CURVATURE), code(Result.BREAKDOWN))
        ended = jnp.where(positive, ended, flat)
        ended = jnp.where(jnp.isfinite(pq), ended, code(Result.NON_FINITE))
        # Where there is no step, what follows is not looked at.
        alpha = jnp.where(positive, alpha, at.alpha)
        return _Iteration(x, p, rho, zeta, tree.axpy(beta, at.base, r), r, rr, alpha, beta, at.i + 1, ended)
