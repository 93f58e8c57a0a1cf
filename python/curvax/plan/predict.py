"""What a solver is predicted to cost on a batch, from shapes alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Curvature, Evaluation, Microbatched, Needs
from curvax.kernels import gram_accumulate
from curvax.kernels._dispatch import Choice
from curvax.plan import cost as costing
from curvax.plan.assembly import Assembly
from curvax.plan.cost import Cost
from curvax.plan.machine import Machine
from curvax.plan.plan import Candidate
from curvax.preconditioners import BlockPreconditioner
from curvax.solvers import CG, Automatic, Cholesky, Lane, RowSpace, Solver
from curvax.tree import PyTree

# FLOPs are counted in plain JAX, whatever runs.
_COUNTED = Choice(gram_accumulate.GRAM_ACCUMULATE.name, "reference", "counted for the plan, not run")
# Passes over the vectors of one CG iteration: three inner products read two, the update reads four and writes two, its
# norm reads one, the direction reads two and writes one, less what is fused.
_VECTOR_PASSES, _VECTOR_FLOPS = 7.0, 12.0
# The pair space keeps an image beside each vector, and its updates are not fused.
_PAIR_PASSES, _PAIR_FLOPS = 25.0, 20.0
# Passes of every step over the parameters: norms, the test for finite values, transform, update, what is kept or not.
_STEP_PASSES = 15.0
# Operations of an iteration: per leaf, and (scalars, tests) in all.
_LEAF_LAUNCHES, _ITERATION_LAUNCHES = 4.0, 15.0
# A dense solve beside its factorization: damping, mirroring, the check for finite numbers, refinement and residual.
_DENSE_PASSES, _DENSE_LAUNCHES = 10.0, 100.0
# The row lane's own residual is a product, J^T u of the answer half of one.
_ROW_LANE_PRODUCTS = 1.5
# CG in row space begins with the image of the right-hand side, one product, and tests a warm start with one and a half.
_PAIR_PRODUCTS, _PAIR_WARM_PRODUCTS = 1.0, 1.5


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Counted work of the pieces that every candidate is made of.

    Attributes:
      parameters, leaves, itemsize: of the trainable parameters; bytes per number of upcast vectors.
      rows: unknowns of the row system; 0 without rows.
      linearize, gradient, product, gram: forward pass; forward and reverse; a curvature product; the rows' Gram matrix.
      residuals: bytes that reverse mode keeps.
      factors: a refresh of Kronecker factors; nothing for other preconditioners.
    """

    parameters: int
    leaves: int
    itemsize: int
    rows: int
    linearize: Cost
    gradient: Cost
    gram: Cost
    product: Cost
    residuals: int
    factors: Cost

    @staticmethod
    def of(assembly: Assembly, params: PyTree, evaluation: Evaluation) -> Shapes:
        """Counted on traces of the assembly's curvature."""
        curvature = assembly.curvature
        inner = curvature.inner if isinstance(curvature, Microbatched) else curvature
        shapes = jax.eval_shape(lambda: params)
        upcast = jax.eval_shape(tree.upcast, shapes)

        def linearize(p: PyTree, e: Evaluation) -> jax.Array:
            return curvature.linearize(p, e, Needs()).loss

        def gradient(p: PyTree, e: Evaluation) -> PyTree:
            return curvature.linearize(p, e, Needs(gradient=True)).gradient

        def product(p: PyTree, e: Evaluation, v: PyTree) -> PyTree:
            found = curvature.linearize(p, e, Needs(product=True)).product
            return found(v) if found is not None else v

        forward, whole = (
            costing.trace(linearize, shapes, evaluation),
            costing.trace(product, shapes, evaluation, upcast),
        )
        rows = count_rows(curvature, shapes, evaluation)
        solvers = assembly.solver.candidates if isinstance(assembly.solver, Automatic) else (assembly.solver,)
        rowwise = any(isinstance(s, RowSpace) and isinstance(s.solver, Cholesky) for s in solvers)
        return Shapes(
            parameters=tree.size(shapes),
            leaves=len(jax.tree.leaves(shapes)),
            itemsize=jnp.dtype(tree.scalar_dtype(shapes)).itemsize,
            rows=rows,
            linearize=forward,
            gradient=costing.trace(gradient, shapes, evaluation),
            gram=_gram_cost(curvature, shapes, evaluation) if rows and rowwise else Cost(),
            product=whole - forward if not isinstance(curvature, Microbatched) else whole,
            residuals=costing.residual_bytes(inner.forward, shapes, evaluation),
            factors=_factor_cost(assembly, shapes, evaluation),
        )

    @property
    def vector(self) -> int:
        """Bytes of one upcast parameter vector."""
        return self.parameters * self.itemsize

    @property
    def around_product(self) -> int:
        """Bytes that every product touches: residuals, parameters, its argument and its result."""
        return self.residuals + 3 * self.vector


