"""Every lane of a Gauss-Newton step over models, batches, outputs and widths; and whether the planner picks well."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import curvax
from bench import libraries, run
from bench.schema import Row
from bench.workloads import SMALL, Workload, cnn, mlp, pinn
from curvax.losses import Loss, SoftmaxCrossEntropy, SquaredError
from curvax.solvers import CG, Automatic, Cholesky, RowSpace, Solver

SUITE = "lanes"
PARAM_CG, ROW_CHOLESKY, ROW_CG = "param, 20 CG iterations", "row, Cholesky", "row, 20 CG iterations"
PARAM_CHOLESKY, DIAGONAL = "param, Cholesky", "diagonal (sophia_g, refresh every step)"
PICKED = "planner's pick over the best"
_WITHIN, _SHARE = 1.3, 0.95
# Larger dense systems take seconds and are never the best.
_MOST_ROWS, _MOST_PARAMETERS = 3200, 500


def methods(work: Workload, loss: str, *, diagonal: bool = False) -> dict[str, curvax.Method]:
    """Gauss-Newton methods that differ in their solver alone; no tolerance, so that every solve takes 20 iterations."""
    auto = automatic(work, _LOSSES[loss])
    cg = CG(maxiter=20, tol=0.0)
    solvers: dict[str, Solver] = {PARAM_CG: cg, ROW_CHOLESKY: RowSpace(Cholesky()), ROW_CG: RowSpace(cg)}
    results = {name: _with_solver(auto, solver) for name, solver in solvers.items()}
    if diagonal and loss == "cross entropy":
        results[DIAGONAL] = curvax.sophia_g(predict_fn=work.predict, learning_rate=1e-4, eval_every_k=1)
    return results


def automatic(work: Workload, loss: Loss, iterations: int = 20) -> curvax.Method:
    """The method whose solver the planner chooses; damped so little that CG does not converge in its iterations."""
    constant = {"lam_policy": "const", "lam0": 1e-4, "learning_rate": 1e-3}
    return curvax.gauss_newton(predict_fn=work.predict, loss=loss, **constant, tol=0.0, maxiter=iterations)


def _with_solver(method: curvax.Method, solver: Solver) -> curvax.Method:
    return curvax.Method(dataclasses.replace(method.assembly, solver=solver))


_LOSSES: dict[str, Loss] = {"cross entropy": SoftmaxCrossEntropy(), "squared error": SquaredError()}


@dataclasses.dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
      work, batch: what the lanes step on.
      loss: "cross entropy" or "squared error".
    """

    work: Workload
    batch: int
    loss: str

    @property
    def name(self) -> str:
        """The row's case."""
        return f"{self.work.name}, {self.loss}"

    @property
    def rows(self) -> int:
        """Unknowns of the row system."""
        return self.batch * (self.work.outputs - (self.loss == "cross entropy"))


def cases() -> Iterator[Case]:
    """Batches of a few to many rows, on models of a hundred to two million parameters."""
    for width in (32, 256, 1024):
        for batch in (8, 64, 256):
            yield Case(mlp(width, 1), batch, "squared error")
            yield Case(mlp(width, 10), batch, "cross entropy")
            yield Case(mlp(width, 100), batch, "cross entropy")
    yield from (Case(mlp(256, 10), batch, "cross entropy") for batch in (16, 32, 128))
    yield from (Case(cnn(32, 10), batch, "cross entropy") for batch in (8, 32, 128))
    yield from (Case(cnn(64, 10), batch, "cross entropy") for batch in (8, 64))
    yield from (Case(cnn(32, 1), batch, "squared error") for batch in (8, 64, 256))
    for width in (16, 64):
        yield from (Case(pinn(width), batch, "squared error") for batch in (16, 128, 512))
    yield from (Case(SMALL, batch, "cross entropy") for batch in (16, 256, 2048))
    yield from (Case(mlp(64, 10, 20), batch, "cross entropy") for batch in (16, 128, 1024))


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case, and the share of cases whose pick takes at most 1.3 times the best lane's time.

    Args:
      quick: the smallest case only.
      only: substring of the case names to run.
    """
    picks: list[float] = []
    for case in (Case(SMALL, 16, "cross entropy"),) if quick else cases():
        if only in case.name:
            with jax.enable_x64(case.work.dtype == "float64"):
                results = _rows(case, 2 if quick else 7)
            picks += [row.p50 for row in results if row.metric == PICKED]
            yield results
    if picks:
        share = float(np.mean(np.asarray(picks) <= _WITHIN))
        case = f"cases whose pick is within {_WITHIN} of the best, goal {_SHARE}"
        yield [Row(SUITE, case, "curvax", "share", f"{len(picks)} cases", share, share, share)]


def _rows(case: Case, rounds: int) -> list[Row]:
    work, x = case.work, f"batch {case.batch}"
    batch = work.batch(case.batch, labels=case.loss == "cross entropy")
    auto = automatic(work, _LOSSES[case.loss])
    plan = auto.plan_for(work.params(), batch)
    results = _measurable(case, auto) | {provider(plan.solver): _with_solver(auto, plan.solver)}
    candidates = [
        run.Candidate(name, *libraries.stepper(method, work, batch), baseline=None if name == PARAM_CG else PARAM_CG)
        for name, method in results.items()
    ]
    timings = run.time_all(candidates, rounds, budget=3)
    rows = run.rows(SUITE, case.name, x, timings)
    predicted = {provider(c.solver): 1e3 * c.seconds for c in plan.candidates}
    rows += [_single(case, name, "ms/step, predicted", x, value) for name, value in predicted.items()]
    best = min(timings, key=lambda t: float(np.median(t.seconds)))
    picked = provider(plan.solver)
    over = run.ratio(next(t for t in timings if t.candidate.name == picked), best)
    row = _single(case, picked, PICKED, x, over)
    return [*rows, dataclasses.replace(row, ratio=over, baseline=best.candidate.name, goal=_WITHIN)]


def _measurable(case: Case, auto: curvax.Method) -> dict[str, curvax.Method]:
    """Every candidate of the planner, and row CG, where their dense matrices are small."""
    solver = auto.assembly.solver
    offered = solver.candidates if isinstance(solver, Automatic) else (solver,)
    results = methods(case.work, case.loss)
    if case.rows > _MOST_ROWS:
        del results[ROW_CHOLESKY]
    if case.work.size <= _MOST_PARAMETERS:
        results |= {provider(s): _with_solver(auto, s) for s in offered if isinstance(s, Cholesky)}
    return results


def provider(solver: Solver) -> str:
    """A candidate's name in the rows."""
    row, inner = isinstance(solver, RowSpace), solver.solver if isinstance(solver, RowSpace) else solver
    if isinstance(inner, CG):
        return ROW_CG if row else PARAM_CG
    return ROW_CHOLESKY if row else PARAM_CHOLESKY


def _single(case: Case, name: str, metric: str, x: str, value: Any) -> Row:
    return Row(SUITE, case.name, name, metric, x, value, value, value)
