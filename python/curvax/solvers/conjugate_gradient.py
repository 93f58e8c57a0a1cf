"""Preconditioned conjugate gradients with relative tests and an outcome.

The method of Hestenes and Stiefel (1952) for A x = b, A = C + lam I, with the numbers of the comments in `CG._advance`:

    r = b - A x,  z = P^-1 r,  p = z
    repeat
      1.  q = C p                                   the one product of an iteration
      2.  <p, A p> and |A p|^2 from q, without a pass for A p
      3.  is the curvature <p, A p> / <p, p> positive beyond rounding?
      4.  alpha = <r, z> / <p, A p>
      5.  x = x + alpha p,  r = r - alpha A p
      6.  z = P^-1 r
      7.  p = z + beta p,  beta = <r, z> / <r, z of before>
      8.  stop?

Under a radius (Steihaug 1983, Toint 1981) steps 3 and 4 know two more ends:

      3.  not positive: go along p to the radius, downhill all the way, and stop
      4.  alpha p leads out of the region: go along p to its boundary and stop

          x0 ---- x1 --- x2 ----|---> p2       |x| grows from iterate to iterate, so nothing that lies
                                radius         behind the boundary leads back into the region

On A = diag(1, 4) and b = (1, 1): alpha = 2/5 leads to x = (2/5, 2/5), r = (3/5, -3/5); beta = 9/25 and alpha = 5/8 lead
to x = (1, 1/4). Two distinct eigenvalues, two iterations. With a radius of 1/2 the first is cut to (0.354, 0.354).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Op, Request, tree_cg
from curvax.solvers.base import Result, Solution, System, UnitVector, audited, code, damped
from curvax.solvers.krylov import RUNNING, KrylovSolver, check_limits
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class MartensStop:
    """Stop when the quadratic's relative progress over the last k iterations drops below k * epsilon.

    With phi(x) = x^T (C + lam I) x / 2 - g^T x and k = max(10, i / 10), stop at iteration i > k if phi_i < 0 and
    (phi_i - phi_(i-k)) / phi_i < k * epsilon (Martens 2010, section 4.4). phi = -x^T (g + r) / 2 costs one dot product.

    Attributes:
      epsilon: progress per iteration that still counts; 5e-4 in the paper.
    """

    epsilon: float = 5e-4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Iteration:
    x: PyTree
    r: PyTree
    p: PyTree
    rz: jax.Array
    rr: jax.Array
    largest: jax.Array  # largest size |A p| / |p| of the operator so far
    history: jax.Array  # the last phi values, a ring; length 0 without MartensStop
    i: jax.Array
    result: jax.Array  # -1 while running


@dataclasses.dataclass(frozen=True)
class CG(KrylovSolver):
    """Conjugate gradients on a symmetric system.

    The right-hand side is scaled to unit norm first, so the course of the iteration does not depend on the scale of
    the loss. A direction p with p^T A p not above rounding of the largest size so far ends the iteration: with
    NEGATIVE_CURVATURE (the iterate so far is returned; at the first iteration a step along g of length
    |p|^2 / (|p| |A p|) |g|, the inverse of the operator's size along p), or with BREAKDOWN if the curvature is zero
    to rounding. A preconditioner that makes r.P^-1 r zero, negative or not finite ends it with BAD_PRECONDITIONER and
    the iterate before.

    Under a radius (`system.radius`, which a `damping.Radius` owns) it is the method of Steihaug and Toint: it starts
    from zero, whatever `warm_start` says, and ends where the iterates leave the region (BOUNDARY), or on the boundary
    along a direction of negative curvature (NEGATIVE_CURVATURE). The region is a ball in the parameters with a
    preconditioner too, since a refresh of it should not change what a radius means; the step is then the first exit.

    The residual of the solution is recomputed from its definition, one more product, unless the iteration limit came
    while it was above the square root of the rounding unit: there recurrence and definition agree.

    Attributes:
      tol: stop when the residual recurrence falls below tol times |g|.
      maxiter: most iterations.
      warm_start: start from the previous step's solution, kept in the state.
      stabilize_every: every so many iterations the residual is recomputed as g - A x (one more product); the search
        direction is kept, so convergence is not set back. 50: in fewer float32 iterations the recurrence has not
        drifted. 0 never.
      stop: an additional stopping rule, or `None`.
    """

    warm_start: bool = True
    stabilize_every: int = 50
    stop: MartensStop | None = None

    def __post_init__(self) -> None:
        check_limits(self, maxiter=1, tol=0, stabilize_every=0)

    @property
    def name(self) -> str:
        return f"CG (at most {self.maxiter} iterations, tolerance {self.tol:g})"

    @property
    def products(self) -> int:
        # One for the true residual at the end, one for the residual of a warm start.
        return self.maxiter + 1 + self.warm_start

    @property
    def takes_any_space(self) -> bool:
        return True

    @property
    def takes_radius(self) -> bool:
        return True

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        return tuple((op, Request.of(like)) for op in tree_cg.OPS)

    def iterations(self, rank: int) -> tuple[int, str]:
        """As many as the damped matrix has distinct eigenvalues: that of the null space and `rank` others.

        That it may end sooner is not foreseen, since spectra are not shapes; one that runs to its limit recomputes no
        residual.
        """
        if self.tol > 0 and rank + 1 < self.maxiter:
            return rank + 1, f"at most {rank + 1} iterations, the rank being {rank}"
        return self.maxiter, f"at most {self.maxiter} iterations"

    def init(self, like: PyTree) -> PyTree:
        return tree.zeros_like(like) if self.warm_start else ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        start = state if self.warm_start else None
        solution = self.iterate(system, rhs, start, lam)
        return dataclasses.replace(solution, state=solution.value if self.warm_start else ())

    def iterate(self, system: System, rhs: PyTree, start: PyTree | None, lam: jax.Array) -> Solution:
        """Solves from `start` (`None` for zero), in whatever space the system lives; leaves the state empty."""
        space, apply = system.space, damped(system, lam)
        scaled = UnitVector.of(space, rhs)
        size, b = scaled.size, scaled.unit
        zero = jax.tree.map(jnp.zeros_like, b)
        if system.radius is not None:
            system = dataclasses.replace(system, radius=scaled.divide_length(system.radius))
        if start is None or system.radius is not None:
            x, r, from_zero = zero, b, jnp.asarray(True)
        else:
            x, r, from_zero = self._warm(system, b, scaled.divide(start), apply)
        z = r if system.precondition is None else system.precondition(r)
        (rr,) = space.dots(((r, r),))
        rz = rr if system.precondition is None else space.dots(((r, z),))[0]
        first = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), self._running(system, rr, rz))
        begin = _Iteration(
            x, r, z, rz, rr, jnp.zeros_like(rr), self._empty_history(rr), jnp.zeros((), jnp.int32),
            jnp.where(jnp.isfinite(rr), first, code(Result.NON_FINITE)),
        )  # fmt: skip
        end = jax.lax.while_loop(
            lambda at: (at.result == RUNNING) & (at.i < self.maxiter),
            lambda at: self._advance(system, b, lam, from_zero, at),
            begin,
        )
        result = jnp.where(end.result == RUNNING, code(Result.MAX_ITERATIONS), end.result)
        result = jnp.where(jnp.isfinite(size), result, code(Result.NON_FINITE))
        # On an indefinite system what CG adds to a warm start may point uphill: then a short step along b instead.
        (descent,) = space.dots(((end.x, b),))
        short = 1 / jnp.where(end.largest > 0, end.largest, jnp.ones_like(end.largest))
        x = tree.where(descent < 0, tree.scale(short, b), end.x)
        residual = self._true_residual(system, b, lam, dataclasses.replace(end, x=x), result)
        residual = jnp.where(size == 0, jnp.zeros_like(size), jnp.where(jnp.isfinite(size), residual, size))
        # A right-hand side that is not finite leaves x at zero, and zero times its norm is NaN: not a step to take.
        return audited(Solution(scaled.multiply(x), result, end.i, residual, ()), self.tol)

    def _running(self, system: System, rr: jax.Array, rz: jax.Array) -> jax.Array:
        """The result while nothing ends the iteration: P^-1 must make r.P^-1 r positive as long as r is any."""
        running = jnp.asarray(RUNNING, jnp.int32)
        if system.precondition is None:
            return running
        positive = (rz > 0) & jnp.isfinite(rz)
        some = rr > float(jnp.finfo(rr.dtype).eps) ** 2
        return jnp.where(some & ~positive, code(Result.BAD_PRECONDITIONER), running)

    def _warm(
        self, system: System, b: PyTree, x: PyTree, apply: Callable[[PyTree], PyTree]
    ) -> tuple[PyTree, PyTree, jax.Array]:
        """(x, b - A x, False) if x points downhill and lowers the quadratic, else (0, b, True).

        On a positive definite system only a start worse than none is dropped. On an indefinite one a stale start may
        point uphill, and what CG adds to it need not turn it round.
        """
        r = jax.tree.map(jnp.subtract, b, apply(x))
        xb, xr = system.space.dots(((x, b), (x, r)))
        # The quadratic x.A x / 2 - b.x is -x.(b + r) / 2.
        good = (xb > 0) & (xb + xr > 0)
        return tree.where(good, x, jax.tree.map(jnp.zeros_like, x)), tree.where(good, r, b), ~good

    def _true_residual(
        self, system: System, b: PyTree, lam: jax.Array, end: _Iteration, result: jax.Array
    ) -> jax.Array:
        """|b - A x| for unit b."""

        def recomputed() -> jax.Array:
            rest = jax.tree.map(jnp.subtract, b, damped(system, lam)(end.x))
            return _norm_from_dot(system.space.dots(((rest, rest),))[0])

        eps = jnp.asarray(jnp.finfo(end.rr.dtype).eps, end.rr.dtype)
        plain = (result == int(Result.MAX_ITERATIONS)) & (end.rr > eps)
        return jax.lax.cond(plain, lambda: _norm_from_dot(end.rr), recomputed)

    def _empty_history(self, like: jax.Array) -> jax.Array:
        length = 0 if self.stop is None else max(10, -(-self.maxiter // 10)) + 1
        return jnp.zeros((length,), like.dtype)

    def _advance(self, system: System, b: PyTree, lam: jax.Array, from_zero: jax.Array, at: _Iteration) -> _Iteration:
        space = system.space
        # 1.
        q = system.product(at.p)
        pq, pp, qq = space.dots(((at.p, q), (at.p, at.p), (q, q)))
        # 2. p.Ap = p.Cp + lam p.p and |Ap|^2 = |Cp|^2 + 2 lam p.Cp + lam^2 p.p.
        mu = lam.astype(pq.dtype)
        pq, qq = pq + mu * pp, qq + 2 * mu * pq + mu * mu * pp
        # 3.
        eps = jnp.asarray(jnp.finfo(pq.dtype).eps, pq.dtype)
        curvature = pq / pp
        largest = jnp.maximum(at.largest, jnp.sqrt(qq / pp))
        negative = curvature < -eps * largest
        flat = ~negative & ~(curvature > eps * largest)
        finite = jnp.isfinite(pq) & jnp.isfinite(qq)
        proceed = finite & ~negative & ~flat
        # 4. Along a first direction of negative curvature: the step that |A p| / |p| as curvature would give.
        escape = negative & (at.i == 0) & finite & from_zero
        alpha = jnp.where(proceed, at.rz / jnp.where(proceed, pq, jnp.ones_like(pq)), jnp.zeros_like(pq))
        alpha = jnp.where(escape, at.rz / jnp.where(escape, jnp.sqrt(pp * qq), jnp.ones_like(pq)), alpha)
        leaves = jnp.asarray(False)
        if system.radius is not None:
            (xx, xp) = space.dots(((at.x, at.x), (at.x, at.p)))
            most = _to_boundary(xx, xp, pp, system.radius.astype(pp.dtype))
            leaves = finite & (~proceed | (alpha >= most))
            alpha = jnp.where(leaves, most, alpha)
        # 5.
        x, r, rr = space.update(alpha, lam, at.x, at.p, at.r, q)
        r, rr = self._refresh_residual(system, b, lam, at.i + 1, x, r, rr)
        # 6.
        z = r if system.precondition is None else system.precondition(r)
        rz = rr if system.precondition is None else space.dots(((r, z),))[0]
        # 7.
        p = space.direction(rz / jnp.where(at.rz > 0, at.rz, jnp.ones_like(at.rz)), z, at.p)
        # 8. What stands last here counts most.
        result = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), self._running(system, rr, rz))
        history, stalled = self._record(space, at, b, x, r)
        result = jnp.where((result == RUNNING) & stalled, code(Result.STOPPED_EARLY), result)
        # A direction of length zero, from a residual that is not.
        result = jnp.where(flat, code(Result.BREAKDOWN), result)
        result = jnp.where(leaves, code(Result.BOUNDARY), result)
        result = jnp.where(negative, code(Result.NEGATIVE_CURVATURE), result)
        result = jnp.where(finite, result, code(Result.NON_FINITE))
        return _Iteration(x, r, p, rz, rr, largest, history, at.i + 1, result)

    def _refresh_residual(
        self, system: System, b: PyTree, lam: jax.Array, i: jax.Array, x: PyTree, r: PyTree, rr: jax.Array
    ) -> tuple[PyTree, jax.Array]:
        if not 0 < self.stabilize_every < self.maxiter:
            return r, rr

        def recompute() -> tuple[PyTree, jax.Array]:
            fresh = jax.tree.map(jnp.subtract, b, damped(system, lam)(x))
            return fresh, system.space.dots(((fresh, fresh),))[0]

        return jax.lax.cond(i % self.stabilize_every == 0, recompute, lambda: (r, rr))

    def _record(self, space: Any, at: _Iteration, b: PyTree, x: PyTree, r: PyTree) -> tuple[jax.Array, jax.Array]:
        if self.stop is None:
            return at.history, jnp.asarray(False)
        xb, xr = space.dots(((x, b), (x, r)))
        phi = -(xb + xr) / 2
        i = at.i + 1
        k = jnp.maximum(10, i // 10)
        length = at.history.shape[0]
        before = at.history[(i - k) % length]
        history = at.history.at[i % length].set(phi)
        bound = k.astype(phi.dtype) * self.stop.epsilon
        return history, (i > k) & (phi < 0) & (phi - before > phi * bound)


def _to_boundary(xx: jax.Array, xp: jax.Array, pp: jax.Array, radius: jax.Array) -> jax.Array:
    """The t >= 0 with |x + t p| = radius, for |x| <= radius, by the form of the root that subtracts nothing."""
    pp = jnp.where(pp > 0, pp, jnp.ones_like(pp))
    room = jnp.maximum(jnp.square(radius) - xx, jnp.zeros_like(xx))
    root = jnp.sqrt(jnp.square(xp) + pp * room)
    ahead = xp > 0
    return jnp.where(ahead, room / jnp.where(ahead, xp + root, jnp.ones_like(root)), (root - xp) / pp)


def _norm_from_dot(squared: jax.Array) -> jax.Array:
    # In a semidefinite inner product rounding may leave a tiny negative square.
    return jnp.sqrt(jnp.maximum(squared, jnp.zeros_like(squared)))