def candidate(index: int, solver: Solver, shapes: Shapes, machine: Machine) -> Candidate:
    """What a step with this solver is predicted to take."""
    cost, reason = solve_cost(solver, shapes)
    gradient = dataclasses.replace(shapes.gradient, memory=float(shapes.around_product))
    update = Cost(
        bytes=_STEP_PASSES * shapes.vector, memory=4.0 * shapes.vector, launches=_LEAF_LAUNCHES * shapes.leaves
    )
    seconds = sum(machine.seconds(part, shapes.itemsize) for part in (gradient, cost, update))
    return Candidate(index, solver, gradient + cost, seconds, reason)


def solve_cost(solver: Solver, s: Shapes) -> tuple[Cost, str]:
    """Predicted work of one solve and the sizes it follows from."""
    if isinstance(solver, RowSpace) and isinstance(solver.solver, Cholesky):
        # The Gram matrix as structure found it.
        total = s.gram + _dense(s.rows, s.itemsize) + s.product.times(_ROW_LANE_PRODUCTS)
        memory = s.residuals + min(s.gram.memory, solver.max_bytes) + 3.0 * s.itemsize * s.rows**2
        return dataclasses.replace(total, memory=memory), f"{s.rows} rows, {s.parameters} parameters"
    if isinstance(solver, RowSpace):
        count, why = _iterations(solver.solver, s)
        vectors = Cost(_PAIR_FLOPS * s.rows, _PAIR_PASSES * s.itemsize * s.rows, launches=_ITERATION_LAUNCHES)
        warm = isinstance(solver.solver, CG) and solver.solver.warm_start
        beside = _ROW_LANE_PRODUCTS + _PAIR_PRODUCTS + (_PAIR_WARM_PRODUCTS if warm else 0)
        total = s.product.times(count + beside) + vectors.times(count)
        memory = s.around_product + 16.0 * s.itemsize * s.rows
        return dataclasses.replace(total, memory=memory), f"{s.rows} rows, {why}"
    if isinstance(solver, Cholesky):
        products = dataclasses.replace(s.product.times(s.parameters), launches=s.product.launches)
        memory = s.residuals * (1 + s.parameters) + 3.0 * s.itemsize * s.parameters**2
        total = products + _dense(s.parameters, s.itemsize)
        return dataclasses.replace(total, memory=memory), f"{s.parameters} parameters"
    if solver.lane is Lane.DIAGONAL:
        return Cost(6.0 * s.parameters, 5.0 * s.vector, 2.0 * s.vector, s.leaves), "one pass over the parameters"
    count, why = _iterations(solver, s)
    warm = isinstance(solver, CG) and solver.warm_start
    launches = _LEAF_LAUNCHES * s.leaves + _ITERATION_LAUNCHES
    vectors = Cost(_VECTOR_FLOPS * s.parameters, _VECTOR_PASSES * s.vector, launches=launches)
    total = (s.product + vectors).times(count + warm)
    # The iterate, residual and search direction beside what the product touches.
    return dataclasses.replace(total, memory=s.around_product + 3.0 * s.vector), why


