"""LSMR: the damped row system by J v and J^T u alone, without squaring its condition number.

Fong and Saunders, "LSMR: an iterative algorithm for sparse least-squares problems" (2011), with damp = sqrt(lam). It is
MINRES on the normal equations, run on the bidiagonal form of A (Golub and Kahan 1965) and never on A^T A; the numbers
are those of the comments:

    beta u = t,  alpha v = A^T u
    repeat
      1.  beta u = A v - alpha u,  alpha v = A^T u - beta v      one product with A and one with A^T
      2.  rotation with sqrt(lam)                                the damping
      3.  rotation that makes the bidiagonal matrix upper        rho
      4.  rotation of its transpose                              rho_bar
      5.  h_bar, x, h
      6.  |A^T r - lam x| = |zeta_bar|, which falls in every iteration: stop?

On A = (3), t = 1 and lam = 16 the first iteration has alpha_hat = 5, zeta = 3 / 5 and x = 3 / 25, the answer.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.loops import for_loop_body
from curvax.solvers.base import Result, Solution, code
from curvax.solvers.krylov import check_limits
from curvax.solvers.least_squares import LeastSquares, LeastSquaresSolver, judged, verdict, woodbury
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    """Vectors and scalars after i iterations; names are the paper's."""

    u: jax.Array
    v: PyTree
    h: PyTree
    h_bar: PyTree
    x: PyTree
    alpha: jax.Array
    alpha_bar: jax.Array
    rho: jax.Array
    rho_bar: jax.Array
    c_bar: jax.Array
    s_bar: jax.Array
    zeta_bar: jax.Array
    norm: jax.Array  # Frobenius norm of the bidiagonal matrix so far, squared
    i: jax.Array


@dataclasses.dataclass(frozen=True)
class LSMR(LeastSquaresSolver):
    """LSMR on the damped rows (Fong and Saunders 2011): where they are too many to factorize and too ill-conditioned.

    The residual of the normal equations falls in every iteration. In exact arithmetic as many iterations as A has
    distinct singular values suffice; on ill-conditioned systems rounding may double that. No preconditioner, no warm
    start.

    Attributes:
      tol: stop where |A^T (t - A s) - lam s| is below tol |g|; 1e-5, as of `CG`.
      maxiter: most iterations, each a product with A and one with A^T; 100, since whoever takes LSMR for CG has a
        system on which twenty do not suffice.
    """

    tol: float = 1e-5
    maxiter: int = 100

    def __post_init__(self) -> None:
        check_limits(self, maxiter=1, tol=0)

    @property
    def name(self) -> str:
        return f"LSMR (at most {self.maxiter} iterations, tolerance {self.tol:g})"

    @property
    def tolerance(self) -> float:
        return self.tol

    @property
    def products(self) -> int:
        # One before the first iteration and one for the true residual.
        return self.maxiter + 2

    def iterations(self, rank: int) -> tuple[int, str]:
        count = min(self.maxiter, rank + 1) if self.tol > 0 else self.maxiter
        return count, f"at most {count} iterations"

    def least_squares(self, problem: LeastSquares, t: jax.Array | None, gradient: PyTree, lam: jax.Array) -> Solution:
        looped = dataclasses.replace(
            problem, multiply=for_loop_body(problem.multiply), transpose=for_loop_body(problem.transpose)
        )
        if t is not None:
            return self._solve(looped, t, lam)
        return woodbury(lambda w: self._solve(looped, w, lam), problem, gradient, lam)

    def _solve(self, problem: LeastSquares, t: jax.Array, lam: jax.Array) -> Solution:
        begin = self._begin(problem, t)
        dtype = begin.alpha.dtype
        damp = jnp.sqrt(lam.astype(dtype))
        limit = jnp.asarray(self.tol, dtype) * jnp.abs(begin.zeta_bar)
        end = jax.lax.while_loop(
            lambda at: (jnp.abs(at.zeta_bar) > limit) & (at.i < self.maxiter),
            lambda at: _advance(problem, damp, at),
            begin,
        )
        residual, backward = judged(problem, t, lam, end.x, jnp.hypot(jnp.sqrt(end.norm), damp))
        converged = jnp.abs(end.zeta_bar) <= limit
        result = jnp.where(converged, code(Result.CONVERGED), code(Result.MAX_ITERATIONS))
        result = jnp.where(jnp.isfinite(end.zeta_bar), result, code(Result.NON_FINITE))
        return Solution(end.x, verdict(result, residual, backward, self.tol), end.i, residual, ())

    def _begin(self, problem: LeastSquares, t: jax.Array) -> _Iteration:
        u, beta = _unit(t)
        v, alpha = _unit(problem.transpose(u))
        one, zero = jnp.ones_like(alpha), jnp.zeros_like(alpha)
        nothing = jax.tree.map(jnp.zeros_like, v)
        beta = beta.astype(alpha.dtype)
        return _Iteration(
            u, v, v, nothing, nothing, alpha, alpha, one, one, one, zero, alpha * beta, jnp.square(alpha),
            jnp.zeros((), jnp.int32),
        )  # fmt: skip


def _unit(v: PyTree) -> tuple[PyTree, jax.Array]:
    """(v / |v|, |v|); zero where v is."""
    size = tree.norm(v)
    below = jnp.where(size > 0, size, jnp.ones_like(size))
    return jax.tree.map(lambda x: x / below.astype(x.dtype), v), size


def _rotation(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(c, s, r) with c a + s b = r and s a - c b = 0."""
    r = jnp.hypot(a, b)
    below = jnp.where(r > 0, r, jnp.ones_like(r))
    return jnp.where(r > 0, a / below, jnp.ones_like(r)), b / below, r


def _ratio(above: jax.Array, below: jax.Array) -> jax.Array:
    """above / below; 0 where the iteration has come to its end."""
    return jnp.where(below != 0, above / jnp.where(below != 0, below, jnp.ones_like(below)), jnp.zeros_like(above))


def _advance(problem: LeastSquares, damp: jax.Array, at: _Iteration) -> _Iteration:
    # 1.
    u, beta = _unit(problem.multiply(at.v) - at.alpha.astype(at.u.dtype) * at.u)
    beta = beta.astype(at.alpha.dtype)
    v, alpha = _unit(tree.axpy(-beta, at.v, problem.transpose(u)))
    # 2.
    _, _, alpha_hat = _rotation(at.alpha_bar, damp)
    # 3.
    c, s, rho = _rotation(alpha_hat, beta)
    theta, alpha_bar = s * alpha, c * alpha
    # 4.
    theta_bar = at.s_bar * rho
    c_bar, s_bar, rho_bar = _rotation(at.c_bar * rho, theta)
    zeta, zeta_bar = c_bar * at.zeta_bar, -s_bar * at.zeta_bar
    # 5.
    h_bar = tree.axpy(-_ratio(theta_bar * rho, at.rho * at.rho_bar), at.h_bar, at.h)
    x = tree.axpy(_ratio(zeta, rho * rho_bar), h_bar, at.x)
    h = tree.axpy(-_ratio(theta, rho), at.h, v)
    norm = at.norm + jnp.square(beta) + jnp.square(alpha)
    # 6.
    return _Iteration(
        u, v, h, h_bar, x, alpha, alpha_bar, rho, rho_bar, c_bar, s_bar, zeta_bar, norm, at.i + 1
    )  # fmt: skip
