"""The page: each number against a dense or explicit one, and advice for runs that differ."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.diagnosis.advice import Evidence, advise
from curvax.diagnosis.noise import GradientNoise, gradient_noise
from curvax.diagnosis.spectrum import Curved
from curvax.diagnosis.steps import StepCost
from curvax.diagnosis.structure import LostLeaf, lost_leaves
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.operators import CurvatureOperator, Quadrature, ggn
from tests.operators.problem import LOSS, problem
from tests.oracle.models import MLP_TANH


class Loader:
    """Starts anew at each iteration."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


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


def test_page_of_a_masked_run_from_a_loader(x64, quick_programs, tmp_path):
    p = problem(MLP_TANH)
    page = curvax.diagnose(p.model, LOSS, p.params, Loader(p.batches))
    values = np.linalg.eigvalsh(p.truth.ggn)[::-1]
    np.testing.assert_allclose(page.curvature.top, values[:5], rtol=1e-3)
    assert page.curvature.trace == pytest.approx(values.sum(), rel=1e-9)
    assert 1 <= page.curvature.effective_rank <= len(values)
    assert page.lost == ()
    assert {step.preset for step in page.steps if step.seconds} >= {"egn", "kfac", "sgn", "sophia_g"}
    text = str(page)
    for title in ("gradient ", "curvature ", "structure ", "a step ", "advice "):
        assert f"\n{title}" in f"\n{text}"
    assert json.loads(json.dumps(page.as_dict()))["advice"]["method"] == page.advice.method
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
    steps = [StepCost(name, 1.0, 1.0) for name in ("gauss_newton", "egn", "sgn", "kfac", "sophia_g", "sophia_h")]
    found = Evidence(loss, 640, 4, noise, curvature, (), steps)
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
