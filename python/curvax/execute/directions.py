"""The direction s of (C + lam I) s = g, one function per lane."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import JacobianRows, Linearization, OutputCurvature
from curvax.kernels import Choice, Implementation
from curvax.loops import for_loop_body
from curvax.solvers import CG, Lane, RowSpace, Solution, Solver, Space, System, TreeSpace
from curvax.solvers.base import audited, relative_residual
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Task:
    """One linear system, as the step poses it.

    Attributes:
      at: the linearization that offers the curvature.
      gradient: g.
      own_gradient: g is the gradient of `at`'s own batch, so that it lies in the range of J^T.
      lam: damping.
      precondition: v -> P^-1 v, or `None`.
      space: vector arithmetic of parameter space.
      raveled: solve on one raveled vector in place of the tree.
      gram: implementation of `gram_accumulate` in the row lane; `None` takes the best supported one.
      factorize: the same of `batched_cholesky_solve`, for solvers of a dense matrix.
      radius: bound on |s|, of a damping that has one.
    """

    at: Linearization
    gradient: PyTree
    own_gradient: bool
    lam: jax.Array
    precondition: Callable[[PyTree], PyTree] | None
    space: TreeSpace
    raveled: bool = False
    gram: Implementation | Choice | None = None
    factorize: Implementation | Choice | None = None
    radius: jax.Array | None = None


def solve(lane: Lane, solver: Solver, task: Task, state: Any) -> Solution:
    """Solves in the plan's lane. Whatever a solver says of its solution must be borne out by the residual."""
    if lane is Lane.ROW and isinstance(solver, RowSpace):
        return audited(_solve_rows(solver, task, state), solver.tolerance)
    system = _parameter_system(task)
    if lane is Lane.DIAGONAL:
        return solver.solve(system, task.gradient, state, task.lam)
    if task.raveled:
        return audited(_solve_raveled(solver, system, task, state), solver.tolerance)
    return audited(solver.solve(system, task.gradient, state, task.lam), solver.tolerance)


def _parameter_system(task: Task) -> System:
    def no_product(v: PyTree) -> PyTree:
        raise ValueError("the diagonal lane has no curvature products.")

    product = for_loop_body(task.at.product or no_product)
    return System(product, task.space, task.precondition, factorize=task.factorize, radius=task.radius)


def _solve_raveled(solver: Solver, system: System, task: Task, state: PyTree) -> Solution:
    """The same solve with every vector raveled; the solver's state stays a tree, whatever was chosen."""
    flat, unravel = tree.ravel(task.gradient)

    def through(function: Callable[[PyTree], PyTree]) -> Callable[[jax.Array], jax.Array]:
        return lambda v: tree.ravel(function(unravel(v)))[0]

    precondition = None if system.precondition is None else through(system.precondition)
    raveled = dataclasses.replace(system, product=through(system.product), precondition=precondition)
    warm = bool(jax.tree.leaves(state))
    solution = solver.solve(raveled, flat, tree.ravel(state)[0] if warm else state, task.lam)
    next_state = unravel(solution.state) if warm else solution.state
    return dataclasses.replace(solution, value=unravel(solution.value), state=next_state)


_Pair = tuple[jax.Array, jax.Array]


@dataclasses.dataclass(frozen=True)
class _PairSpace(Space):
    """Row vectors u, kept as pairs (u, K u) with K = J J^T, under the inner product <a, b> = a^T K b.

    In it Q K is symmetric, and since J^T u has the norm of u, conjugate gradients here make exactly the iterates of
    parameter space, J^T u_i = s_i, at one product with K per iteration.
    """

    def dots(self, pairs: tuple[tuple[PyTree, PyTree], ...]) -> tuple[jax.Array, ...]:
        return tuple(tree.vdot(a[0], b[1]) for a, b in pairs)

    def update(
        self, alpha: jax.Array, lam: jax.Array, x: PyTree, p: PyTree, r: PyTree, q: PyTree
    ) -> tuple[PyTree, PyTree, jax.Array]:
        x, r = tree.axpy(alpha, p, x), tree.axpy(-alpha, tree.axpy(lam, p, q), r)
        return x, r, self.dots(((r, r),))[0]

    def direction(self, beta: jax.Array, z: PyTree, p: PyTree) -> PyTree:
        return tree.axpy(beta, p, z)


def _solve_rows(solver: RowSpace, task: Task, state: PyTree) -> Solution:
    rows = task.at.rows
    if rows is None:
        raise AssertionError("the row lane linearizes with rows.")
    if isinstance(solver.solver, CG):
        solution = _row_iteration(solver, solver.solver, rows, task, state)
    else:
        solution = _row_matrix(solver, rows, task, state)
    residual = relative_residual(System(rows.product), task.lam, _right_hand_side(solver, task, state), solution.value)
    state = solution.value if solver.keeps_direction else ()
    return dataclasses.replace(solution, residual=residual, state=state)


def _right_hand_side(solver: RowSpace, task: Task, state: PyTree) -> PyTree:
    """g + lam mu s' (SPRING), or g."""
    if not solver.momentum:
        return task.gradient
    return tree.axpy(task.lam * solver.momentum, state, task.gradient)


def _shift(solver: RowSpace, state: PyTree) -> PyTree | None:
    """mu s', from which the system of the correction d = s - mu s' starts: (C + lam I) d = g - C mu s'."""
    if not solver.momentum:
        return None
    return tree.scale(jnp.asarray(solver.momentum, tree.scalar_dtype(state)), state)


