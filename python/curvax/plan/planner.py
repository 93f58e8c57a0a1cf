"""From requirements to a plan: lane, cadences, sharing, implementations, cost."""

from __future__ import annotations

import dataclasses

import jax

from curvax import tree
from curvax.curvature import Evaluation, Microbatched, Needs
from curvax.estimators import GaussNewtonBartlett, Hutchinson
from curvax.jaxprs import uses_custom_vjp
from curvax.kernels import batched_cholesky_solve, gram_accumulate, tree_cg
from curvax.kernels._dispatch import Choice, Op, Request, resolve
from curvax.kernels.diagonal_update import DIAGONAL_UPDATE
from curvax.plan import machine as machines
from curvax.plan.assembly import Assembly, PlanMode
from curvax.plan.entrywise import Entrywise, entrywise
from curvax.plan.expense import MEMORY_SHARE
from curvax.plan.plan import Candidate, PartCost, Plan
from curvax.plan.predict import Shapes, block_state, candidate, solve_cost, unknowns
from curvax.plan.requirements import Cadence, Part, Requirement
from curvax.preconditioners import (
    EKFAC,
    KFAC,
    BlockPreconditioner,
    EmaDiagonal,
    IdentityPreconditioner,
    Jacobi,
    NystromPreconditioner,
    Preconditioner,
)
from curvax.solvers import CG, Automatic, Cholesky, Lane, RowSpace, Solver
from curvax.tree import PyTree

_EVERY_STEP = Cadence((1,))
# Mean elements per leaf up to which `flat_vectors` ravels.
_RAVELED_LEAF = 2**20


def plan_method(assembly: Assembly) -> Plan:
    """The plan without shapes. Raises ValueError for modules that cannot work together."""
    solver = assembly.solver
    if isinstance(solver, Automatic):
        solver_index, lane, chosen = None, None, solver
    else:
        solver_index, lane, chosen = None, solver.lane, solver
    return _plan(assembly, chosen, lane, solver_index)


def plan_for_shapes(assembly: Assembly, params: PyTree, evaluation: Evaluation) -> Plan:
    """The plan for the shapes of trainable parameters and batch: chooses automatic solvers, adds cost and notes."""
    candidates: tuple[Candidate, ...] = ()
    solver, index = assembly.solver, None
    shapes = Shapes.of(assembly, params, evaluation)
    if isinstance(solver, Automatic):
        candidates = _candidates(solver, shapes, own_gradient=True)
        best = _best(candidates)
        solver, index = best.solver, best.index
    plan = _plan(assembly, solver, solver.lane, index)
    choices = kernel_choices(assembly, plan, params, evaluation)
    raveled = flat_vectors(choices, params)
    return dataclasses.replace(
        plan,
        candidates=candidates,
        choices=choices,
        costs=_costs(assembly, plan, shapes),
        notes=(
            *plan.notes,
            *([raveled] if raveled else []),
            *_prediction_notes(candidates),
            *_shape_notes(assembly, plan.lane, params, evaluation),
        ),
    )


def kernel_choices(assembly: Assembly, plan: Plan, params: PyTree, evaluation: Evaluation) -> tuple[Choice, ...]:
    """The implementation of each op that the step uses, for these shapes."""
    upcast = jax.eval_shape(tree.upcast, params)
    wanted: list[tuple[Op, Request]] = []
    if isinstance(plan.solver, CG):
        wanted += [(op, Request.of(upcast)) for op in tree_cg.OPS]
    matrix = _matrix(assembly, plan, params, evaluation)
    if matrix is not None and isinstance(plan.solver, RowSpace):
        wanted += [(op, Request.of(matrix)) for op in gram_accumulate.OPS]
    inner = plan.solver.solver if isinstance(plan.solver, RowSpace) else plan.solver
    if matrix is not None and isinstance(inner, Cholesky):
        rhs = jax.ShapeDtypeStruct(matrix.shape[:1], matrix.dtype)
        wanted += [(op, Request.of(matrix, rhs)) for op in batched_cholesky_solve.OPS]
    if _has_products(plan):
        wanted += assembly.curvature.kernels(params, evaluation)
    wanted += assembly.preconditioner.kernels(upcast)
    if isinstance(entrywise(assembly), Entrywise):
        wanted.append((DIAGONAL_UPDATE, Request.of(params)))
    return tuple(resolve(op, assembly.backend, request) for op, request in wanted)


