"""The classic problems have their published minima, and outcomes say what happened in a run."""

from __future__ import annotations

import dataclasses
import math

import bench.schema as schema
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from bench.suites import robustness
from bench.suites.robustness import least_squares, rows, table
from bench.suites.robustness.case import Case, Compiled, Outcome, Task
from bench.suites.robustness.classic import CLASSICS, Classic

from tests.oracle.compiling import quick_jit

QUADRATIC = Task("quadratic", loss_fn=lambda p, b: jnp.sum(jnp.square(p)) * b["x"])
CASE = Case("case", QUADRATIC, np.ones(2), {"x": np.ones(())}, 1e-3, steps=8)


@pytest.mark.parametrize("problem", CLASSICS, ids=lambda p: p.name)
def test_scipy_finds_a_published_minimum(problem: Classic):
    """From the published start; the start itself is at none."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        residuals, jacobian = quick_jit(problem.residuals), quick_jit(jax.jacfwd(problem.residuals))
        start = np.asarray(problem.start)
        found = scipy.optimize.least_squares(
            lambda x: np.asarray(residuals(x)),
            start,
            jac=lambda x: np.asarray(jacobian(x)),  # type: ignore[arg-type]
            method="lm",
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
        )
        at_start = float(jnp.sum(residuals(start) ** 2))
        assert problem.reached(2 * found.cost, at_start) and not problem.reached(at_start, at_start)


@dataclasses.dataclass(frozen=True)
class Descent:
    """Gradient descent on the quadratic; a batch of NaN makes the parameters NaN."""

    rate: float

    def init(self, params, batch):
        return ()

    def step(self, params, state, batch):
        return params - self.rate * jax.grad(QUADRATIC.objective)(params, batch), state


def run(rate: float, case: Case = CASE) -> Outcome:
    return Compiled(case.task, Descent(rate)).run(case)


def test_outcome_of_a_run():
    # |p|^2 = 2 (1 - 2 rate)^2n: at or below 1e-3 after 6 steps of a rate of 1/4.
    fine = run(0.25)
    assert fine.finite and fine.recovered and fine.steps == 6 and fine.start == 2.0
    worse = run(1.5)
    assert worse.finite and not worse.recovered and worse.steps == math.inf
    spoilt = dataclasses.replace(CASE, poison={"x": np.full((), math.nan)}, poisoned=lambda step: step == 7)
    assert run(0.25, spoilt) == Outcome(False, 2.0, math.inf, math.inf)
    assert run(0.0, dataclasses.replace(CASE, minimum=2.0)).steps == 0


def test_a_method_that_raises_is_an_outcome():
    class Raises(Descent):
        def step(self, params, state, batch):
            raise TypeError("no such dtype")

    outcome = Compiled(QUADRATIC, Raises(1.0)).run(CASE)
    assert not outcome.finite and outcome.error == "TypeError: no such dtype"


def test_classic_runs_end_at_a_minimum_or_where_numbers_end():
    problem = Classic("square", lambda x: x, (1.0,))
    assert least_squares.solve(lambda _: iter([0.5, 1e-20, 0.1]), problem) == least_squares.Found(True, 1e-20, 2)
    assert least_squares.solve(lambda _: iter([0.5, math.nan]), problem).finite is False
    assert least_squares.solve(lambda _: iter([0.5]), problem) == least_squares.Found(True, 0.5, math.inf)


def test_cases_are_many_and_the_table_shows_them(tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        cases = list(robustness.hard_cases())
    assert len({case.name for case in cases}) == len(cases) >= 60
    found = [
        *rows.of_case(CASE, "good", Outcome(True, 2.0, 1e-4, 6)),
        *rows.of_case(CASE, "bad", Outcome(False, 2.0, math.inf, math.inf)),
        *rows.of_case(CASE, "worse", Outcome(True, 2.0, 4.0, math.inf)),
        *rows.of_classic(CLASSICS[0], "good", least_squares.Found(True, 0.0, 12)),
    ]
    assert schema.read(schema.write(found, "robustness", tmp_path)) == found
    text = "\n".join(table.table(found))
    assert "| case | 6 | **x** | worse |" in text and "| good | 1 | 1 | 1 | 1 |" in text
    assert "| 1 Rosenbrock | 12 |" in text and "| reached | 1 of 1 |" in text
