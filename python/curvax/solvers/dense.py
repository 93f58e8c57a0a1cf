"""Direct solution of a small dense system."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
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
        value, result = solve_dense(c.astype(b.dtype), b, lam)
        residual = _residual(c.astype(b.dtype), b, value, lam)
        return Solution(unravel(value), result, jnp.zeros((), jnp.int32), residual, ())


def solve_dense(c: jax.Array, b: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Solves (c + lam I) x = b for symmetric c; b is (n,) or (n, k). Returns (x, result code)."""
    a = c + lam.astype(c.dtype) * jnp.eye(c.shape[0], dtype=c.dtype)
    factor = jnp.linalg.cholesky(a)
    pivots = jnp.diagonal(factor)
    eps = jnp.asarray(c.shape[0] * jnp.finfo(c.dtype).eps, c.dtype)
    # The squared pivot is what remains of a diagonal entry; at rounding level of that entry nothing of it is known.
    sound = jnp.all(jnp.isfinite(pivots)) & jnp.all(pivots**2 > eps * jnp.diagonal(a))
    finite = jnp.all(jnp.isfinite(a)) & jnp.all(jnp.isfinite(b))

    def by_cholesky() -> tuple[jax.Array, jax.Array]:
        x = jax.scipy.linalg.cho_solve((factor, True), b)
        rest = b - jnp.matmul(a, x, precision=jax.lax.Precision.HIGHEST)
        return x + jax.scipy.linalg.cho_solve((factor, True), rest), code(Result.CONVERGED)

    def by_eigenvalues() -> tuple[jax.Array, jax.Array]:
        values, vectors = jnp.linalg.eigh(a)
        floor = eps * jnp.max(jnp.abs(values))
        kept = jnp.abs(values) > floor
        inverse = jnp.where(kept, 1 / jnp.where(kept, jnp.abs(values), jnp.ones_like(values)), jnp.zeros_like(values))
        x = jnp.einsum("ij,j,kj,k...->i...", vectors, inverse, vectors, b, precision=jax.lax.Precision.HIGHEST)
        result = jnp.where(jnp.any(values < -floor), code(Result.INDEFINITE), code(Result.SINGULAR))
        return x, jnp.where(jnp.all(kept & (values > 0)), code(Result.CONVERGED), result)

    def not_finite() -> tuple[jax.Array, jax.Array]:
        return jnp.full_like(b, jnp.nan), code(Result.NON_FINITE)

    branch = jnp.where(finite, jnp.where(sound, 0, 1), 2)
    return jax.lax.switch(branch, [by_cholesky, by_eigenvalues, not_finite])


def _residual(c: jax.Array, b: jax.Array, x: jax.Array, lam: jax.Array) -> jax.Array:
    rest = b - jnp.matmul(c, x, precision=jax.lax.Precision.HIGHEST) - lam.astype(x.dtype) * x
    size = tree.norm(b)
    return jnp.where(size > 0, tree.norm(rest) / jnp.where(size > 0, size, jnp.ones_like(size)), jnp.zeros_like(size))
