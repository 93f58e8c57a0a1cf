"""From requirements to a plan: lane, cadences, sharing, implementations, cost."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax

from curvax import tree
from curvax.curvature import Evaluation, Needs
from curvax.jaxprs import uses_custom_vjp
from curvax.kernels import tree_cg
from curvax.kernels._dispatch import Choice, Op, Request, resolve
from curvax.kernels.diagonal_update import DIAGONAL_UPDATE
from curvax.operators.spectra import SHARPNESS_STEPS
from curvax.plan import machine as machines
from curvax.plan.assembly import Assembly, PlanMode
from curvax.plan.cost import nbytes
from curvax.plan.entrywise import Entrywise, entrywise
from curvax.plan.expense import MEMORY_SHARE
from curvax.plan.plan import Candidate, PartCost, Plan, bytes_text
from curvax.plan.predict import candidate, count_rows, preconditioner_state, refresh_needs, step_work
from curvax.plan.step_sizes import at_once, copy_bytes
from curvax.requirements import EVERY_STEP, Cadence, Part, Requirement
from curvax.search import StepSearch
from curvax.solvers import Lane, Solver
from curvax.tree import PyTree
from curvax.work import Cost, StepWork

# Mean elements per leaf up to which `flat_vectors` ravels.
_RAVELED_LEAF = 2**20

_SMALL = 256
"""Unknowns up to which a system is factorized whatever iterations would cost: a fraction of a millisecond."""
_EXACT_IS_WORTH = 4.0
"""Steps of a truncated solve that an exact one replaces. Twenty iterations of CG on a network's Gauss-Newton matrix
leave residuals of 0.1 and more once lam is small, and such steps gain less than a quarter of what exact ones do."""


_DIGITS_ARE_WORTH = 2.0
"""Time of the fastest exact solve up to which a small fit gets one that does not square its condition number."""


_FACTORS = (0.01, 0.1, 1.0, 10.0)
"""Multiples of lam that small fits try: three smaller or larger ones in one batched forward pass of a small model."""


def plan_method(assembly: Assembly) -> Plan:
    """The plan without shapes. Raises ValueError for modules that cannot work together."""
    solver = assembly.solver
    if not assembly.curvature.judges_steps and (
        assembly.damping.evaluate_every is not None or assembly.search is not None
    ):
        judge = "search" if assembly.search is not None else assembly.damping.name
        raise ValueError(
            f"a {judge} judges steps by the loss of the same batch, and the {assembly.curvature.name} has none at "
            "other parameters: give lam_policy='const' with lam0= and no search, or use curvax.vmc."
        )
    return _plan(assembly, solver, None if solver.candidates else solver.lane, None)


def plan_for_shapes(assembly: Assembly, params: PyTree, evaluation: Evaluation) -> Plan:
    """The plan for the shapes of trainable parameters and batch: chooses automatic solvers, adds cost and notes."""
    candidates: tuple[Candidate, ...] = ()
    solver, index, factors = assembly.solver, None, assembly.damping.factors
    work = step_work(assembly, params, evaluation)
    if solver.candidates:
        candidates = _candidates(solver, work, own_gradient=True)
        best = _best(candidates, work)
        solver, index = best.solver, best.index
        factors = _factors(assembly, best, work)
    plan = _plan(assembly, solver, solver.lane, index, factors)
    choices = kernel_choices(assembly, plan, params, evaluation)
    raveled = flat_vectors(choices, params)
    state = preconditioner_state(assembly.preconditioner, assembly.curvature, params, evaluation)
    return dataclasses.replace(
        plan,
        candidates=candidates,
        choices=choices,
        costs=_costs(assembly, plan, work, params),
        state_bytes=_state_bytes(assembly, params, state),
        notes=(
            *plan.notes,
            *([raveled] if raveled else []),
            *_prediction_notes(candidates),
            *_search_notes(assembly.search, work, params),
            *_shape_notes(assembly, plan.lane, params, evaluation),
            *assembly.preconditioner.describe(state, _leaf_names(params)),
        ),
    )


def kernel_choices(assembly: Assembly, plan: Plan, params: PyTree, evaluation: Evaluation) -> tuple[Choice, ...]:
    """The implementation of each op that the step uses, for these shapes."""
    upcast = jax.eval_shape(tree.upcast, params)
    wanted: list[tuple[Op, Request]] = []
    wanted += plan.solver.kernels(upcast, lambda: count_rows(assembly.curvature, params, evaluation))
    if _has_products(plan):
        wanted += assembly.curvature.kernels(params, evaluation)
    wanted += assembly.preconditioner.kernels(upcast)
    if isinstance(entrywise(assembly), Entrywise):
        wanted.append((DIAGONAL_UPDATE, Request.of(params)))
    return tuple(resolve(op, assembly.backend, request) for op, request in wanted)


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

    Raises:
      ValueError: no solver of an automatic choice is predicted to fit into memory.
    """
    solver = assembly.solver
    if not solver.candidates:
        return _plan(assembly, solver, solver.lane, None)
    work = step_work(assembly, params, evaluation)
    best = _best(_candidates(solver, work, own_gradient), work)
    _refuse_what_does_not_fit(best)
    return _plan(assembly, best.solver, best.solver.lane, best.index, _factors(assembly, best, work))


