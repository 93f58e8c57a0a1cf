"""What a step with a solver is predicted to cost on a batch: its pieces, counted from shapes alone, and their sum.

The pieces are counted once (`step_work`), whatever the modules are; how many of them a solve or a refresh takes, the
solver and the preconditioner say themselves (`Solver.solve_cost`, `Preconditioner.refresh_cost`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.curvature import Curvature, Evaluation, Needs
from curvax.kernels import gram_accumulate
from curvax.kernels._dispatch import Choice
from curvax.plan import cost as costing
from curvax.plan.assembly import Assembly
from curvax.plan.machine import Machine
from curvax.plan.plan import Candidate
from curvax.preconditioners import Preconditioner
from curvax.solvers import Solver
from curvax.structure.gram import RowGroups
from curvax.tree import PyTree
from curvax.work import LEAF_LAUNCHES, Cost, StepWork

# FLOPs are counted in plain JAX, whatever runs.
_COUNTED = Choice(gram_accumulate.GRAM_ACCUMULATE.name, "reference", "counted for the plan, not run")
# Passes of every step over the parameters: norms, the test for finite values, transform, update, the choice at the end.
_STEP_PASSES = 15.0


def step_work(assembly: Assembly, params: PyTree, evaluation: Evaluation) -> StepWork:
    """The pieces of a step, counted on traces of the assembly's curvature."""
    curvature = assembly.curvature
    shapes = jax.eval_shape(lambda: params)
    upcast = jax.eval_shape(tree.upcast, shapes)

    def gradient(p: PyTree, e: Evaluation) -> PyTree:
        return curvature.linearize(p, e, Needs(gradient=True)).gradient

    def product(p: PyTree, e: Evaluation, v: PyTree) -> PyTree:
        multiply = curvature.linearize(p, e, Needs(product=True)).product
        return multiply(v) if multiply is not None else v

    forward = _forward_cost(curvature, shapes, evaluation)
    whole = costing.trace(product, shapes, evaluation, upcast)
    return StepWork(
        parameters=tree.size(shapes),
        leaves=len(jax.tree.leaves(shapes)),
        itemsize=jnp.dtype(tree.scalar_dtype(shapes)).itemsize,
        rows=count_rows(curvature, shapes, evaluation),
        linearize=forward,
        gradient=costing.trace(gradient, shapes, evaluation),
        product=whole if curvature.repeats_forward else whole - forward,
        residuals=costing.residual_bytes(curvature.forward, shapes, evaluation),
        gram=functools.cache(functools.partial(_gram_cost, curvature, shapes, evaluation)),
        count_refresh=functools.partial(_refresh_cost, assembly.preconditioner, curvature, shapes, evaluation),
    )


def candidate(index: int, solver: Solver, work: StepWork, machine: Machine) -> Candidate:
    """What a step with this solver is predicted to take."""
    cost, reason = solver.solve_cost(work)
    gradient = dataclasses.replace(work.gradient, memory=float(work.around_product))
    update = Cost(bytes=_STEP_PASSES * work.vector, memory=4.0 * work.vector, launches=LEAF_LAUNCHES * work.leaves)
    seconds = sum(machine.seconds(part, work.itemsize) for part in (gradient, cost, update))
    return Candidate(index, solver, gradient + cost, seconds, reason)


def count_rows(curvature: Curvature, params: PyTree, evaluation: Evaluation) -> int:
    """Unknowns of the row lane's system; 0 for a curvature without rows."""
    if not curvature.has_rows:
        return 0

    def row_vector(p: PyTree, e: Evaluation) -> Any:
        rows = curvature.linearize(p, e, Needs(rows=True)).rows
        return jnp.zeros(rows.output.row_shape if rows is not None else (0,))

    shapes = jax.eval_shape(lambda: params)
    return math.prod(jax.eval_shape(row_vector, shapes, evaluation).shape)