def _matrix(assembly: Assembly, plan: Plan, params: PyTree, evaluation: Evaluation) -> jax.ShapeDtypeStruct | None:
    """The dense matrix that the solver takes, if it takes one."""
    size = unknowns(assembly, plan.solver, params, evaluation)
    return None if size is None else jax.ShapeDtypeStruct((size, size), tree.scalar_dtype(params))


def _has_products(plan: Plan) -> bool:
    """Whether some part of the step multiplies with the curvature."""
    refreshed = not plan.refresh.never and plan.refresh_needs.product
    return plan.needs.product or plan.needs.rows or refreshed or not plan.predict.never


def flat_vectors(choices: tuple[Choice, ...], params: PyTree) -> str | None:
    """Why conjugate gradients should run on one raveled vector in place of the tree; None if they should not.

    XLA launches about three GPU kernels per leaf and iteration for the vector work, and a handful for a raveled vector,
    which costs two more passes over it (a product's result is gathered, its argument cut up): 16 bytes per float32
    element. At 2 us a launch and 3 TB/s a leaf of a million elements is where both cost the same. Sharded parameters
    keep their tree, since raveling would gather them; ops with kernels of their own walk the leaves in one launch.
    """
    request = Request.of(jax.eval_shape(tree.upcast, params))
    leaves = len(request.shapes)
    vectors = [choice for choice in choices if choice.op in {op.name for op in tree_cg.OPS}]
    custom = any(choice.implementation != "reference" for choice in vectors)
    if not vectors or custom or request.platform != "gpu" or request.devices != 1 or len(request.dtypes) != 1:
        return None
    if leaves < 2 or request.size > leaves * _RAVELED_LEAF:
        return None
    return f"the {leaves} leaves are raveled for CG's vector work: launches would cost more than the two extra passes"


def choose_solver(assembly: Assembly, params: PyTree, evaluation: Evaluation, *, own_gradient: bool = True) -> Plan:
    """The plan that execution follows: automatic choices made, no cost counted beyond what they need.

    Args:
      assembly, params, evaluation: modules, trainable parameters, the batch of the curvature.
      own_gradient: whether the gradient is that of the curvature's batch, as CG in row space must have it.
    """
    solver = assembly.solver
    if not isinstance(solver, Automatic):
        return _plan(assembly, solver, solver.lane, None)
    shapes = Shapes.of(assembly, params, evaluation)
    best = _best(_candidates(solver, shapes, own_gradient))
    return _plan(assembly, best.solver, best.solver.lane, best.index)


def _candidates(solver: Automatic, shapes: Shapes, own_gradient: bool) -> tuple[Candidate, ...]:
    """The solvers that can serve, with their predicted cost; all of them if none can, so that one says why."""
    known = list(enumerate(solver.candidates))
    able = [(i, c) for i, c in known if own_gradient or not _needs_own_gradient(c)]
    return tuple(candidate(i, c, shapes, machines.machine()) for i, c in able or known)


def _best(candidates: tuple[Candidate, ...]) -> Candidate:
    """The fastest that fits into memory; the smallest if none does."""
    there = machines.memory()
    fitting = [c for c in candidates if there is None or c.cost.memory <= MEMORY_SHARE * there]
    if not fitting:
        return min(candidates, key=lambda c: c.cost.memory)
    return min(fitting, key=lambda c: c.seconds)


def _needs_own_gradient(solver: Solver) -> bool:
    return isinstance(solver, RowSpace) and isinstance(solver.solver, CG)