def _refuse_what_does_not_fit(best: Candidate) -> None:
    """Raises ValueError if the solver that was chosen takes more memory than there is: then all do."""
    there = machines.memory()
    if there is not None and best.cost.memory > there:
        raise ValueError(
            f"no solver fits: {best.solver.name}, which takes least, is predicted to take "
            f"{bytes_text(best.cost.memory)} of the {bytes_text(there)} there are: set microbatch_size=, or take fewer "
            "examples in a step."
        )


def _factors(assembly: Assembly, best: Candidate, work: StepWork) -> tuple[float, ...] | None:
    """The multiples of lam that a chosen solver is given where the damping leaves them to the plan."""
    given = assembly.damping.factors
    if given is not None:
        return given
    search = assembly.search
    # They look at one direction; a search that evaluates one step size at a time does no more for the best of several.
    if assembly.acceleration is not None or (search is not None and search.chunk != 1):
        return None
    return _FACTORS if best.solver.keeps_digits and best.solver.solves_several and _is_fit(work) else None


def _is_fit(work: StepWork) -> bool:
    """Whether it is a fit of few parameters to few data, whose Jacobian is small."""
    return work.parameters <= _SMALL and work.rows * work.parameters <= _SMALL**2


def _candidates(solver: Solver, work: StepWork, own_gradient: bool) -> tuple[Candidate, ...]:
    """The solvers that can serve, with their predicted cost; all of them if none can, so that one says why."""
    known = list(enumerate(solver.candidates))
    able = [(i, c) for i, c in known if own_gradient or not c.needs_own_gradient] or known
    machine, there = machines.machine(), machines.memory()
    # A Gram matrix is counted on a trace of the rows, which takes as long as to trace the step: not where the
    # factorization alone is more than an exact solve is worth.
    without = dataclasses.replace(work, gram=lambda _: Cost())
    least = {i: candidate(i, c, without, machine) for i, c in able}
    sizes = {i: c.matrix_size(work.parameters, lambda: work.rows) for i, c in able}
    iterative = [c.seconds for i, c in least.items() if sizes[i] is None and _fits(c, there)]
    bound = _EXACT_IS_WORTH * min(iterative, default=math.inf)

    def hopeless(i: int) -> bool:
        return (sizes[i] or 0) > _SMALL and least[i].seconds > bound

    return tuple(least[i] if hopeless(i) else candidate(i, c, work, machine) for i, c in able)


def _fits(candidate: Candidate, memory: int | None) -> bool:
    return memory is None or candidate.cost.memory <= MEMORY_SHARE * memory


def _best(candidates: tuple[Candidate, ...], work: StepWork) -> Candidate:
    """The fastest that fits into memory, unless an exact one is nearly as fast; the smallest if none fits.

    Iterations that are cut short go less far per step, so seconds per step alone would let a fit with three unknowns
    crawl. Of few parameters the digits count: residuals of a fit may depend on them at very different scales.
    """
    there = machines.memory()
    fitting = [c for c in candidates if _fits(c, there)]
    if not fitting:
        return min(candidates, key=lambda c: c.cost.memory)
    if not _is_fit(work):
        # Explicit rows of a network, or of many data, are for who asks for them.
        fitting = [c for c in fitting if not c.solver.keeps_digits] or fitting
    fastest = min(fitting, key=lambda c: c.seconds)

    def worthwhile(c: Candidate) -> bool:
        size = c.solver.matrix_size(work.parameters, lambda: work.rows)
        return (size is not None and size <= _SMALL) or c.seconds <= _EXACT_IS_WORTH * fastest.seconds

    exact = [c for c in fitting if c.solver.exact and worthwhile(c)]
    if not exact:
        return fastest
    least = min(exact, key=lambda c: c.seconds)
    careful = [c for c in exact if c.solver.keeps_digits and c.seconds <= _DIGITS_ARE_WORTH * least.seconds]
    return min(careful, key=lambda c: c.seconds, default=least)


