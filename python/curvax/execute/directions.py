"""The direction s of (C + lam I) s = g, one function per lane."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import JacobianRows, Linearization, OutputCurvature
from curvax.kernels import Choice
from curvax.kernels.batched_cholesky_solve import BATCHED_CHOLESKY_SOLVE
from curvax.kernels.dense_linalg import QR
from curvax.kernels.gram_accumulate import GRAM_ACCUMULATE
from curvax.loops import for_loop_body
from curvax.solvers import (
    CG,
    GeodesicAcceleration,
    Lane,
    LeastSquares,
    LeastSquaresSolver,
    RowSpace,
    Solution,
    Solver,
    Space,
    System,
    TreeSpace,
)
from curvax.solvers.base import audited, relative_residual
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Task:
    """One linear system, as the step poses it.

    Attributes:
      at: the linearization that offers the curvature.
      gradient: g.
      own_gradient: g is the gradient of `at`'s own batch, so that it lies in the range of J^T.
      lam: damping, or several, (k,), for a solver of several; then the solution's fields have that axis in front.
      precondition: v -> P^-1 v, or `None`.
      space: vector arithmetic of parameter space.
      raveled: solve on one raveled vector in place of the tree.
      radius: bound on |s|, of a damping that has one.
      choices: implementation of each op, by name; an op that is missing takes the best supported one.
      acceleration: the second-order correction of the direction, or `None`.
    """

    at: Linearization
    gradient: PyTree
    own_gradient: bool
    lam: jax.Array
    precondition: Callable[[PyTree], PyTree] | None
    space: TreeSpace
    raveled: bool = False
    radius: jax.Array | None = None
    choices: Mapping[str, Choice] = dataclasses.field(default_factory=dict)
    acceleration: GeodesicAcceleration | None = None

    def accelerated(self, solution: Solution, again: Callable[[jax.Array], PyTree]) -> Solution:
        """The solution with its second-order correction, if there is to be one; residual and state are those without.

        Args:
          again: u -> (C + lam I)^-1 J^T Q u.
        """
        rows = self.at.rows
        if self.acceleration is None or rows is None:
            return solution
        if rows.second is None:
            raise ValueError(
                "geodesic acceleration differentiates the model forward twice, and this one holds a custom_vjp: drop "
                "acceleration=, or define the function by jax.custom_jvp."
            )
        value, ratio = self.acceleration.apply(solution.value, rows.second, again)
        return dataclasses.replace(solution, value=value, acceleration=ratio)


def solve(lane: Lane, solver: Solver, task: Task, state: Any) -> Solution:
    """Solves in the plan's lane. Whatever a solver says of its solution must be borne out by the residual.

    Of several solutions nobody has looked at the residuals: `with_residual` does of the one that is taken.
    """
    if task.lam.ndim:
        return _solve_several(solver, task, state)
    if lane is Lane.ROW and isinstance(solver, RowSpace):
        return _solve_rows(solver, task, state)
    system = _parameter_system(task)
    if lane is Lane.DIAGONAL:
        return solver.solve(system, task.gradient, state, task.lam)
    if task.raveled:
        solution = _solve_raveled(solver, system, task, state)
    elif task.acceleration is not None and solver.takes_matrix:
        repeat = solver.repeated(system, task.gradient, task.lam)
        return audited(
            task.accelerated(repeat(task.gradient), lambda u: repeat(_pulled(task, u)).value), solver.tolerance
        )
    else:
        solution = solver.solve(system, task.gradient, state, task.lam)

    def again(u: jax.Array) -> PyTree:
        return solver.solve(system, _pulled(task, u), solver.init(task.gradient), task.lam).value

    return audited(task.accelerated(solution, again), solver.tolerance)


def _pulled(task: Task, u: jax.Array) -> PyTree:
    """J^T Q u."""
    rows = task.at.rows
    if rows is None:
        raise AssertionError("acceleration linearizes with rows.")
    return rows.vjp(rows.output.product(u))


def _solve_several(solver: Solver, task: Task, state: Any) -> Solution:
    if not isinstance(solver, RowSpace):
        several = solver.solve_several(_parameter_system(task), task.gradient, task.lam)
    else:
        rows = _rows_of(task)
        t = rows.output.gradient_in_rows() if task.own_gradient else None
        several = _solve_several_rows(solver, rows, task, t)
    return dataclasses.replace(several, state=state)


def _solve_several_rows(solver: RowSpace, rows: JacobianRows, task: Task, t: jax.Array | None) -> Solution:
    inner = solver.solver
    if isinstance(inner, LeastSquaresSolver):
        problem, gradient = _least_squares(rows, task), task.gradient
        if t is None:
            return jax.vmap(lambda lam: inner.least_squares(problem, None, gradient, lam))(task.lam)
        t = t.astype(tree.scalar_dtype(gradient)).reshape(-1)
        return inner.several_least_squares(problem, t, gradient, task.lam)
    if t is None:
        raise ValueError(
            "several lam in row space need the exact gradient of their own batch: take QR(), or Cholesky() or "
            "MultiShiftCG() in parameter space."
        )
    t = t.astype(tree.scalar_dtype(task.gradient))
    several = inner.solve_several(_row_system(solver, rows, task), t, task.lam)
    return dataclasses.replace(several, value=jax.vmap(lambda z: rows.vjp(rows.output.factor(z)))(several.value))


def with_residual(solver: Solver, task: Task, solution: Solution, root: PyTree | None) -> Solution:
    """The solution with its residual |g - (C + lam D) s| / |g| at the lam of the task, and a result that agrees."""
    if isinstance(solver, RowSpace) and isinstance(solver.solver, LeastSquaresSolver):
        return solution  # judged where A was at hand
    s, product = solution.value, task.at.product
    if product is None:
        raise AssertionError("a lane that solves a system linearizes with products.")
    metric = s if root is None else jax.tree.map(lambda x, d: x * jnp.square(d), s, root)
    rest = jax.tree.map(jnp.subtract, task.gradient, tree.axpy(task.lam, metric, product(s)))
    residual = tree.relative_norm(rest, task.gradient)
    return audited(dataclasses.replace(solution, residual=residual), solver.tolerance)


def over(root: PyTree | None, v: PyTree) -> PyTree:
    """D^(-1/2) v."""
    return v if root is None else jax.tree.map(jnp.divide, v, root)


def solve_scaled(root: PyTree, solve: Callable[[Task], Solution], task: Task) -> Solution:
    """(C + lam D) s = g in the coordinates D^(1/2) s (`curvax.damping.scaling`); the solver's state stays in these."""
    inverse = jax.tree.map(lambda d: 1 / d, root)
    product, precondition, rows = task.at.product, task.precondition, task.at.rows

    def both_sides(function: Callable[[PyTree], PyTree], by: PyTree) -> Callable[[PyTree], PyTree]:
        return lambda v: jax.tree.map(jnp.multiply, by, function(jax.tree.map(jnp.multiply, by, v)))

    at = dataclasses.replace(
        task.at,
        product=None if product is None else both_sides(product, inverse),
        quadratic=None,
        rows=None if rows is None else _scaled(rows, inverse),
    )
    precondition = None if precondition is None else both_sides(precondition, root)
    gradient = jax.tree.map(jnp.multiply, inverse, task.gradient)
    solution = solve(dataclasses.replace(task, at=at, gradient=gradient, precondition=precondition))
    return dataclasses.replace(solution, value=jax.tree.map(jnp.multiply, inverse, solution.value))


