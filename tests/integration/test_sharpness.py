"""Sharpness as a metric: the largest eigenvalue of the step's curvature, at its cadence, and its picture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.operators.spectra import largest_eigenvalue
from curvax.requirements import Part
from curvax.telemetry import Metric, MetricRecord
from tests.operators.problem import problem
from tests.oracle.compiling import quick_jit
from tests.oracle.models import MLP_TANH

RECORD = (MetricRecord(Metric.SHARPNESS, every=2),)


@pytest.mark.parametrize("preset", ["egn_ce", "sophia_g"])
def test_it_is_the_largest_eigenvalue(x64, preset):
    p = problem(MLP_TANH)
    batch = {"x": p.batch["x"], "y": p.batch["y"]}
    options = {} if preset == "sophia_g" else {"lam0": 0.1}
    method = curvax.make(preset, predict_fn=p.predict, metrics=RECORD, learning_rate=0.1, **options)
    params, state, step = p.params, method.init(p.params), quick_jit(method.step)
    matrix = curvax.operators.ggn(p.predict, curvax.losses.SoftmaxCrossEntropy(), params, batch)
    history = {"step": [], "sharpness": []}
    for i in range(3):
        params, state, info = step(params, batch, state, jax.random.key(i))
        for name, column in history.items():
            column.append(float(info[name]))
    assert history["sharpness"][0] == pytest.approx(np.linalg.eigvalsh(matrix.to_dense())[-1], rel=0.02)
    assert np.isfinite(history["sharpness"]).tolist() == [True, False, True]
    plan = method.plan_for(params, batch)
    assert [part.rate for part in plan.costs if part.part is Part.SHARPNESS] == [0.5]
    axis = curvax.viz.sharpness({**history, "learning_rate": np.full(3, 0.1)})
    assert len(axis.lines) == 2 and axis.lines[0].get_xdata().tolist() == [0, 2]


def test_lanczos_of_few_dimensions_and_of_nothing(x64):
    matrix = jnp.diag(jnp.array([-3.0, -2.0]))
    assert float(largest_eigenvalue(lambda v: matrix @ v, jnp.array([1.0, 0.0]))) == -3.0
    assert float(largest_eigenvalue(lambda v: matrix @ v, jnp.zeros(2))) == pytest.approx(-2.0)
    assert float(largest_eigenvalue(lambda v: 0 * v, jnp.ones(3))) == 0.0