def _plan(
    assembly: Assembly, solver: Solver, lane: Lane | None, index: int | None, factors: tuple[float, ...] | None = None
) -> Plan:
    _check(assembly, solver)
    factors = factors or assembly.damping.factors or (1.0,)
    shared = assembly.mode is PlanMode.SHARED
    requirements = _requirements(assembly, solver, lane, factors)
    refresh, evaluate, predict = (
        _cadence(requirements, part) for part in (Part.REFRESH, Part.LOSS_AFTER, Part.PREDICTED)
    )
    curved = lane is not Lane.DIAGONAL
    # In the diagonal lane nothing but the refresh needs curvature: unless it runs every step it linearizes by itself.
    refresh_apart = not refresh.never and (not shared or (not curved and not refresh.always))
    reads = refresh_needs(assembly.preconditioner, shared)
    together = not refresh.never and not refresh_apart
    needs = Needs(
        gradient=True,
        product=(curved and lane is not Lane.ROW) or (together and reads.product) or assembly.reads_product,
        rows=lane is Lane.ROW or (together and reads.rows) or assembly.reads_rows,
        sampling=together and reads.sampling,
        factors=together and reads.factors,
        shared=shared,
    )
    return Plan(
        lane=lane,
        solver=solver,
        solver_index=index,
        needs=needs,
        requirements=_own_linearization(requirements) if refresh_apart else requirements,
        refresh=refresh,
        evaluate=evaluate,
        predict=predict,
        refresh_apart=refresh_apart,
        refresh_needs=reads,
        predict_apart=not predict.never and not curved and not assembly.reads_product,
        mode=assembly.mode,
        factors=factors,
        modules=_modules(assembly),
    )


def _check(assembly: Assembly, solver: Solver) -> None:
    curvature, preconditioner = assembly.curvature, assembly.preconditioner
    for each in solver.candidates or (solver,):
        if each.lane is Lane.ROW and not curvature.has_rows:
            raise ValueError(f"the row lane needs a Gauss-Newton matrix, and the {curvature.name} has no row factors: "
                             "use a parameter-space solver or a Gauss-Newton curvature.")  # fmt: skip
        if each.lane is Lane.ROW and not preconditioner.is_identity:
            raise ValueError("row-space solvers take no preconditioner: drop it, or use parameter-space CG.")
        if (assembly.damping.factors or (1.0,)) != (1.0,) and not each.solves_several:
            raise ValueError(f"{each.name} solves for one lam at a time, its own, and the damping tries multiples: "
                             "take Cholesky, Eigen or MultiShiftCG, or drop factors.")  # fmt: skip
        if each.lane is Lane.DIAGONAL and assembly.scaling is not None:
            raise ValueError("the diagonal lane is scaled by its own diagonal: drop scaling.")
        if each.lane is Lane.DIAGONAL and preconditioner.is_identity:
            raise ValueError("the diagonal lane is its preconditioner: give one with an estimator.")
        if assembly.damping.has_radius and not each.takes_radius:
            raise ValueError(f"the damping bounds the direction by a radius, and {each.name} keeps to none: take sgn, "
                             "newton_cg, newton_direct or ggn_direct_*, whose CG and Cholesky in parameter space do, "
                             'or a TrustRegion (lam_policy="trust_region") in place of the Radius.')  # fmt: skip
        if assembly.damping.has_radius and assembly.scaling is not None:
            raise ValueError("a radius bounds the length of the direction itself: drop scaling, or take a TrustRegion.")
    if assembly.scaling is not None and not curvature.has_rows:
        raise ValueError(f"scaling reads the diagonal of a Gauss-Newton matrix, and the {curvature.name} has no rows: "
                         "drop it, or use a Gauss-Newton curvature.")  # fmt: skip
    if assembly.acceleration is not None and (not curvature.has_rows or solver.lane is Lane.DIAGONAL):
        raise ValueError("geodesic acceleration corrects the solution of a Gauss-Newton system: drop it, or take egn.")
    if assembly.acceleration is not None and assembly.damping.has_radius:
        raise ValueError("geodesic acceleration may lead out of a radius: drop it, or take a TrustRegion.")
    if assembly.acceleration is not None and len(assembly.damping.factors or ()) > 1:
        raise ValueError("geodesic acceleration corrects the solution for one lam: drop it, or the damping's factors.")
    if preconditioner.needs_rows and not curvature.has_rows:
        raise ValueError(
            f"this estimator reads the factors of a Gauss-Newton matrix, and the {curvature.name} has none: "
            "use a Gauss-Newton curvature, or Hutchinson."
        )
    if preconditioner.needs_factors and not curvature.has_factors:
        raise ValueError(f"{type(preconditioner).__name__} takes Kronecker factors of a Gauss-Newton matrix, and the "
                         f"{curvature.name} has none: use a GaussNewton curvature.")  # fmt: skip
    if preconditioner.needs_sampling and not curvature.has_sampling:
        raise ValueError(
            "this estimator samples targets from the model, and a plain loss_fn has none: "
            "give predict_fn and loss, or use Hutchinson."
        )