def _scaled(rows: JacobianRows, by: PyTree) -> JacobianRows:
    """Rows of the outputs as a function of parameters over `by`."""
    second = rows.second
    return dataclasses.replace(
        rows.scaled(by),
        second=None if second is None else lambda v: second(jax.tree.map(jnp.multiply, by, v)),
    )


def _parameter_system(task: Task) -> System:
    def no_product(v: PyTree) -> PyTree:
        raise ValueError("the diagonal lane has no curvature products.")

    product = for_loop_body(task.at.product or no_product)
    factorize = task.choices.get(BATCHED_CHOLESKY_SOLVE.name)
    return System(product, task.space, task.precondition, factorize=factorize, radius=task.radius)


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


def _rows_of(task: Task) -> JacobianRows:
    if task.at.rows is None:
        raise AssertionError("the row lane linearizes with rows.")
    return task.at.rows


def _row_system(solver: RowSpace, rows: JacobianRows, task: Task) -> System:
    """The system of G = S^T J J^T S, whose matrix is made for solvers that take it."""

    def product(w: jax.Array) -> jax.Array:
        return rows.output.factor_transpose(rows.jvp(rows.vjp(rows.output.factor(w))))

    factorize = task.choices.get(BATCHED_CHOLESKY_SOLVE.name)
    if not solver.solver.takes_matrix:
        return System(for_loop_body(product), factorize=factorize)
    gram = rows.gram(solver.max_bytes, task.choices.get(GRAM_ACCUMULATE.name))
    return System(product, matrix=lambda: gram, factorize=factorize)


