"""Direct solution of a small dense system."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Choice, Implementation, Op, Request, select
from curvax.kernels.batched_cholesky_solve import BATCHED_CHOLESKY_SOLVE, batched_cholesky_solve
from curvax.kernels.dense_linalg import Eigenpairs, eigh
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
    """Cholesky factorization of C + lam I, with one step of iterative refinement.

    Where the factorization fails, or its pivots say that the matrix is singular to rounding, the eigenvalue
    decomposition takes over: eigenvalues below rounding are left out (the minimum-norm solution, SINGULAR) and negative
    ones enter by their magnitude (a descent direction, INDEFINITE; Dauphin et al. 2014).

    Memory is the square of the system's size, time its cube: for small parameter counts, or the row lane.
    """

    @property
    def exact(self) -> bool:
        return True

    @property
    def name(self) -> str:
        return "Cholesky"

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def products(self) -> int:
        return 0

    @property
    def takes_matrix(self) -> bool:
        return True

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        size, dtype = tree.size(like), tree.scalar_dtype(like)
        matrix, rhs = jax.ShapeDtypeStruct((size, size), dtype), jax.ShapeDtypeStruct((size,), dtype)
        return ((BATCHED_CHOLESKY_SOLVE, Request.of(matrix, rhs)),)

    def init(self, like: PyTree) -> tuple[()]:
        return ()

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = system.matrix() if system.matrix is not None else _assemble(system, rhs)
        value, result, residual = solve_dense(c.astype(b.dtype), b, lam, system.factorize)
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
      implementation: of the op `batched_cholesky_solve`; `None` for the best supported one. With the reference the
        eigenvalues are the reference's too.

    Returns:
      (x, result code, |b - (c + lam I) x| / |b|); x and the residual are NaN where c or b are not finite.
    """
    choice = select(BATCHED_CHOLESKY_SOLVE, implementation, Request.of(c, b))
    solution = batched_cholesky_solve(c, b.T, damping=lam, implementation=choice)
    converged = jnp.all(solution.result == int(Result.CONVERGED))
    finite = jnp.all(solution.result != int(Result.NON_FINITE))

    def solved() -> _Solved:
        x = solution.value.T
        return x, code(Result.CONVERGED), solution.residual if b.ndim == 1 else _residual(c, b, x, lam)

    def by_eigenvalues() -> _Solved:
        a = c + lam.astype(c.dtype) * jnp.eye(c.shape[0], dtype=c.dtype)
        pairs = eigh(a, implementation="reference" if choice.implementation == "reference" else None)
        x, result = _solve_by_eigenvalues(pairs, b)
        return x, result, _residual(c, b, x, lam)

    def not_finite() -> _Solved:
        return jnp.full_like(b, jnp.nan), code(Result.NON_FINITE), jnp.full((), jnp.nan, b.dtype)

    branch = jnp.where(finite, jnp.where(converged, 0, 1), 2)
    return jax.lax.switch(branch, [solved, by_eigenvalues, not_finite])


def _solve_by_eigenvalues(pairs: Eigenpairs, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, vectors = pairs.values, pairs.vectors
    rounding = jnp.asarray(values.size * jnp.finfo(values.dtype).eps, values.dtype)
    floor = rounding * jnp.max(jnp.abs(values))
    significant = jnp.abs(values) > floor
    inverse = jnp.where(
        significant, 1 / jnp.where(significant, jnp.abs(values), jnp.ones_like(values)), jnp.zeros_like(values)
    )
    x = jnp.einsum("ij,j,kj,k...->i...", vectors, inverse, vectors, b, precision=jax.lax.Precision.HIGHEST)
    result = jnp.where(jnp.any(values < -floor), code(Result.INDEFINITE), code(Result.SINGULAR))
    return x, jnp.where(jnp.all(significant & (values > 0)), code(Result.CONVERGED), result)


def _residual(c: jax.Array, b: jax.Array, x: jax.Array, lam: jax.Array) -> jax.Array:
    rest = b - jnp.matmul(c, x, precision=jax.lax.Precision.HIGHEST) - lam.astype(x.dtype) * x
    return tree.relative_norm(rest, b)