def _requirements(
    assembly: Assembly, solver: Solver, lane: Lane | None, factors: tuple[float, ...]
) -> tuple[Requirement, ...]:
    """What all modules ask for, in the order in which a step runs it; of one part, in the order of the modules."""
    gradient = Requirement(
        Part.LINEARIZE, EVERY_STEP, "gradient" if lane is Lane.DIAGONAL else f"gradient, {solver.name}"
    )
    optional = filter(None, (assembly.scaling, assembly.step_bound, assembly.search))
    modules = (solver, assembly.preconditioner, assembly.damping, assembly.telemetry, *optional)
    names = ", ".join(f"{factor:g}" for factor in factors)
    several = [Requirement(Part.SELECT, EVERY_STEP, f"damping: best of lam times {names}")] if len(factors) > 1 else []
    asked = [gradient, *several, *(requirement for module in modules for requirement in module.requirements())]
    return tuple(sorted(asked, key=lambda requirement: list(Part).index(requirement.part)))


def _cadence(requirements: tuple[Requirement, ...], part: Part) -> Cadence:
    """When a part is due, for whoever asks for it."""
    return functools.reduce(Cadence.__or__, (r.cadence for r in requirements if r.part is part), Cadence())


def _own_linearization(requirements: tuple[Requirement, ...]) -> tuple[Requirement, ...]:
    """The requirements, where a refresh linearizes in its own branch."""
    where = " (own linearization, alive only then)"
    return tuple(dataclasses.replace(r, by=r.by + where) if r.part is Part.REFRESH else r for r in requirements)


def _modules(assembly: Assembly) -> tuple[tuple[str, str], ...]:
    preconditioner = "none" if assembly.preconditioner.is_identity else str(assembly.preconditioner)
    optional = (
        ("acceleration", assembly.acceleration), ("step bound", assembly.step_bound), ("search", assembly.search),
    )  # fmt: skip
    records = ", ".join(r.metric.value + (f" /{r.every}" if r.every > 1 else "") for r in assembly.reported.records)
    return (
        ("curvature", assembly.curvature.name),
        *assembly.curvature.term_names,
        ("solver", assembly.solver.name),
        ("preconditioner", preconditioner),
        ("damping", assembly.damping.name + ("" if assembly.scaling is None else f", {assembly.scaling.name}")),
        *((name, part.name) for name, part in optional if part is not None),
        *([("undo", "steps that nobody looked at, by a copy of the parameters")] if assembly.may_undo else []),
        ("telemetry", records),
    )


def _prediction_notes(candidates: tuple[Candidate, ...]) -> list[str]:
    return (
        [f"candidates' times are predicted for a {machines.machine()}; CG is taken to use all its iterations"]
        if candidates
        else []
    )


def _search_notes(search: StepSearch | None, work: StepWork, params: PyTree) -> list[str]:
    if search is None or not search.evaluations:
        return []
    return [f"the search evaluates {at_once(search, copy_bytes(params, work.linearize.memory))[1]}"]