def unknowns(assembly: Assembly, solver: Solver, params: PyTree, evaluation: Evaluation) -> int | None:
    """Size of the dense matrix that the solver takes; `None` for solvers that take none."""
    return solver.matrix_size(tree.size(params), lambda: count_rows(assembly.curvature, params, evaluation))


def refresh_needs(preconditioner: Preconditioner, shared: bool = True) -> Needs:
    """What a refresh reads of a linearization."""
    return Needs(
        product=preconditioner.needs_product,
        rows=preconditioner.needs_rows,
        sampling=preconditioner.needs_sampling,
        factors=preconditioner.needs_factors,
        shared=shared,
    )


def preconditioner_state(
    preconditioner: Preconditioner, curvature: Curvature, params: PyTree, evaluation: Evaluation
) -> Any:
    """Shapes of the preconditioner's state."""
    return jax.eval_shape(lambda: preconditioner.init_on(curvature, params, evaluation))


def _forward_cost(curvature: Curvature, shapes: PyTree, evaluation: Evaluation) -> Cost:
    return costing.trace(lambda p, e: curvature.linearize(p, e, Needs()).loss, shapes, evaluation)


def _gram_cost(curvature: Curvature, shapes: PyTree, evaluation: Evaluation, max_bytes: int) -> Cost:
    """Work of the Gram matrix: of one group of its rows as its trace counts it, and of all of them as they meet."""
    if not curvature.has_rows:
        return Cost()
    counted: list[Cost] = []

    def count(p: PyTree, e: Evaluation) -> None:
        rows = curvature.linearize(p, e, Needs(rows=True)).rows
        if rows is not None and rows.groups is not None:
            counted.append(_rows_cost(rows.groups(max_bytes), max_bytes))

    def whole(p: PyTree, e: Evaluation) -> Any:
        rows = curvature.linearize(p, e, Needs(rows=True)).rows
        # Without a memory bound there are no blocks, whose loops have no countable length.
        return rows.gram(1 << 62, _COUNTED) if rows is not None else 0

    jax.eval_shape(count, shapes, evaluation)
    if counted:
        return counted[0]
    # Rows of which nobody can say how they are made keep to the bound beside their matrix, and the matrix made whole.
    cost = costing.trace(whole, shapes, evaluation)
    matrix = count_rows(curvature, shapes, evaluation) ** 2 * jnp.dtype(tree.scalar_dtype(shapes)).itemsize
    return dataclasses.replace(cost, memory=min(cost.memory, max_bytes + 2.0 * matrix))


def _rows_cost(rows: RowGroups, max_bytes: int) -> Cost:
    pieces = rows.pieces(max_bytes)
    # 1. Each group is made as often as its block is. A block is one vmapped program, launched once.
    one = costing.of_program(rows.program)
    making = one.times(rows.groups * pieces.times)
    making = dataclasses.replace(making, launches=one.launches * pieces.blocks * pieces.times)
    # 2. All rows meet.
    stacked = [
        jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((rows.groups, *x.shape), x.dtype), (layer.activations, layer.cotangents)
        )
        for layer in rows.one
    ]
    if not any(x.size for x in jax.tree.leaves(stacked)):
        return Cost()
    meeting = costing.trace(
        lambda layers: gram_accumulate.gram_of_layers(layers, rows.dtype, implementation=_COUNTED), stacked
    )
    return dataclasses.replace(making + meeting, memory=float(pieces.bytes))


def _refresh_cost(preconditioner: Preconditioner, curvature: Curvature, shapes: PyTree, evaluation: Evaluation) -> Cost:
    """Work of one refresh, without its forward pass; that of eigenvectors and inverses has no count."""
    state = preconditioner_state(preconditioner, curvature, shapes, evaluation)

    def refresh(p: PyTree, e: Evaluation, s: Any) -> Any:
        at = curvature.linearize(p, e, refresh_needs(preconditioner))
        return preconditioner.refresh(s, at, jax.random.key(0))

    return costing.trace(refresh, shapes, evaluation, state) - _forward_cost(curvature, shapes, evaluation)
