"""Direct solution of a small dense system, definite or not, under a radius or not.

With eigenvalues l_i of C and the parts g_i of g along its eigenvectors, the solution is s_i = g_i / d_i:

    C + lam I is    d_i                  result
    definite        l_i + lam            CONVERGED, by a Cholesky factorization
    indefinite      |l_i| + lam          INDEFINITE: downhill along every eigenvector (Dauphin et al. 2014)
    singular        the same, where it   SINGULAR: what is zero to rounding is left out
                    is not rounding
    any, |s| > r    l_i + lam + t        BOUNDARY: |s| = r, the least of the quadratic in the ball (ball.py)

An example: C = diag(1, -2), lam = 1 and g = (2, 3) make s = (2 / 2, 3 / 3). C + lam I = diag(2, -1) itself would go up
along the second, and its magnitudes would take no notice of a larger lam until that is beyond 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels import Choice, Implementation, Op, Request, select
from curvax.kernels.batched_cholesky_solve import BATCHED_CHOLESKY_SOLVE, batched_cholesky_solve
from curvax.kernels.dense_linalg import Eigenpairs, cholesky, eigh, triangular_solve
from curvax.solvers.ball import least_in_ball
from curvax.solvers.base import Lane, Result, Solution, Solver, System, UnitVector, code
from curvax.tree import PyTree


def assemble(system: System, like: PyTree) -> jax.Array:
    """C as a dense matrix: the one at hand, or column by column from products."""
    if system.matrix is not None:
        return system.matrix()
    flat, unravel = tree.ravel(like)
    basis = jnp.eye(flat.size, dtype=flat.dtype)
    columns = jax.vmap(lambda e: tree.ravel(system.product(unravel(e)))[0])(basis)
    return (columns + columns.T) * jnp.asarray(0.5, flat.dtype)


class MatrixSolver(Solver):
    """A solver of a dense matrix, exact and without a state; its memory is the square of the system's size."""

    @property
    def exact(self) -> bool:
        return True

    @property
    def lane(self) -> Lane:
        return Lane.PARAMETER

    @property
    def products(self) -> int:
        return 0

    @property
    def takes_matrix(self) -> bool:
        return True

    def init(self, like: PyTree) -> tuple[()]:
        return ()