def _plan(assembly: Assembly, solver: Solver, lane: Lane | None, index: int | None) -> Plan:
    _check(assembly, solver)
    shared = assembly.mode is PlanMode.SHARED
    preconditioner = assembly.preconditioner
    refresh = Cadence() if isinstance(preconditioner, IdentityPreconditioner) else Cadence((preconditioner.every,))
    own = Cadence() if assembly.damping.evaluate_every is None else Cadence((assembly.damping.evaluate_every,))
    evaluate = own | Cadence(assembly.telemetry.evaluate_periods())
    predict = own | Cadence(assembly.telemetry.predict_periods())
    curved = lane is not Lane.DIAGONAL
    # In the diagonal lane nothing but the refresh needs curvature: unless it runs every step it linearizes apart.
    refresh_apart = not refresh.never and (not shared or (not curved and not refresh.always))
    blocks = isinstance(preconditioner, BlockPreconditioner)
    refresh_needs = Needs(
        product=preconditioner.needs_product,
        rows=preconditioner.needs_rows,
        sampling=preconditioner.needs_sampling,
        factors=blocks,
        shared=shared,
    )
    predict_apart = not predict.never and not curved
    together = not refresh.never and not refresh_apart
    needs = Needs(
        gradient=True,
        product=(curved and lane is not Lane.ROW) or (together and preconditioner.needs_product),
        rows=lane is Lane.ROW or (together and preconditioner.needs_rows),
        sampling=together and preconditioner.needs_sampling,
        factors=together and blocks,
        shared=shared,
    )
    return Plan(
        lane=lane,
        solver=solver,
        solver_index=index,
        needs=needs,
        requirements=_requirements(assembly, solver, lane, refresh, refresh_apart, own),
        refresh=refresh,
        evaluate=evaluate,
        predict=predict,
        refresh_apart=refresh_apart,
        refresh_needs=refresh_needs,
        predict_apart=predict_apart,
        mode=assembly.mode,
        modules=_modules(assembly),
    )


def _evaluations(preconditioner: Preconditioner) -> int:
    """Products or sampled gradients of one refresh."""
    if isinstance(preconditioner, NystromPreconditioner):
        return preconditioner.rank
    if isinstance(preconditioner, EmaDiagonal | Jacobi):
        estimator = preconditioner.estimator
        if isinstance(estimator, Hutchinson):
            return estimator.n_probes
        if isinstance(estimator, GaussNewtonBartlett):
            return estimator.n_samples
    return 1


def _check(assembly: Assembly, solver: Solver) -> None:
    curvature, preconditioner = assembly.curvature, assembly.preconditioner
    solvers = solver.candidates if isinstance(solver, Automatic) else (solver,)
    for each in solvers:
        if each.lane is Lane.ROW and not curvature.has_rows:
            raise ValueError(f"the row lane needs a Gauss-Newton matrix, and the {curvature.name} has no row factors: "
                             "use a parameter-space solver or a Gauss-Newton curvature.")  # fmt: skip
        if each.lane is Lane.ROW and not isinstance(preconditioner, IdentityPreconditioner):
            raise ValueError("row-space solvers take no preconditioner: drop it, or use parameter-space CG.")
        if each.lane is Lane.DIAGONAL and isinstance(preconditioner, IdentityPreconditioner):
            raise ValueError("the diagonal lane is its preconditioner: give one with an estimator.")
    if preconditioner.needs_rows and not curvature.has_rows:
        raise ValueError(
            f"this estimator reads the factors of a Gauss-Newton matrix, and the {curvature.name} has none: "
            "use a Gauss-Newton curvature, or Hutchinson."
        )
    if isinstance(preconditioner, BlockPreconditioner) and not curvature.has_factors:
        raise ValueError(f"{type(preconditioner).__name__} takes Kronecker factors of a Gauss-Newton matrix, and the "
                         f"{curvature.name} has none: use a GaussNewton curvature.")  # fmt: skip
    if preconditioner.needs_sampling and not curvature.has_sampling:
        raise ValueError(
            "this estimator samples targets from the model, and a plain loss_fn has none: "
            "give predict_fn and loss, or use Hutchinson."
        )


