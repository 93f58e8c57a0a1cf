"""Trust-region damping: rho is the dense quantity, bad steps are undone whole, lam moves as promised."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.damping import Outcome, TrustRegion
from tests.integration import presets
from tests.integration.harness import all_finite, batch_of, key, precision, same_bits, truth_of
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
PRESETS = [presets.BY_NAME[name] for name in ("sgn_ce", "egn_ce", "egn_mse_cg", "newton_cg")]


def _traces(state):
    """Momentum buffers inside a method's state, wherever they are kept."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, optax.TraceState))
    return [leaf for leaf in leaves if isinstance(leaf, optax.TraceState)]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_mse"])
@pytest.mark.parametrize("rate", [1.0, 0.3])
def test_rho_is_actual_over_predicted_decrease(name, rate):
    preset, lam = presets.BY_NAME[name], 0.5
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, preset.kind, "float64")
        options = {"tol": 1e-12, "maxiter": 500} if name == "sgn_ce" else {}
        method = preset.make(
            MODEL, lam_policy="trust_region", lam0=lam, learning_rate=rate, record_rho_every_k=1, **options
        )
        new, _, info = quick_jit(method.step)(params, batch, method.init(params), key())
        before, after = truth_of(MODEL, preset.kind, params, batch), truth_of(MODEL, preset.kind, new, batch)
        update = -rate * before.direction(lam)
        predicted = -(before.gradient @ update + 0.5 * update @ before.ggn @ update)
        actual = before.loss.value - after.loss.value
    assert float(info["rho"]) == pytest.approx(actual / predicted, rel=1e-6)


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_a_step_that_raises_the_loss_is_undone_whole(preset):
    with precision("float32"):
        method = preset.make(
            MODEL,
            lam_policy="trust_region",
            lam0=1e-3,
            learning_rate=1e3,
            direction_momentum=0.9,
            record_rho_every_k=1,
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        (before,) = _traces(state)
        same, after, info = step(params, batch, state, key())
        assert not bool(info["accepted"]) and bool(info["finite"])
        assert not float(info["rho"]) >= 0.25, "rho is NaN where the overshooting step promises no decrease at all"
        assert same_bits(params, same)
        assert same_bits(before, _traces(after)[0]), "the transform kept the rejected step"
        _, _, following = step(same, batch, after, key())
        assert float(following["lam"]) > float(info["lam"])


@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_lam_falls_while_steps_are_good_and_the_loss_falls(preset):
    with precision("float32"):
        method = preset.make(MODEL, lam_policy="trust_region", lam0=10.0)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, preset.kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        lams, losses = [], []
        for _ in range(6):
            params, state, info = step(params, batch, state, key())
            lams.append(float(info["lam"]))
            losses.append(float(info["loss"]))
    assert lams[-1] < lams[0]
    assert losses[-1] < losses[0]
    # A rejected step keeps the parameters, so on one batch the loss never rises.
    assert np.all(np.diff(losses) <= 1e-6 * losses[0])


def test_recovers_from_a_hopeless_start():
    """With lam far too small at first, rejections raise it until steps are taken."""
    with precision("float32"):
        method = curvax.sgn_ce(
            predict_fn=MODEL.predict,
            lam_policy="trust_region",
            lam0=1e-4,
            lam_kwargs={"inc": 4.0},
            learning_rate=8.0,
            maxiter=50,
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        accepted, losses = [], []
        for _ in range(20):
            params, state, info = step(params, batch, state, key())
            accepted.append(bool(info["accepted"]))
            losses.append(float(info["loss"]))
    assert not accepted[0] and any(accepted)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("rho_target", "factor"), [("good", 0.25), ("bad", 3.0)], ids=["lowers_by_dec", "raises_by_inc"]
)
def test_factors_are_those_given(rho_target, factor):
    kwargs = {"inc": 3.0, "dec": 0.25}
    with precision("float32"):
        method = curvax.ggn_direct_mse(
            predict_fn=models.LINEAR.predict,
            lam_policy="trust_region",
            lam0=1e-2,
            lam_kwargs=kwargs,
            record_rho_every_k=1,
            learning_rate=1.0 if rho_target == "good" else 1e3,
        )
        params, batch = models.LINEAR.params(jnp.float32), batch_of(models.LINEAR, "mse", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        new, state, info = step(params, batch, state, key())
        _, _, following = step(new, batch, state, key())
    # The squared error of a linear model is its own quadratic model: a good step has rho = 1 exactly.
    if rho_target == "good":
        assert float(info["rho"]) == pytest.approx(1.0, rel=1e-3)
    assert float(following["lam"]) == pytest.approx(factor * float(info["lam"]), rel=1e-5)


def test_lam_stays_inside_its_bounds():
    with precision("float32"):
        method = curvax.ggn_direct_mse(
            predict_fn=models.LINEAR.predict,
            lam_policy="trust_region",
            lam0=1.0,
            lam_kwargs={"dec": 0.1, "min_lam": 0.05},
        )
        params, batch = models.LINEAR.params(jnp.float32), batch_of(models.LINEAR, "mse", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        for _ in range(5):
            params, state, info = step(params, batch, state, key())
        assert float(info["lam"]) == pytest.approx(0.05, rel=1e-5)
        assert all_finite(params)


def test_a_policy_object_and_its_name_do_the_same():
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        outcomes = []
        choices: tuple[dict[str, Any], ...] = (
            {"lam_policy": "trust_region", "lam0": 0.5, "lam_kwargs": {"every": 2}},
            {"lam_policy": curvax.damping.TrustRegion(lam0=0.5, every=2)},
        )
        for options in choices:
            method = curvax.sgn_ce(predict_fn=MODEL.predict, **options)
            step, p, state = quick_jit(method.step), params, method.init(params)
            for _ in range(4):
                p, state, _ = step(p, batch, state, key())
            outcomes.append(dense.vector(p))
    np.testing.assert_array_equal(*outcomes)


@pytest.mark.parametrize("region", [{}, {"every": 5, "inc": (20 / 19) ** 5, "dec": (19 / 20) ** 5}], ids=["lm", "kfac"])
def test_refusals_in_a_row_find_a_damping_that_is_many_orders_off(region: dict, x64: None) -> None:
    """The k-th refusal multiplies lam by inc^k: 20 orders take at most 20 refusals; one factor of 1.5 each took 114."""
    policy = curvax.damping.TrustRegion(lam0=1e-20, **region)
    state, count = policy.init(), 0
    one, yes = jnp.ones(()), jnp.asarray(True)
    worse = curvax.damping.Outcome(yes, yes, loss=one, loss_after=2 * one, predicted=one, curvature=one)
    update = quick_jit(policy.update)
    while float(policy.lam(state)) < 1.0:
        state, count = update(state, worse, yes), count + 1
    assert count <= 20


def test_lam_stays_finite_however_often_steps_are_refused():
    """As where no curvature is ever finite: from infinity no factor leads back."""
    policy, missing = TrustRegion(), jnp.full((), jnp.nan)
    started = dataclasses.replace(policy.init(), lam=jnp.ones(()))
    refused = Outcome(jnp.asarray(False), jnp.asarray(False), jnp.ones(()), missing, missing)
    state = jax.lax.fori_loop(0, 100, lambda _, s: policy.update(s, refused, jnp.asarray(True)), started)
    assert jnp.isfinite(state.lam) and state.lam > 1e9