def _solve_rows(solver: RowSpace, task: Task, state: PyTree) -> Solution:
    rows = _rows_of(task)
    if isinstance(solver.solver, LeastSquaresSolver):
        inner, solution = solver.solver, _row_least_squares(solver, solver.solver, rows, task, state)
        solution = dataclasses.replace(solution, state=solution.value if solver.keeps_direction else ())

        def fitted(u: jax.Array) -> PyTree:
            t = rows.output.factor_transpose(u).astype(tree.scalar_dtype(task.gradient)).reshape(-1)
            return inner.least_squares(_least_squares(rows, task), t, _pulled(task, u), task.lam).value

        return task.accelerated(solution, fitted)
    if isinstance(solver.solver, CG):
        solution, again = _row_iteration(solver, solver.solver, rows, task, state)
    else:
        solution, again = _row_matrix(solver, rows, task, state)
    residual = relative_residual(System(rows.product), task.lam, _right_hand_side(solver, task, state), solution.value)
    state = solution.value if solver.keeps_direction else solution.state
    solution = audited(dataclasses.replace(solution, residual=residual, state=state), solver.tolerance)
    return task.accelerated(solution, again)


_Again: TypeAlias = Callable[[jax.Array], PyTree]
"""u -> (C + lam I)^-1 J^T Q u, by what solved for the gradient."""


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


def _row_matrix(solver: RowSpace, rows: JacobianRows, task: Task, state: PyTree) -> tuple[Solution, _Again]:
    """Solves with G = S^T J J^T S.

    If the gradient is J^T S t, then s = J^T S (G + lam I)^-1 t. Any other right-hand side goes through Woodbury's
    identity, s = (g - J^T S (G + lam I)^-1 S^T J g) / lam, refined once since it subtracts like from like.
    """
    shift = _shift(solver, state)
    t = rows.output.gradient_in_rows() if task.own_gradient else None
    like = jax.eval_shape(rows.output.factor_transpose, jax.eval_shape(rows.jvp, task.gradient))
    system = _row_system(solver, rows, task)
    own_state, repeat = () if solver.keeps_direction else state, None
    if task.acceleration is not None and solver.solver.takes_matrix:
        repeat = solver.solver.repeated(system, like, task.lam)

    def solve_rows(rhs: jax.Array) -> Solution:
        return solver.solve(system, rhs, own_state, task.lam) if repeat is None else repeat(rhs)

    def again(u: jax.Array) -> PyTree:
        return rows.vjp(rows.output.factor(solve_rows(rows.output.factor_transpose(u).astype(like.dtype)).value))

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
    return dataclasses.replace(solution, value=value), again


def _least_squares(rows: JacobianRows, task: Task) -> LeastSquares:
    output, shape = rows.output, rows.output.row_shape
    return LeastSquares(
        multiply=lambda v: output.factor_transpose(rows.jvp(v)).reshape(-1),
        transpose=lambda w: rows.vjp(output.factor(w.reshape(shape))),
        rows=math.prod(shape),
        factorize=task.choices.get(QR.name),
    )


def _row_least_squares(
    solver: RowSpace, inner: LeastSquaresSolver, rows: JacobianRows, task: Task, state: PyTree
) -> Solution:
    """Solves min |A d - t|^2 + lam |d|^2 with A = S^T J, where d = s - mu s' and t has lost A mu s'."""
    problem, shift = _least_squares(rows, task), _shift(solver, state)
    t, gradient = rows.output.gradient_in_rows() if task.own_gradient else None, task.gradient
    t = None if t is None else t.astype(tree.scalar_dtype(gradient)).reshape(-1)
    if shift is not None:
        gradient = jax.tree.map(jnp.subtract, gradient, rows.product(shift))
        t = None if t is None else t - problem.multiply(shift)
    solution = inner.least_squares(problem, t, gradient, task.lam)
    return solution if shift is None else dataclasses.replace(solution, value=tree.add(shift, solution.value))


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


def _row_iteration(solver: RowSpace, cg: CG, rows: JacobianRows, task: Task, state: PyTree) -> tuple[Solution, _Again]:
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
    floored = dataclasses.replace(cg, tol=max(cg.tol, floor))
    solution = floored.iterate(system, rhs, start, task.lam)

    def again(u: jax.Array) -> PyTree:
        return rows.vjp(floored.iterate(system, pair(rows.output.product(u)), None, task.lam).value[0])

    # 4.
    correction = rows.vjp(solution.value[0])
    return dataclasses.replace(solution, value=correction if shift is None else tree.add(shift, correction)), again


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