def _shape_notes(assembly: Assembly, lane: Lane | None, params: PyTree, evaluation: Evaluation) -> tuple[str, ...]:
    notes = []
    if lane is Lane.DIAGONAL and isinstance(reason := entrywise(assembly), str):
        notes.append(f"the step takes several passes over the parameters: {reason}")
    curvature = assembly.curvature
    if uses_custom_vjp(curvature.forward, params, evaluation):
        notes.append("the model holds a custom_vjp: products run reverse over reverse")
    frozen = len(jax.tree.leaves(evaluation.frozen))
    if frozen:
        notes.append(f"{frozen} parameter {'leaf is' if frozen == 1 else 'leaves are'} frozen")
    if lane is Lane.ROW:
        notes.extend(f"rows of {leaf}" for leaf in curvature.structure(params, evaluation))
    return tuple(notes)


def _leaf_names(params: PyTree) -> list[str]:
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def _state_bytes(assembly: Assembly, params: PyTree, preconditioner: PyTree) -> tuple[tuple[str, int], ...]:
    upcast = jax.eval_shape(tree.upcast, params)
    solver = jax.eval_shape(assembly.solver.init, upcast)
    scaling = () if assembly.scaling is None else jax.eval_shape(assembly.scaling.init, upcast)
    damping = (jax.eval_shape(assembly.damping.init), scaling)
    states = {"solver": solver, "preconditioner": preconditioner, "damping": damping}
    if assembly.may_undo:
        states["undo"] = params
    return tuple((kind, nbytes(state)) for kind, state in states.items())


def _solve_cost(assembly: Assembly, plan: Plan, work: StepWork) -> Cost:
    """Work of a solve; acceleration takes the second derivative, and what a factorization does not serve twice."""
    once = plan.solver.solve_cost(work).cost
    if assembly.acceleration is None:
        return once
    return once + work.product.times(2.0) + (Cost() if plan.solver.exact else once)


def _search_cost(search: StepSearch, work: StepWork, params: PyTree) -> Cost:
    """Work of one search, with the step sizes that it evaluates at once."""
    each = copy_bytes(params, work.linearize.memory)
    copies = at_once(search, each)[0] or search.evaluations
    forward = work.linearize.times(search.evaluations)
    total = forward + work.product if search.needs_product else forward
    return dataclasses.replace(total, memory=copies * each)


def _costs(assembly: Assembly, plan: Plan, work: StepWork, params: PyTree) -> tuple[PartCost, ...]:
    """The sum of what the modules declare: one line per part, per time that it runs."""
    reverse = float(work.residuals + work.vector)
    looks = work.with_forward() if plan.refresh_apart else work
    parts = [
        (Part.GRADIENT, EVERY_STEP, work.gradient, reverse),
        (Part.SOLVE, EVERY_STEP, _solve_cost(assembly, plan, work), None),
    ]
    if assembly.scaling is not None:
        parts.append((Part.SCALING, Cadence((assembly.scaling.every,)), work.product, reverse))
    if assembly.step_bound is not None and assembly.step_bound.needs_product:
        parts.append((Part.BOUND, EVERY_STEP, work.product, None))
    if assembly.search is not None:
        searching = _search_cost(assembly.search, work, params)
        parts.append((Part.SEARCH, Cadence((assembly.search.every,)), searching, None))
    if not plan.refresh.never:
        parts.append((Part.REFRESH, plan.refresh, assembly.preconditioner.refresh_cost(looks), reverse))
    if (count := len(plan.factors)) > 1:
        parts.append((Part.SELECT, EVERY_STEP, work.linearize.times(count), float(work.residuals * count)))
    parts += [
        (Part.LOSS_AFTER, plan.evaluate, work.linearize, float(work.residuals)),
        (Part.PREDICTED, plan.predict, work.product, float(work.residuals)),
        (Part.SHARPNESS, plan.sharpness, work.linearize + work.product.times(SHARPNESS_STEPS), None),
    ]
    return tuple(
        PartCost(
            part,
            cost if memory is None else dataclasses.replace(cost, memory=memory),
            cadence.rate if plan.mode is PlanMode.SHARED else 1.0,
        )
        for part, cadence, cost, memory in parts
        if not cadence.never
    )