def _iterations(solver: Solver, s: Shapes) -> tuple[int, str]:
    """Iterations expected of one solve.

    CG ends after as many iterations as the damped matrix has distinct eigenvalues: that of its null space, and at most
    one for each dimension of its range. That it may end sooner is not foreseen, since spectra are not shapes; one that
    runs to its limit recomputes no residual.
    """
    if not isinstance(solver, CG):
        return solver.products, f"{solver.products} products at most"
    rank = min(s.rows, s.parameters) if s.rows else s.parameters
    if solver.tol > 0 and rank + 1 < solver.maxiter:
        return rank + 1, f"at most {rank + 1} iterations, the rank being {rank}"
    return solver.maxiter, f"at most {solver.maxiter} iterations"


def _dense(size: int, itemsize: int) -> Cost:
    """Factorization of a dense system and what surrounds it."""
    entries = float(size) ** 2
    return Cost(
        flops=size * entries / 3 + 4 * entries,
        bytes=_DENSE_PASSES * itemsize * entries,
        launches=_DENSE_LAUNCHES,
        factorization=size * entries / 3,
    )


def count_rows(curvature: Curvature, shapes: PyTree, evaluation: Evaluation) -> int:
    """Unknowns of the row lane's system; 0 for a curvature without rows."""
    if not curvature.has_rows:
        return 0

    def row_vector(p: PyTree, e: Evaluation) -> Any:
        rows = curvature.linearize(p, e, Needs(rows=True)).rows
        return jnp.zeros(rows.output.row_shape if rows is not None else (0,))

    return math.prod(jax.eval_shape(row_vector, shapes, evaluation).shape)


def unknowns(assembly: Assembly, solver: Solver, params: PyTree, evaluation: Evaluation) -> int | None:
    """Size of the dense matrix that the solver takes; `None` for solvers that take none."""
    if isinstance(solver, RowSpace) and not isinstance(solver.solver, CG):
        return count_rows(assembly.curvature, jax.eval_shape(lambda: params), evaluation)
    return tree.size(params) if isinstance(solver, Cholesky) else None


def _gram_cost(curvature: Curvature, shapes: PyTree, evaluation: Evaluation) -> Cost:
    """Work of the Gram matrix, counted on its own trace, so with whatever structure the model turns out to have."""

    def gram(p: PyTree, e: Evaluation) -> Any:
        rows = curvature.linearize(p, e, Needs(rows=True)).rows
        # Without a memory bound there are no blocks, whose loops have no countable length.
        return rows.gram(1 << 62, _COUNTED) if rows is not None else 0

    return costing.trace(gram, shapes, evaluation)


def _factor_cost(assembly: Assembly, shapes: PyTree, evaluation: Evaluation) -> Cost:
    """Work of one refresh of factors, forward pass not counted; that of eigenvectors and inverses has no count."""
    preconditioner, curvature = assembly.preconditioner, assembly.curvature
    if not isinstance(preconditioner, BlockPreconditioner):
        return Cost()
    state = block_state(preconditioner, curvature, shapes, evaluation)

    def refresh(p: PyTree, e: Evaluation, s: Any) -> Any:
        return preconditioner.refresh(s, curvature.linearize(p, e, Needs(factors=True)), jax.random.key(0))

    def linearize(p: PyTree, e: Evaluation) -> jax.Array:
        return curvature.linearize(p, e, Needs()).loss

    return costing.trace(refresh, shapes, evaluation, state) - costing.trace(linearize, shapes, evaluation)


def block_state(
    preconditioner: BlockPreconditioner, curvature: Curvature, params: PyTree, evaluation: Evaluation
) -> Any:
    """Shapes of the preconditioner's state."""
    return jax.eval_shape(lambda: preconditioner.init_blocks(curvature.blocks(params, evaluation)))
