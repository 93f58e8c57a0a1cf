"""Conjugate residuals with negative curvature detected and used.

The method of Stiefel (1955) for A s = b, A = C + lam I, with the numbers of the comments in `CR._advance`:

    r = b,  z = P^-1 r,  w = A z,  p = z,  q = w
    repeat
      1.  is the curvature <z, w> / <z, z> positive beyond rounding?      (least_residual.py)
      2.  alpha = <z, w> / <q, P^-1 q>
      3.  x = x + alpha p,  r = r - alpha q,  z = z - alpha P^-1 q
      4.  w = A z                                                          the one product of an iteration
      5.  beta = <z, w> / <z, w of before>,  p = z + beta p,  q = w + beta q

On A = diag(1, 4) and b = (1, 1): w = q = (1, 4), alpha = 5/17 leads to x = (5/17, 5/17), r = (12/17, -3/17), and the
second iteration to x = (1, 1/4).
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
class _Iteration:
    x: PyTree
    r: PyTree
    z: PyTree
    w: PyTree
    p: PyTree
    q: PyTree
    zw: jax.Array  # <z, A z>
    size: tuple[jax.Array, jax.Array]  # |z|, |A z|
    largest: jax.Array  # largest |A z| / |z| so far
    i: jax.Array
    result: jax.Array  # RUNNING while it goes on


@dataclasses.dataclass(frozen=True)
class CR(KrylovSolver):
    """Conjugate residuals: the residual falls in every iteration, and its curvature is known at no cost.

    The Newton-MR direction of Liu and Roosta (2022): the iterate of least residual while the residuals' curvature is
    positive, and from the first residual r of nonpositive curvature a step of length |r|^2 / |A r| along it (see
    least_residual.py), NEGATIVE_CURVATURE. Both point downhill. A right-hand side with a part that A maps to zero ends
    with its least-squares solution, SINGULAR. `MINRES` makes the same iterates and can go on behind negative curvature.

    It starts from zero; what is said of descent holds from there alone. Against `CG` an iteration takes two more
    vectors, and the residual is smaller after as many products.

    Attributes:
      tol: stop when the residual falls below tol times |g|.
      maxiter: most iterations, with a product each.
    """

    @property
    def name(self) -> str:
        return f"conjugate residuals (at most {self.maxiter} iterations, tolerance {self.tol:g})"

    @property
    def products(self) -> int:
        # One before the first iteration, one for the true residual.
        return self.maxiter + 2

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        return ((tree_cg.DOTS, Request.of(like)),)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        scaled = UnitVector.of(system.space, rhs)
        b = scaled.unit
        z = b if system.precondition is None else system.precondition(b)
        w = damped(system, lam)(z)
        zero = jnp.zeros((), tree.scalar_dtype(rhs))
        begin = self._looked(
            system, _Iteration(tree.zeros_like(b), b, z, w, z, w, zero, (zero, zero), zero, jnp.int32(0), jnp.int32(0))
        )
        at = jax.lax.while_loop(
            lambda at: (at.result == RUNNING) & (at.i < self.maxiter),
            lambda at: self._advance(system, lam, at),
            begin,
        )
        end = Ending(at.x, at.r, at.z, at.size[1], at.size[0], at.i, at.result)
        return finish(system, lam, scaled, end, self.tol)

    def _advance(self, system: System, lam: jax.Array, at: _Iteration) -> _Iteration:
        # 2.
        u = at.q if system.precondition is None else system.precondition(at.q)
        alpha = over(at.zw, system.space.dots(((at.q, u),))[0])
        # 3.
        x, r = tree.axpy(alpha, at.p, at.x), tree.axpy(-alpha, at.q, at.r)
        z = r if system.precondition is None else tree.axpy(-alpha, u, at.z)
        # 4., 1.
        w = damped(system, lam)(z)
        new = self._looked(system, dataclasses.replace(at, x=x, r=r, z=z, w=w, i=at.i + 1))
        # 5.
        beta = over(new.zw, at.zw)
        return dataclasses.replace(new, p=tree.axpy(beta, at.p, z), q=tree.axpy(beta, at.q, w))

    def _looked(self, system: System, at: _Iteration) -> _Iteration:
        """With the curvature along z, and what follows from it and from the residual."""
        zw, zz, ww, rr, rz = system.space.dots(((at.z, at.w), (at.z, at.z), (at.w, at.w), (at.r, at.r), (at.r, at.z)))
        length, image = jnp.sqrt(zz), jnp.sqrt(ww)
        largest = jnp.maximum(at.largest, over(image, length))
        result = verdict(over(zw, zz), over(image, length), largest)
        result = jnp.where(is_bad(rr, rz), code(Result.BAD_PRECONDITIONER), result)
        result = jnp.where(rr <= self.tol**2, code(Result.CONVERGED), result)
        result = jnp.where(jnp.isfinite(rr), result, code(Result.NON_FINITE))
        return dataclasses.replace(at, zw=zw, size=(length, image), largest=largest, result=result)
