"""MINRES: least residuals on symmetric systems, indefinite and singular ones included.

The method of Paige and Saunders (1975) for A s = b, A = C + lam I. Lanczos' process makes A tridiagonal, T_k, in the
basis v_1, ..., v_k; Givens rotations make T_k triangular as it grows, one column an iteration. The numbers are those of
the comments in `MINRES._advance`; c and s are the last rotation, phi = |r|.

      1.  v = y / beta,  y = A v                       the one product of an iteration
      2.  alpha = <v, y>,  y = y - alpha v - beta v'   the next basis vector, times the next beta
      3.  rotate the column (epsilon, beta, alpha) by the last two rotations; gbar is its last entry
      4.  curvature of the last residual: <r, A r> / <r, r> = -c gbar, known before anything is done with it
      5.  a new rotation makes (gbar, beta) into (gamma, 0);  w = (v - epsilon w'' - delta w') / gamma
      6.  x = x + c phi w,  r = s^2 r - c (s phi) v_next,  phi = s phi

On A = diag(1, -1) and b = (2, 1) the curvature along b is gbar = 3/5, and x = 3/5 b leaves phi = 4/5 |b|. The curvature
of that residual is -3/5: here `CR` ends. Going on, x = (2, -1), the saddle point.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Op, Request, tree_cg
from curvax.solvers.base import Result, Solution, System, UnitVector, code, damped
from curvax.solvers.krylov import RUNNING, KrylovSolver
from curvax.solvers.least_residual import Ending, finish, is_bad, over, verdict
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Lanczos:
    """The process between two iterations: beta P v of the last vector and the next one, and beta v of the next."""

    last: PyTree
    next: PyTree
    y: PyTree
    last_beta: jax.Array
    beta: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rotations:
    """What the last two rotations left for the next column: `dbar`, `epsilon`, and the last one itself."""

    dbar: jax.Array
    epsilon: jax.Array
    c: jax.Array
    s: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    x: PyTree
    r: PyTree
    z: PyTree  # P^-1 r
    w: tuple[PyTree, PyTree]  # the last two directions, w'' and w'
    lanczos: _Lanczos
    rotations: _Rotations
    phi: jax.Array  # |r| in the norm of P^-1
    image: jax.Array  # |A z| / |z| in the norms of P^-1 and P
    largest: jax.Array  # the largest of these so far
    i: jax.Array
    result: jax.Array  # RUNNING while it goes on


@dataclasses.dataclass(frozen=True)
class MINRES(KrylovSolver):
    """MINRES on symmetric systems, with negative curvature detected and used.

    With `detect` it is Newton-MR (Liu and Roosta 2022), as `CR`: from the first residual of nonpositive curvature a
    step along it, NEGATIVE_CURVATURE, so that the direction points downhill. Without, it goes on to the solution of
    the indefinite system, which for a Hessian leads to the next saddle point as well as to a minimum: that is for
    linear systems, not for descent. A right-hand side with a part that A maps to zero ends with its least-squares
    solution of least norm, SINGULAR (the lift of Liu, Milzarek and Roosta 2024), where CG breaks down.

    It starts from zero. An iteration takes a product and some four more vectors than `CG`.

    Attributes:
      tol: stop when the residual falls below tol times |g|.
      maxiter: most iterations, with a product each.
      detect: whether to stop at negative curvature and use it.
    """

    detect: bool = True

    @property
    def name(self) -> str:
        beyond = "" if self.detect else ", through negative curvature"
        return f"MINRES (at most {self.maxiter} iterations, tolerance {self.tol:g}{beyond})"

    @property
    def products(self) -> int:
        return self.maxiter + 1  # one for the true residual

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        return ((tree_cg.DOTS, Request.of(like)),)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        scaled = UnitVector.of(system.space, rhs)
        at = jax.lax.while_loop(
            lambda at: (at.result == RUNNING) & (at.i < self.maxiter),
            lambda at: self._advance(system, lam, at),
            self._begin(system, scaled.unit),
        )
        one = jnp.ones_like(at.image)
        return finish(system, lam, scaled, Ending(at.x, at.r, at.z, at.image, one, at.i, at.result), self.tol)

    def _begin(self, system: System, b: PyTree) -> _Iteration:
        zero = tree.zeros_like(b)
        z = b if system.precondition is None else system.precondition(b)
        bb, bz = system.space.dots(((b, b), (b, z)))
        nothing, beta = jnp.zeros_like(bz), jnp.sqrt(jnp.maximum(bz, jnp.zeros_like(bz)))
        rotations = _Rotations(dbar=nothing, epsilon=nothing, c=-jnp.ones_like(bz), s=nothing)
        result = jnp.where(is_bad(bb, bz), code(Result.BAD_PRECONDITIONER), self._result(bb))
        lanczos = _Lanczos(zero, b, z, nothing, beta)
        return _Iteration(
            zero, b, z, (zero, zero), lanczos, rotations, beta, nothing, nothing, jnp.zeros((), jnp.int32), result
        )

    def _advance(self, system: System, lam: jax.Array, at: _Iteration) -> _Iteration:
        old, last = at.lanczos, at.rotations
        # 1.
        v = tree.scale(over(jnp.ones_like(old.beta), old.beta), old.y)
        y = tree.axpy(-over(old.beta, old.last_beta), old.last, damped(system, lam)(v))
        # 2.
        (alpha,) = system.space.dots(((v, y),))
        following = tree.axpy(-over(alpha, old.beta), old.next, y)
        y = following if system.precondition is None else system.precondition(following)
        own, squared = system.space.dots(((following, following), (following, y)))
        beta = jnp.sqrt(jnp.maximum(squared, jnp.zeros_like(squared)))
        # 3.
        delta, gbar = last.c * last.dbar + last.s * alpha, last.s * last.dbar - last.c * alpha
        dbar, epsilon = -last.c * beta, last.s * beta
        # 4.
        image = jnp.hypot(gbar, dbar)
        largest = jnp.maximum(at.largest, image)
        seen = verdict(-last.c * gbar, image, largest)
        if not self.detect:
            seen = jnp.where(seen == int(Result.NEGATIVE_CURVATURE), jnp.asarray(RUNNING, jnp.int32), seen)
        seen = jnp.where(is_bad(own, squared), code(Result.BAD_PRECONDITIONER), seen)
        # 5.
        gamma = jnp.hypot(gbar, beta)
        rotations = _Rotations(dbar, epsilon, over(gbar, gamma), over(beta, gamma))
        w = tree.axpy(-delta, at.w[1], tree.axpy(-last.epsilon, at.w[0], v))
        w = tree.scale(over(jnp.ones_like(gamma), gamma), w)
        # 6.
        x = tree.axpy(rotations.c * at.phi, w, at.x)
        phi = rotations.s * at.phi
        kept, new = jnp.square(rotations.s), -over(phi * rotations.c, beta)
        z = tree.axpy(new, y, tree.scale(kept, at.z))
        r = z if system.precondition is None else tree.axpy(new, following, tree.scale(kept, at.r))
        (rr,) = system.space.dots(((r, r),))
        lanczos = _Lanczos(old.next, following, y, old.beta, beta)
        further = _Iteration(x, r, z, (at.w[1], w), lanczos, rotations, phi, image, largest, at.i + 1, self._result(rr))
        stopped = dataclasses.replace(at, image=image, result=seen)
        return jax.tree.map(lambda a, b: jnp.where(seen == RUNNING, a, b), further, stopped)

    def _result(self, rr: jax.Array) -> jax.Array:
        """The result behind a residual with the square `rr`."""
        result = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), jnp.asarray(RUNNING, jnp.int32))
        return jnp.where(jnp.isfinite(rr), result, code(Result.NON_FINITE))