@dataclasses.dataclass(frozen=True)
class Cholesky(MatrixSolver):
    """Cholesky factorization of C + lam I, with one step of iterative refinement.

    Where the factorization fails, or its pivots say that the matrix is singular to rounding, the eigenvalue
    decomposition takes over: eigenvalues below rounding are left out (the minimum-norm solution, SINGULAR), and where
    one of C + lam I is negative, those of C enter by their magnitude (a descent direction, INDEFINITE; Dauphin et al.
    2014). A larger lam then makes the step shorter along every one of them, negative or not.

    Under a radius (`system.radius`, which a `damping.Radius` owns) it returns the least of the quadratic in that ball,
    negative curvature and a gradient of zero at a saddle included (Moré and Sorensen 1983; BOUNDARY).

    Memory is the square of the system's size, time its cube: for small parameter counts, or the row lane.
    """

    @property
    def name(self) -> str:
        return "Cholesky"

    @property
    def takes_radius(self) -> bool:
        return True

    @property
    def solves_several(self) -> bool:
        return True

    def kernels(self, like: PyTree, rows: Callable[[], int]) -> tuple[tuple[Op, Request], ...]:
        size, dtype = tree.size(like), tree.scalar_dtype(like)
        matrix, rhs = jax.ShapeDtypeStruct((size, size), dtype), jax.ShapeDtypeStruct((size,), dtype)
        return ((BATCHED_CHOLESKY_SOLVE, Request.of(matrix, rhs)),)

    def solve(self, system: System, rhs: PyTree, state: Any, lam: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = assemble(system, rhs)
        if system.radius is None:
            value, result, residual = solve_dense(c.astype(b.dtype), b, lam, system.factorize)
        else:
            value, result, residual = _solve_in_ball(c.astype(b.dtype), b, lam, system)
        return Solution(unravel(value), result, jnp.zeros((), jnp.int32), residual, ())

    def solve_several(self, system: System, rhs: PyTree, lams: jax.Array) -> Solution:
        b, unravel = tree.ravel(rhs)
        c = assemble(system, rhs).astype(b.dtype)

        def at(lam: jax.Array) -> Solution:
            value, result, residual = solve_dense(c, b, lam, system.factorize)
            return Solution(unravel(value), result, jnp.zeros((), jnp.int32), residual, ())

        # In turns: each has the whole machine, one factor is alive, and only a factorization that fails costs more.
        return jax.lax.map(at, lams)

    def repeated(self, system: System, like: PyTree, lam: jax.Array) -> Callable[[PyTree], Solution]:
        dtype = tree.scalar_dtype(like)
        c = assemble(system, like).astype(dtype)
        solve = factorized(c, lam, system.factorize)

        def again(rhs: PyTree) -> Solution:
            b, unravel = tree.ravel(rhs)
            value, result, residual = solve(b)
            return Solution(unravel(value), result, jnp.zeros((), jnp.int32), residual, ())

        return again


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
        return x, code(Result.CONVERGED), solution.residual if b.ndim == 1 else dense_residual(c, b, x, lam)

    def by_eigenvalues() -> _Solved:
        x, result = by_magnitude(_eigenpairs(c, choice), b, lam)
        return x, result, dense_residual(c, b, x, lam)

    return _switch(converged, finite, (solved, by_eigenvalues), b)


def _solve_in_ball(c: jax.Array, b: jax.Array, lam: jax.Array, system: System) -> _Solved:
    """The least of x.(c + lam I) x / 2 - b.x in the ball of the system's radius."""
    choice = select(BATCHED_CHOLESKY_SOLVE, system.factorize, Request.of(c, b))
    scaled = UnitVector.of(system.space, b)
    unit, radius = scaled.unit, scaled.divide_length(jnp.asarray(system.radius))
    plain = batched_cholesky_solve(c, unit, damping=lam, implementation=choice)
    inside = (plain.result == int(Result.CONVERGED)) & (jnp.linalg.norm(plain.value) <= radius)
    finite = (plain.result != int(Result.NON_FINITE)) & jnp.isfinite(scaled.size)
    # A right-hand side of zero has no size: steps from a saddle are in units of the radius.
    size = jnp.where(scaled.size > 0, scaled.size, jnp.ones_like(scaled.size)) * scaled.scale

    def solved() -> _Solved:
        return size * plain.value, code(Result.CONVERGED), plain.residual

    def by_eigenvalues() -> _Solved:
        pairs = _eigenpairs(c, choice)
        along = jnp.matmul(unit, pairs.vectors, precision=jax.lax.Precision.HIGHEST)
        least, at_boundary = least_in_ball(pairs.values + lam.astype(c.dtype), along, radius)
        x = jnp.matmul(pairs.vectors, least, precision=jax.lax.Precision.HIGHEST)
        result = jnp.where(at_boundary, code(Result.BOUNDARY), code(Result.SINGULAR))
        return size * x, result, dense_residual(c, unit, x, lam)

    return _switch(inside, finite, (solved, by_eigenvalues), b)


def _switch(first: jax.Array, finite: jax.Array, ways: tuple[Callable[[], _Solved], ...], b: jax.Array) -> _Solved:
    """The first way or the second; NaN where the system is not finite."""

    def not_finite() -> _Solved:
        return jnp.full_like(b, jnp.nan), code(Result.NON_FINITE), jnp.full((), jnp.nan, b.dtype)

    return jax.lax.switch(jnp.where(finite, jnp.where(first, 0, 1), 2), [*ways, not_finite])


def factorized(
    c: jax.Array, lam: jax.Array, implementation: Implementation | Choice | None = None
) -> Callable[[jax.Array], _Solved]:
    """b -> what `solve_dense` returns of one right-hand side, for several of one matrix: it is factorized once.

    Args:
      c, lam: as for `solve_dense`.
      implementation: of `batched_cholesky_solve`; a reference there is a reference here.
    """
    name = "reference" if getattr(implementation, "implementation", implementation) == "reference" else None
    factor = cholesky(c + lam.astype(c.dtype) * jnp.eye(c.shape[0], dtype=c.dtype), implementation=name)

    def substitute(b: jax.Array) -> jax.Array:
        inner = triangular_solve(factor.lower, b[:, None], implementation=name)
        return triangular_solve(factor.lower, inner, transpose=True, implementation=name)[:, 0]

    def solve(b: jax.Array) -> _Solved:
        first = substitute(b)
        rest = b - jnp.matmul(c, first, precision=jax.lax.Precision.HIGHEST) - lam.astype(c.dtype) * first
        x = first + substitute(rest)  # one step of refinement
        residual = dense_residual(c, b, x, lam)
        # Pivots at rounding level leave a residual: then the eigenvalues decide, as they do without a factor.
        good = (factor.result == int(Result.CONVERGED)) & (residual <= jnp.finfo(c.dtype).eps ** 0.5)
        return jax.lax.cond(
            good, lambda: (x, code(Result.CONVERGED), residual), lambda: solve_dense(c, b, lam, implementation)
        )

    return solve


def _eigenpairs(c: jax.Array, choice: Choice) -> Eigenpairs:
    return eigh(c, implementation="reference" if choice.implementation == "reference" else None)


def by_magnitude(pairs: Eigenpairs, b: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(solution, result): with eigenvalues l + lam if all are positive, otherwise with |l| + lam."""
    mu = lam.astype(pairs.values.dtype)
    values = pairs.values + mu
    floor = rounding_floor(values)
    definite = jnp.all(values > floor)
    magnitudes = jnp.where(definite, values, jnp.abs(pairs.values) + mu)
    significant = magnitudes > floor
    inverse = jnp.where(significant, 1 / jnp.where(significant, magnitudes, jnp.ones_like(values)), 0 * values)
    result = jnp.where(jnp.any(values < -floor), code(Result.INDEFINITE), code(Result.SINGULAR))
    return apply_function(pairs, inverse, b), jnp.where(definite, code(Result.CONVERGED), result)


def rounding_floor(values: jax.Array) -> jax.Array:
    """Magnitude up to which eigenvalues may be rounding of the largest."""
    rounding = jnp.asarray(values.size * jnp.finfo(values.dtype).eps, values.dtype)
    return rounding * jnp.max(jnp.abs(values))


def apply_function(pairs: Eigenpairs, values: jax.Array, b: jax.Array) -> jax.Array:
    """V diag(values) V^T b for b (n,) or (n, k)."""
    v = pairs.vectors
    return jnp.einsum("ij,j,kj,k...->i...", v, values, v, b, precision=jax.lax.Precision.HIGHEST)


def dense_residual(c: jax.Array, b: jax.Array, x: jax.Array, lam: jax.Array) -> jax.Array:
    """|b - (c + lam I) x| / |b|."""
    rest = b - jnp.matmul(c, x, precision=jax.lax.Precision.HIGHEST) - lam.astype(x.dtype) * x
    return tree.relative_norm(rest, b)
