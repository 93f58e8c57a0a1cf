"""Dense solves that a step cannot afford: told, or refused, before they are compiled, with figures."""

from __future__ import annotations

import warnings

from curvax.curvature import Evaluation
from curvax.kernels import caller_level
from curvax.plan import machine as machines
from curvax.plan.assembly import Assembly
from curvax.plan.plan import Plan, bytes_text, time_text
from curvax.plan.predict import candidate, step_work, unknowns
from curvax.solvers import CG, Cholesky, Lane, RowSpace, Solver
from curvax.tree import PyTree

MEMORY_SHARE = 0.5
"""Share of the device's memory above which a step is too large: parameters, batch and XLA's copies want the rest."""
SECONDS, RATIO = 1.0, 100.0
"""A step of a second or more, a hundred times what another lane takes, is slow by mistake."""
# Fewer unknowns are a fraction of a second and some megabytes anywhere, and not worth a trace.
_LEAST_UNKNOWNS = 1024


def warn_of_expense(assembly: Assembly, plan: Plan, params: PyTree, evaluation: Evaluation) -> None:
    """Warns of a dense system that is predicted to take half of the device's memory, or a hundred times too long.

    From shapes alone. The prediction is that of `Method.plan_for`; only systems of 1,024 unknowns and more are tried.

    Raises:
      ValueError: it is predicted to take more memory than there is; in the words of the warning.

    Warns:
      UserWarning: with time and memory, those of the fastest other lane, and what to do instead.
    """
    solver = plan.solver
    size = unknowns(assembly, solver, params, evaluation)
    if size is None or size < _LEAST_UNKNOWNS:
        return
    solvers = (solver, *_others(assembly, solver))
    work = step_work(assembly, params, evaluation)
    machine, there = machines.machine(), machines.memory()
    own, *rest = (candidate(index, each, work, machine) for index, each in enumerate(solvers))
    other = min(rest, key=lambda c: c.seconds)
    large = there is not None and own.cost.memory > MEMORY_SHARE * there
    slow = own.seconds >= SECONDS and own.seconds >= RATIO * other.seconds
    if not (large or slow):
        return
    said = (
        f"{solver.name} of {size} unknowns is predicted to take {time_text(own.seconds)} a step and "
        f"{bytes_text(own.cost.memory)}{'' if there is None else f' of the {bytes_text(there)} there are'}, where "
        f"{other.solver.name} takes {time_text(other.seconds)} and {bytes_text(other.cost.memory)}: {_instead(solver)}"
    )
    if there is not None and own.cost.memory > there:
        raise ValueError(said)
    # Python shows a warning with the same words once.
    warnings.warn(said, UserWarning, stacklevel=caller_level())


def _others(assembly: Assembly, solver: Solver) -> tuple[Solver, ...]:
    """Solvers of the same system in other lanes."""
    if solver.lane is Lane.ROW:
        return CG(), Cholesky()
    return (CG(), RowSpace(Cholesky())) if assembly.curvature.has_rows else (CG(),)


def _instead(solver: Solver) -> str:
    if solver.lane is Lane.ROW:
        return "take gauss_newton, which chooses, or sgn, or fewer examples in a step."
    return "take conjugate gradients (sgn, newton_cg), or gauss_newton, which chooses."