def _row_matrix(solver: RowSpace, rows: JacobianRows, task: Task, state: PyTree) -> Solution:
    """Solves with G = S^T J J^T S.

    If the gradient is J^T S t, then s = J^T S (G + lam I)^-1 t. Any other right-hand side goes through Woodbury's
    identity, s = (g - J^T S (G + lam I)^-1 S^T J g) / lam, refined once since it subtracts like from like.
    """
    shift = _shift(solver, state)
    t = rows.output.gradient_in_rows() if task.own_gradient else None
    like = jax.eval_shape(rows.output.factor_transpose, jax.eval_shape(rows.jvp, task.gradient))

    def product(w: jax.Array) -> jax.Array:
        return rows.output.factor_transpose(rows.jvp(rows.vjp(rows.output.factor(w))))

    gram = rows.gram(solver.max_bytes, task.gram)
    system = System(product, matrix=lambda: gram, factorize=task.factorize)

    def solve_rows(rhs: jax.Array) -> Solution:
        return solver.solve(system, rhs, (), task.lam)

    if t is not None:
        rhs = t.astype(like.dtype)
        if shift is not None:
            rhs = rhs - rows.output.factor_transpose(rows.jvp(shift))
        solution = solve_rows(rhs)
        correction = rows.vjp(rows.output.factor(solution.value))
    else:
        rest = task.gradient
        if shift is not None:
            rest = jax.tree.map(jnp.subtract, rest, rows.product(shift))
        solution, correction = _woodbury(rows, solve_rows, rest, task.lam)
    value = correction if shift is None else tree.add(shift, correction)
    return dataclasses.replace(solution, value=value)


def _woodbury(
    rows: JacobianRows, solve_rows: Callable[[jax.Array], Solution], g: PyTree, lam: jax.Array
) -> tuple[Solution, PyTree]:
    def once(v: PyTree) -> tuple[Solution, PyTree]:
        solution = solve_rows(rows.output.factor_transpose(rows.jvp(v)))
        back = rows.vjp(rows.output.factor(solution.value))
        return solution, tree.scale(1 / lam, jax.tree.map(jnp.subtract, v, back))

    solution, first = once(g)
    rest = jax.tree.map(jnp.subtract, g, tree.axpy(lam, first, rows.product(first)))
    return solution, tree.add(first, once(rest)[1])


def _row_iteration(solver: RowSpace, cg: CG, rows: JacobianRows, task: Task, state: PyTree) -> Solution:
    if not task.own_gradient:
        raise ValueError(
            "row-space CG needs the gradient of its own batch: use RowSpace(Cholesky()) or parameter-space CG when "
            "gradient and curvature batch differ."
        )

    @for_loop_body
    def gram(u: jax.Array) -> jax.Array:
        return rows.jvp(rows.vjp(u))

    def product(pair: _Pair) -> _Pair:
        u = rows.output.product(pair[1])
        return u, gram(u)

    def pair(u: jax.Array) -> _Pair:
        return u, gram(u)

    system = System(product, _PairSpace())
    shift = _shift(solver, state)
    # 1. The numbers are those of `curvax/solvers/row_space.py`.
    r = _output_gradient(task)
    if shift is not None:
        r = r - rows.output.product(rows.jvp(shift))
    rhs = pair(r)
    # 2.
    start = None
    if cg.warm_start and shift is None:
        w = pair(r - rows.output.product(rows.jvp(state)))
        # Nothing to start from: a start along r would be an iteration without its share in the conjugate directions.
        start = tree.scale(
            (tree.max_abs(state) > 0).astype(rhs[0].dtype), _warm_start(system.space, rows.output, task.lam, w, rhs)
        )
    # 3. Vector and image under K drift apart at rounding level; a residual below that steers by noise.
    floor = 64 * float(jnp.finfo(rhs[0].dtype).eps)
    solution = dataclasses.replace(cg, tol=max(cg.tol, floor)).iterate(system, rhs, start, task.lam)
    # 4.
    correction = rows.vjp(solution.value[0])
    return dataclasses.replace(solution, value=correction if shift is None else tree.add(shift, correction))


def _output_gradient(task: Task) -> jax.Array:
    gradient = task.at.output_gradient
    if gradient is None:
        raise AssertionError("a linearization with rows and gradient has the gradient in output space.")
    return gradient


def _warm_start(space: Space, output: OutputCurvature, lam: jax.Array, w: _Pair, rhs: _Pair) -> PyTree:
    """The best start for (Q K + lam I) u = r within span{r, w}, w = r - Q J s' from the previous direction s'.

    If s' solved this very system, it is J^T u' with lam u' = w. On another batch the start is the least of the
    quadratic over the span, so never worse than zero. Since K r and K w are at hand, the energies
    <a, A b> = (K a).Q (K b) + lam a.(K b) take no further product with K.
    """

    def energy(a: _Pair, b: _Pair) -> jax.Array:
        return tree.vdot(a[1], output.product(b[1])) + lam.astype(b[0].dtype) * tree.vdot(a[0], b[1])

    def ratio(numerator: jax.Array, denominator: jax.Array, floor: jax.Array) -> jax.Array:
        usable = denominator > floor
        return jnp.where(usable, numerator / jnp.where(usable, denominator, jnp.ones_like(denominator)), 0 * numerator)

    rr, rw = space.dots(((rhs, rhs), (w, rhs)))
    e_rr, e_rw, e_ww = energy(rhs, rhs), energy(rhs, w), energy(w, w)
    # r made A-orthogonal to w; what is left of it at rounding level is dropped.
    overlap = ratio(e_rw, e_ww, jnp.zeros_like(rr))
    eps = jnp.asarray(64 * jnp.finfo(e_rr.dtype).eps, e_rr.dtype)
    along_r = ratio(rr - overlap * rw, e_rr - overlap * e_rw, eps * e_rr)
    along_w = ratio(rw, e_ww, jnp.zeros_like(rr)) - along_r * overlap
    return tree.axpy(along_r, rhs, tree.scale(along_w, w))