def _requirements(
    assembly: Assembly, solver: Solver, lane: Lane | None, refresh: Cadence, refresh_apart: bool, own: Cadence
) -> tuple[Requirement, ...]:
    found = [
        Requirement(Part.LINEARIZE, _EVERY_STEP, "gradient" if lane is Lane.DIAGONAL else f"gradient, {solver.name}")
    ]
    if lane is Lane.ROW:
        found.append(Requirement(Part.ROWS, _EVERY_STEP, solver.name))
    if not refresh.never:
        where = " (own linearization, alive only then)" if refresh_apart else ""
        found.append(Requirement(Part.REFRESH, refresh, type(assembly.preconditioner).__name__ + where))
        if isinstance(assembly.preconditioner, KFAC | EKFAC):
            turned = Cadence((assembly.preconditioner.inverse_every,))
            found.append(Requirement(Part.INVERSES, turned, type(assembly.preconditioner).__name__))
    found.append(Requirement(Part.SOLVE, _EVERY_STEP, solver.name))
    for part, wanted in ((Part.LOSS_AFTER, "evaluates"), (Part.PREDICTED, "predicts")):
        if not own.never:
            found.append(Requirement(part, own, f"damping: {assembly.damping.name}"))
        periods = {r.every for r in assembly.telemetry.records if getattr(r.metric, wanted)}
        for period in sorted(periods):
            names = [
                r.metric.value for r in assembly.telemetry.records if getattr(r.metric, wanted) and r.every == period
            ]
            found.append(Requirement(part, Cadence((period,)), f"telemetry: {', '.join(names)}"))
    return tuple(found)


def _modules(assembly: Assembly) -> tuple[tuple[str, str], ...]:
    preconditioner = (
        "none" if isinstance(assembly.preconditioner, IdentityPreconditioner) else str(assembly.preconditioner)
    )
    records = ", ".join(r.metric.value + (f" /{r.every}" if r.every > 1 else "") for r in assembly.reported.records)
    return (
        ("curvature", assembly.curvature.name),
        ("solver", assembly.solver.name),
        ("preconditioner", preconditioner),
        ("damping", assembly.damping.name),
        ("telemetry", records),
    )


def _prediction_notes(candidates: tuple[Candidate, ...]) -> list[str]:
    return (
        [f"candidates' times are predicted for a {machines.machine()}; CG is taken to use all its iterations"]
        if candidates
        else []
    )


def _shape_notes(assembly: Assembly, lane: Lane | None, params: PyTree, evaluation: Evaluation) -> tuple[str, ...]:
    notes = []
    if lane is Lane.DIAGONAL and isinstance(reason := entrywise(assembly), str):
        notes.append(f"the step takes several passes over the parameters: {reason}")
    inner = assembly.curvature.inner if isinstance(assembly.curvature, Microbatched) else assembly.curvature
    if uses_custom_vjp(inner.forward, params, evaluation):
        notes.append("the model holds a custom_vjp: products run reverse over reverse")
    frozen = len(jax.tree.leaves(evaluation.frozen))
    if frozen:
        notes.append(f"{frozen} parameter {'leaf is' if frozen == 1 else 'leaves are'} frozen")
    if lane is Lane.ROW:
        notes.extend(f"rows of {leaf}" for leaf in inner.structure(params, evaluation))
    if isinstance(assembly.preconditioner, BlockPreconditioner):
        names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        held = block_state(assembly.preconditioner, inner, params, evaluation).blocks
        notes.extend(f"block of {line}" for line in held.describe(names))
    return tuple(notes)


def _costs(assembly: Assembly, plan: Plan, s: Shapes) -> tuple[PartCost, ...]:
    solve, _ = solve_cost(plan.solver, s)
    gradient = dataclasses.replace(s.gradient, memory=float(s.residuals + s.vector))
    found = [PartCost(Part.GRADIENT, gradient, 1.0), PartCost(Part.SOLVE, solve, 1.0)]
    if not plan.refresh.never:
        once = s.gradient if assembly.preconditioner.needs_sampling else s.product
        if isinstance(assembly.preconditioner, BlockPreconditioner):
            once = s.factors
        cost = (once + s.linearize if plan.refresh_apart else once).times(_evaluations(assembly.preconditioner))
        rate = plan.refresh.rate if plan.mode is PlanMode.SHARED else 1.0
        found.append(PartCost(Part.REFRESH, dataclasses.replace(cost, memory=float(s.residuals + s.vector)), rate))
    for part, cadence, cost in (
        (Part.LOSS_AFTER, plan.evaluate, s.linearize),
        (Part.PREDICTED, plan.predict, s.product),
    ):
        if not cadence.never:
            rate = cadence.rate if plan.mode is PlanMode.SHARED else 1.0
            found.append(PartCost(part, dataclasses.replace(cost, memory=float(s.residuals)), rate))
    return tuple(found)
