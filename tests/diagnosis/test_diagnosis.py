"""The page: each number against a dense or explicit one, and advice for runs that differ."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import operators
from curvax.curvature import Model, ModelLoss
from curvax.diagnosis import Diagnosis, steps
from curvax.diagnosis.advice import Evidence, advise
from curvax.diagnosis.noise import GradientNoise, gradient_noise
from curvax.diagnosis.spectrum import Curved, curved
from curvax.diagnosis.steps import StepCost
from curvax.diagnosis.structure import LostLeaf, lost_leaves
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.operators import CurvatureOperator, Quadrature, ggn
from tests.operators.problem import LOSS, problem
from tests.oracle.models import MLP_TANH


def linear(w, x):
    return x @ w


def explicit(x, y, w):
    """tr S and signal from gradients one by one."""
    each = x * (x @ w - y)
    noise = np.trace(np.cov(each.T))
    return noise / (np.sum(each.mean(0) ** 2) - noise / len(x))


@pytest.mark.fast
def test_noise_scale_is_that_of_explicit_gradients(x64):
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(40, 3)), np.ones((3, 1))
    y = 3 * x[:, :1] + 0.5 * rng.normal(size=(40, 1))
    batches = [{"x": x[:30], "y": y[:30]}, {"x": x[30:], "y": y[30:]}]
    found = gradient_noise(_matrix(linear, SquaredError(), w, batches))
    assert found.scale == pytest.approx(explicit(x, y, w), rel=1e-9)
    assert (found.examples, found.batch) == (40, 30)

    def mixing(w, x):
        return (x - 1e-3 * jnp.mean(x, axis=0)) @ w

    many = [{"x": x[i : i + 4], "y": y[i : i + 4]} for i in range(0, 40, 4)]
    with pytest.warns(UserWarning, match="interact"):
        apart = gradient_noise(_matrix(mixing, SquaredError(), w, many))
    assert apart.scale == pytest.approx(found.scale, rel=0.5) and "spread of batches" in apart.source
    one = gradient_noise(_matrix(linear, SquaredError(), w, {"x": x[:1], "y": y[:1]}))
    assert np.isnan(one.scale) and one.suggested_batch is None


def test_curvature_of_a_masked_run_in_pieces(x64, quick_programs):
    p = problem(MLP_TANH)
    found = curved(_matrix(p.model, LOSS, p.params, p.batches), jax.random.key(0), 5, 8)
    values = np.linalg.eigvalsh(p.truth.ggn)[::-1]
    np.testing.assert_allclose(found.top, values[:5], rtol=1e-9)
    assert found.trace == pytest.approx(values.sum(), rel=1e-9)
    assert found.effective_rank == pytest.approx(values.sum() ** 2 / np.sum(values**2), rel=1e-9)
    hessian = operators.hessian(ModelLoss(p.model, LOSS), p.params, p.batch).to_dense()
    assert found.condition > 1 and found.lowest == pytest.approx(np.linalg.eigvalsh(hessian)[0], rel=0.02)


def test_steps_are_those_of_plans(monkeypatch):
    monkeypatch.setattr(steps, "PRESETS", ("egn", "sophia_g"))
    w, batch = jnp.zeros((3, 1)), {"x": jnp.ones((4, 3)), "y": jnp.zeros((4, 1))}
    direct, sampled = steps.step_costs(Model(linear), SquaredError(), w, batch, None)
    plan = curvax.egn(predict_fn=linear, loss=SquaredError()).plan_for(w, batch)
    assert direct.bytes == plan.cost.memory and direct.seconds and direct.seconds > 0
    assert sampled.seconds is None or sampled.seconds < 1


def test_the_page_reads_and_is_plain_data(tmp_path):
    found = evidence(500.0, SoftmaxCrossEntropy())
    lost, costs = (LostLeaf("w", 900, "why"),), (*found.steps, StepCost("spring", None, None, "no rows"))
    page = Diagnosis(found.noise, found.curvature, lost, costs, "CPU", advise(found))
    for line in ("gradient ", "curvature ", "structure  w (900): why", "a step ", "advice     curvax.kfac"):
        assert f"\n{line}" in f"\n{page}"
    assert json.loads(json.dumps(page.as_dict()))["advice"]["method"] == "kfac"
    page.plot()[0].get_figure().savefig(tmp_path / "page.png")


def lost(params, x):
    return jnp.sin(x[:, :, None] * jnp.exp(params["a"])).sum(1)


def test_lost_leaves_have_a_reason():
    params = {"a": jnp.ones((3, 3), jnp.bfloat16)}
    batch = {"x": jnp.ones((2, 3), jnp.bfloat16), "y": np.zeros(2, int)}
    (leaf,) = lost_leaves(_matrix(lost, SoftmaxCrossEntropy(), params, batch))
    assert (leaf.path, leaf.size) == ("['a']", 9) and leaf.reason


def evidence(scale, loss, **changes):
    """A quiet or noisy run of a thousand parameters on batches of 64."""
    quadrature = Quadrature(jnp.ones((1, 1)), jnp.ones((1, 1)), 1000)
    curvature = Curved(1000, (1.0,), 10.0, 10.0, 1e9, -0.01, quadrature)
    noise = GradientNoise(1.0, 1.0, 640, 64, scale, "")
    served = [StepCost(name, 1.0, 1.0) for name in ("gauss_newton", "egn", "sgn", "kfac", "sophia_g", "sophia_h")]
    found = Evidence(loss, 640, 4, noise, curvature, (), served)
    return dataclasses.replace(found, **changes)


@pytest.mark.parametrize(
    ("found", "method", "settings"),
    [
        (evidence(8.0, SquaredError()), "gauss_newton", ("float64 (jax_enable_x64)",)),
        (evidence(8.0, SoftmaxCrossEntropy()), "egn", ()),
        (evidence(60.0, SoftmaxCrossEntropy(), rows=64_000), "sgn", ()),
        (evidence(500.0, SoftmaxCrossEntropy()), "kfac", ("batches of about 512",)),
        (evidence(500.0, SoftmaxCrossEntropy(), lost=(LostLeaf("w", 900, ""),)), "sophia_g", ("batches of about 512",)),
        (evidence(8.0, SoftmaxCrossEntropy(), steps=[StepCost("sgn", 1.0, 1.0)]), "sgn", ()),
    ],
)
def test_advice_follows(found, method, settings):
    advice = advise(found)
    assert (advice.method, advice.settings) == (method, settings)
    assert "because" in str(advice) and str(advice).endswith(".")


def test_counts_must_be_positive():
    with pytest.raises(ValueError, match="steps must be at least 1"):
        curvax.diagnose(linear, SquaredError(), jnp.zeros((3, 1)), {}, steps=0)


def _matrix(*arguments):
    matrix = ggn(*arguments)
    assert isinstance(matrix, CurvatureOperator)
    return matrix
