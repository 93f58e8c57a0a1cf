"""The development problems are what they say, and rows of a race say what happened in it."""

from __future__ import annotations

import dataclasses
import math

import bench.__main__ as command
import bench.schema as schema
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bench.suites import untuned
from bench.suites.untuned import contenders, runner, table, tuning
from bench.suites.untuned.contenders import ADAMW, CONTENDERS, GAUSS_NEWTON, Contender, Trainer, chosen
from bench.suites.untuned.problems import PROBLEMS, Problem
from bench.suites.untuned.problems.physics import FREQUENCY, local_energy, poisson_residuals, poisson_solution
from bench.suites.untuned.rows import DIVERGED, START, WORST, Result, rows
from bench.suites.untuned.runner import Clock, Compiled, Course, Effort, race

from tests.oracle.compiling import quick_jit

LOGISTIC = next(p for p in PROBLEMS if p.name == "logistic")
EFFORT = Effort(0.05, Clock.CPU, 2)


@pytest.mark.parametrize("problem", PROBLEMS, ids=lambda p: p.name)
def test_problem_has_a_loss_and_examples_that_share_nothing(problem: Problem):
    with jax.enable_x64(problem.float64), jax.numpy_dtype_promotion("standard"):
        data = problem.data()
        params = quick_jit(problem.init)(jax.random.key(0))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {
            jnp.dtype("float64" if problem.float64 else "float32")
        }
        part = jax.tree.map(lambda leaf: jnp.asarray(leaf[:8]), data.train)
        one = jax.tree.map(lambda leaf: leaf[3:4], part["x"])
        calls = quick_jit(
            lambda p: (problem.predict_fn(p, part["x"]), problem.predict_fn(p, one), problem.objective(p, part))
        )
        outputs, alone, loss = calls(params)
        np.testing.assert_allclose(alone[0], outputs[3], rtol=1e-4, atol=1e-5)
        assert math.isfinite(loss)
        # The layerwise methods cut a batch into four.
        assert (problem.batch or data.size) % 4 == 0
        order = problem.order(data.size, seed=1)
        if problem.batch is None:
            assert order is None
        else:
            assert order is not None
            epoch = order[: data.size // problem.batch].reshape(-1)
            assert len(set(epoch.tolist())) == epoch.size and order.max() < data.size


def test_physics_is_solved_by_the_known_solutions():
    with jax.enable_x64(True):
        poisson = next(p for p in PROBLEMS if p.name == "poisson2d")
        points = jax.tree.map(jnp.asarray, poisson.data().train["x"])
        residuals = quick_jit(lambda x: poisson_residuals(poisson_solution, x))(points)
        np.testing.assert_allclose(residuals, 0, atol=1e-12)

        def log_psi(x: jax.Array) -> jax.Array:
            return jnp.log1p(jnp.linalg.norm(x[:3] - x[3:]) / 2) - FREQUENCY * jnp.sum(x**2) / 2

        walkers = jax.random.normal(jax.random.key(0), (5, 6))
        energies = quick_jit(jax.vmap(lambda x: local_energy(log_psi, x)))(walkers)
        np.testing.assert_allclose(energies, 2.0, rtol=1e-10)


def descent(rate_of: float = 1.0, name: str = ADAMW, kind: str = "tuned") -> Contender:
    """Gradient descent: cheap to compile, and its fate at a rate is known."""

    def build(problem: Problem) -> Trainer:
        def step(params, state, batch, rate, key):
            loss, gradient = jax.value_and_grad(problem.objective)(params, batch)
            return jax.tree.map(lambda p, g: p - rate_of * rate * g, params, gradient), state, loss

        return Trainer(lambda params, batch: (), step)

    return Contender(name, build, kind, rates=(1e-3, 0.5, 1e9) if kind == "tuned" else ())  # type: ignore[arg-type]


def compiled(course: Course, contender: Contender) -> Compiled:
    return Compiled(contender, contender.build(course.problem), course, Clock.CPU)


def test_tuning_takes_the_rate_that_ends_lowest():
    course = Course(LOGISTIC)
    assert tuning.best_rates([compiled(course, descent())], EFFORT) == {ADAMW: 0.5}


def test_rows_of_a_race_and_what_later_runs_read_from_them():
    course = Course(LOGISTIC)
    yardstick, uphill = compiled(course, descent()), compiled(course, descent(-1.0, "kfac", "preset"))
    runs = list(race([(yardstick, 0.5, 0), (yardstick, 0.5, 1), (uphill, 0.5, 0), (uphill, 0.5, 1)], EFFORT.budget))
    assert all(t.points[0].loss == pytest.approx(math.log(2), rel=1e-5) for t in runs)
    assert all(0.9 * EFFORT.budget < t.final.seconds for t in runs)
    baseline = tuning.Baseline.of(runs[:2], yardstick.seconds)
    assert baseline.losses == tuple(t.final.loss for t in runs[:2])
    found = [
        *rows(LOGISTIC, Result(yardstick.contender, 0.5, yardstick.seconds, tuple(runs[:2])), baseline, EFFORT),
        *rows(LOGISTIC, Result(uphill.contender, None, uphill.seconds, tuple(runs[2:])), baseline, EFFORT),
    ]
    earlier = tuning.Earlier.of(found, "logistic")
    assert earlier is not None
    assert earlier.effort == EFFORT and earlier.baseline == baseline and earlier.rates == {ADAMW: 0.5}
    assert tuning.Earlier.of(found, "digits") is None
    rose = {r.metric: r for r in found if r.provider == "kfac"}
    assert rose[DIVERGED].p50 == 1 and rose[START].p50 > 1 and rose[START].meets_goal is None
    assert rose[WORST].p50 >= rose[START].p50
    assert rose[tuning.TARGET_TIME].p50 == math.inf
    assert "**" in "\n".join(table.table(found))


def test_a_later_run_of_fewer_seeds_is_compared_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    everybody = (descent(), descent(-1.0, "kfac", "preset"))
    monkeypatch.setattr(contenders, "CONTENDERS", everybody)
    options = untuned.Options(contender=ADAMW, budget=EFFORT.budget, clock=Clock.CPU, seeds=2)
    (first,) = untuned.run_suite(only="logistic", options=options)
    schema.write(first, "untuned", tmp_path)
    (second,) = untuned.run_suite(only="logistic", options=untuned.Options(contender="kfac", seeds=1))
    assert {(r.provider, r.x, r.rounds) for r in second} == {("kfac", EFFORT.x, 1)}
    against = next(r for r in second if r.metric == tuning.FINAL)
    reference = next(r for r in first if r.metric == tuning.by_seed(tuning.FINAL, 0))
    assert against.ratio == pytest.approx(against.p50 / reference.p50)


def test_a_run_whose_loss_is_no_number_ends_there_and_counts_as_infinite():
    course = Course(LOGISTIC)
    (run,) = race([(compiled(course, descent(math.nan)), 1.0, 0)], EFFORT.budget)
    assert run.final.loss == math.inf == run.worst and run.final.seconds < EFFORT.budget


def test_time_to_a_loss_allows_for_rounding_alone():
    points = tuple(runner.Point(float(i), i, loss) for i, loss in enumerate((3.0, 2.0, 1.0000001)))
    trajectory = runner.Trajectory(points, 3.0, 0.0)
    assert trajectory.seconds_to(1.0) == 2.0 and trajectory.seconds_to(0.99) == math.inf
    assert trajectory.seconds_to(2.5) == 1.0


def test_named_contenders_need_rows_or_adamw_and_names_are_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(schema, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="choose from adamw, soap"):
        chosen("adam")
    assert [c.name for c in chosen("gauss_newton, kfac")] == [GAUSS_NEWTON, "kfac"] and chosen("") == CONTENDERS
    with pytest.raises(ValueError, match="no rows of tuned AdamW on logistic"):
        list(untuned.run_suite(quick=True, only="logistic", options=untuned.Options(contender="kfac")))


def test_effort_follows_earlier_rows_unless_a_budget_is_given():
    earlier = tuning.Earlier(Effort(3.0, Clock.CPU, 2), {}, tuning.Baseline((1.0,), (1.0,), 1.0))
    options = untuned.Options(contender=GAUSS_NEWTON)
    assert options.effort(False, earlier) == earlier.effort
    assert options.effort(False, None) == Effort()
    assert dataclasses.replace(options, budget=2.0).effort(False, earlier) == Effort(2.0, Clock.WALL, 3)
    assert Effort.parse(Effort(0.5, Clock.CPU, 2).x, 2) == Effort(0.5, Clock.CPU, 2)


def test_the_command_line_takes_a_suites_own_options(capsys, tmp_path):
    command.main(["untuned", "--only", "no such problem", "--contender", "kfac", "--clock", "cpu", "--budget", "2"])
    with pytest.raises(SystemExit):
        command.main(["steps", "--contender", "kfac"])
    assert "unrecognized arguments: --contender kfac" in capsys.readouterr().err
