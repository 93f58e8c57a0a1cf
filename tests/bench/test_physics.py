"""The equations of the physics race are solved by their solutions, and a race of them makes rows."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bench.suites.physics import table
from bench.suites.physics.contenders import ADAM, DEFAULTS, EXPERT, expert
from bench.suites.physics.pde import Condition, Pde
from bench.suites.physics.problems import PROBLEMS, poisson_1d
from bench.suites.physics.race import ARRIVAL, ERROR, LOSS, rows_of
from bench.suites.untuned.contenders import Contender, first_order
from bench.suites.untuned.runner import Clock, Effort

pytestmark = pytest.mark.usefixtures("promotion_of_users")


@pytest.fixture
def promotion_of_users():
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield


def few(pde: Pde, points: int = 7) -> Pde:
    conditions = {name: dataclasses.replace(c, points=c.points[:points]) for name, c in pde.conditions.items()}
    return dataclasses.replace(pde, conditions=conditions, widths=(pde.widths[0], 4, pde.widths[-1]))


@pytest.mark.parametrize("make", PROBLEMS, ids=lambda make: make().name)
def test_the_solution_has_no_residual(make):
    pde = few(make())
    truth = jnp.asarray(pde.coefficients[1])

    def residuals(condition: Condition) -> jax.Array:
        x = jnp.asarray(condition.points)
        return jax.vmap(lambda z: condition.operator(pde.solution, truth, z) - condition.source(z))(x)

    for name, values in jax.jit(lambda: {n: residuals(c) for n, c in pde.conditions.items()})().items():
        np.testing.assert_allclose(values, 0, atol=1e-11, err_msg=name)


def test_a_race_makes_rows_and_the_expert_descends():
    pde = few(poisson_1d())
    adam: Contender[Pde] = Contender(ADAM, first_order(optax.adam), "tuned", (1e-3, 1e-2))
    # The expert's code under the name of a preset: what the rows compare is not who runs.
    contenders = (adam, Contender(DEFAULTS[0], expert, "tuned", (1e-8,)), Contender(EXPERT, expert, "tuned", (1e-6,)))
    rows = list(rows_of("physics", pde, Effort(0.1, Clock.CPU, 1), contenders))
    own = {r.metric: r for r in rows if r.provider == DEFAULTS[0]}
    start = pde.objective(pde.init(jax.random.key(0)), {"terms": pde.batch()})
    assert own[LOSS].p50 < 0.5 * float(start)
    assert own[ERROR].baseline in (ADAM, EXPERT) and own[ERROR].ratio is not None and own[ERROR].goal == 1.0
    assert own[ARRIVAL].baseline == ADAM and own[ARRIVAL].goal == 1 / 20
    assert all(math.isfinite(r.p50) for r in rows if r.metric in (ERROR, LOSS))
    page = "\n".join(table.table(rows))
    assert "of 1 equations" in page
    assert f"| {pde.name} | 0.1 s, cpu | {EXPERT} |" in page
