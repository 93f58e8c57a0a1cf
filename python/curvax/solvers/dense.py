"""Direct solution of a small dense system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Choice, Implementation, Request, select
from curvax.kernels.batched_cholesky_solve import BATCHED_CHOLESKY_SOLVE, batched_cholesky_solve
from curvax.solvers.base import Lane, Result, Solution, Solver, System, code
from curvax.tree import PyTree


def _assemble(system: System, like: PyTree) -> jax.Array:
    """C as a dense matrix, column by column from products."""
    flat, unravel = tree.ravel(like)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    columns = jax.vmap(lambda e: tree.ravel(system.product(unravel(e)))[0])(basis)
    return (columns + columns.T) * jnp.asarray(0.5, flat.dtype)


@dataclasses.dataclass(frozen=True)
class Cholesky(Solver):
    """Cholesky factorisation of C + lam I, with one step of iterative refinement.

    Where the factorisation fails, or its pivots say that the matrix is singular to rounding, the eigenvalue
    decomposition takes over: eigenvalues below rounding are left out (the minimum-norm solution, SINGULAR) and negative
    ones enter by their magnitude (a descent direction, INDEFINITE; Dauphin et al. 2014).

    Memory is the square of the system's size, time its cube: for small parameter counts, or the row lane.
    """

    @property
    def name(self) -> str:
        return "Cholesky"

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def products(self) -> int:
        return 0

    def init(self, like: PyTree) -> tuple[()]:
        return ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = system.matrix() if system.matrix is not None else _assemble(system, rhs)
        value, result, residual = solve_dense(c.astype(b.dtype), b, lam, system.factorise)
        return Solution(unravel(value), result, jnp.zeros((), jnp.int32), residual, ())


_Solved: TypeAlias = tuple[jax.Array, jax.Array, jax.Array]


def solve_dense(
    c: jax.Array, b: jax.Array, lam: jax.Array, implementation: Implementation | Choice | None = None
) -> _Solved:
    """Solves (c + lam I) x = b for symmetric c, by Cholesky where it succeeds and by eigenvalues where it does not.

    Args:
      c: (n, n).
      b: (n,) or (n, k).
      lam: added to the diagonal.
      implementation: of the op `batched_cholesky_solve`; `None` for the best supported one, and the reference is
        `jnp.linalg.cholesky`. The eigenvalues are JAX's in any case.

    Returns:
      (x, result code, |b - (c + lam I) x| / |b|); x and the residual are NaN where c or b are not finite.
    """
    choice = select(BATCHED_CHOLESKY_SOLVE, implementation, Request.of(c, b))
    by_op = choice.implementation != "reference"
    branch, solved = _cholesky_by_op(c, b, lam, choice) if by_op else _cholesky(c, b, lam)

    def by_eigenvalues() -> _Solved:
        x, result = _solve_by_eigenvalues(_shifted(c, lam), b)
        return x, result, _residual(c, b, x, lam)

    def not_finite() -> _Solved:
        return jnp.full_like(b, jnp.nan), code(Result.NON_FINITE), jnp.full((), jnp.nan, b.dtype)

    return jax.lax.switch(branch, [solved, by_eigenvalues, not_finite])


def _shifted(c: jax.Array, lam: jax.Array) -> jax.Array:
    return c + lam.astype(c.dtype) * jnp.eye(c.shape[0], dtype=c.dtype)


def _rounding(c: jax.Array) -> jax.Array:
    return jnp.asarray(c.shape[0] * jnp.finfo(c.dtype).eps, c.dtype)


def _cholesky(c: jax.Array, b: jax.Array, lam: jax.Array) -> tuple[jax.Array, Callable[[], _Solved]]:
    """The branch to take, 0 if the factorisation succeeded, and the solution then."""
    a = _shifted(c, lam)
    factor = jnp.linalg.cholesky(a)
    pivots = jnp.diagonal(factor)
    # The squared pivot is what remains of a diagonal entry; at rounding level of that entry nothing of it is known.
    sound = jnp.all(jnp.isfinite(pivots)) & jnp.all(pivots**2 > _rounding(c) * jnp.diagonal(a))
    finite = jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b))

    def solved() -> _Solved:
        x = jax.scipy.linalg.cho_solve((factor, True), b)
        rest = b - jnp.matmul(a, x, precision=jax.lax.Precision.HIGHEST)
        x = x + jax.scipy.linalg.cho_solve((factor, True), rest)
        return x, code(Result.CONVERGED), _residual(c, b, x, lam)

    return jnp.where(finite, jnp.where(sound, 0, 1), 2), solved


def _cholesky_by_op(
    c: jax.Array, b: jax.Array, lam: jax.Array, choice: Choice
) -> tuple[jax.Array, Callable[[], _Solved]]:
    """The same by an implementation of the op, which refines, and judges pivots, in the same way."""
    found = batched_cholesky_solve(c, b.T, damping=lam, implementation=choice)
    sound = jnp.all(found.result == int(Result.CONVERGED))
    finite = jnp.all(found.result != int(Result.NON_FINITE))

    def solved() -> _Solved:
        x = found.value.T
        return x, code(Result.CONVERGED), found.residual if b.ndim == 1 else _residual(c, b, x, lam)

    return jnp.where(finite, jnp.where(sound, 0, 1), 2), solved


def _solve_by_eigenvalues(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = jnp.linalg.eigh(a)
    floor = _rounding(a) * jnp.max(jnp.abs(values))
    kept = jnp.abs(values) > floor
    inverse = jnp.where(kept, 1 / jnp.where(kept, jnp.abs(values), jnp.ones_like(values)), jnp.zeros_like(values))
    x = jnp.einsum("ij,j,kj,k...->i...", vectors, inverse, vectors, b, precision=jax.lax.Precision.HIGHEST)
    result = jnp.where(jnp.any(values < -floor), code(Result.INDEFINITE), code(Result.SINGULAR))
    return x, jnp.where(jnp.all(kept & (values > 0)), code(Result.CONVERGED), result)


def _residual(c: jax.Array, b: jax.Array, x: jax.Array, lam: jax.Array) -> jax.Array:
    rest = b - jnp.matmul(c, x, precision=jax.lax.Precision.HIGHEST) - lam.astype(x.dtype) * x
    return tree.relative_norm(rest, b)
