"""What really runs, and when: callbacks inside the model count executions on the device, step by step."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.integration import presets
from tests.integration.harness import (
    Counter,
    CountingEstimator,
    batch_of,
    counted,
    key,
    precision,
    steps_where_more_ran,
)
from tests.oracle import models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
STEPS = 12


def _counts(make, kind, steps=STEPS, plan="shared"):
    """(executions of the model per step, infos) over `steps` steps of a method made around a counting model."""
    counter = Counter()
    with precision("float32"):
        method = make(counted(MODEL.predict, counter), plan)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, kind, jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        counts, infos = [], []
        for _ in range(steps):
            params, state, info = step(params, batch, state, key())
            counts.append(counter.take().get("run", 0))
            infos.append({name: np.asarray(value) for name, value in info.items()})
    return counts, infos


def _due(*periods, steps=STEPS):
    return [i for i in range(steps) if any(i % period == 0 for period in periods)]


def _telemetry_and_trust_region(predict, plan):
    return curvax.sgn_ce(
        predict_fn=predict,
        lam_policy="trust_region",
        lam0=5.0,
        lam_kwargs={"every": 5},
        record_rho_every_k=3,
        plan=plan,
        # A fixed number of products: without sharing each of them runs the model again.
        maxiter=2,
        tol=0.0,
        warm_start=False,
    )


def test_telemetry_every_3_and_trust_region_every_5_keep_their_own_time():
    counts, infos = _counts(_telemetry_and_trust_region, "ce")
    assert steps_where_more_ran(counts) == _due(3, 5) == [0, 3, 5, 6, 9, 10]
    assert set(counts) == {min(counts), min(counts) + 1}, "one forward pass is all that an evaluation adds"
    reported = [i for i, info in enumerate(infos) if np.isfinite(info["rho"])]
    assert reported == _due(3)
    lams = [float(info["lam"]) for info in infos]
    changed = [i for i in range(1, STEPS) if lams[i] != lams[i - 1]]
    # lam is reported as used, so a change decided at step 5 shows at step 6.
    assert set(changed) <= {1, 6, 11} and changed, f"lam changed at {changed}"


def test_with_the_plan_off_the_same_work_runs_in_every_step():
    counts, _ = _counts(_telemetry_and_trust_region, "ce", steps=4, plan="off")
    planned, _ = _counts(_telemetry_and_trust_region, "ce", steps=4)
    assert steps_where_more_ran(counts) == []
    assert min(counts) > max(planned)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sgn_ce", "egn_mse_cg", "newton_cg", "adahessian", "sophia_g"])
def test_plain_step_evaluates_the_model_once(name):
    preset = presets.BY_NAME[name]
    every = {"lam0": 1.0} if preset.damped else {"eval_every_k": 1}
    counts, _ = _counts(lambda predict, plan: preset.make(predict, plan=plan, **every), preset.kind, steps=3)
    assert counts == [1, 1, 1]


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sophia_g", "sophia_h", "adahessian"])
def test_curvature_is_refreshed_at_its_cadence_and_at_no_other_step(name):
    preset, every = presets.BY_NAME[name], 4
    counts, _ = _counts(lambda predict, plan: preset.make(predict, plan=plan, eval_every_k=every), preset.kind)
    assert steps_where_more_ran(counts) == _due(every)
    assert min(counts) == 1, "between refreshes only the gradient is computed"


def test_default_sophia_refreshes_every_10():
    for name in ("sophia_g", "sophia_h"):
        counts, _ = _counts(lambda predict, plan, name=name: presets.BY_NAME[name].make(predict, plan=plan), "ce")
        assert steps_where_more_ran(counts) == [0, 10]


@pytest.mark.parametrize("every", [1, 3])
def test_preconditioner_of_a_solver_is_refreshed_at_its_cadence(every):
    counter = Counter()
    with precision("float32"):
        preconditioner = curvax.preconditioners.EmaDiagonal(CountingEstimator(counter), every=every)
        method = curvax.sgn_ce(predict_fn=MODEL.predict, precond=preconditioner)
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        step, state = quick_jit(method.step), method.init(params)
        ran = []
        for _ in range(7):
            params, state, _ = step(params, batch, state, key())
            ran.append(counter.take().get("estimate", 0))
    assert ran == [1 if i % every == 0 else 0 for i in range(7)]


def test_recorded_metrics_are_missing_when_not_due():
    def make(predict, plan):
        return curvax.sgn_ce(predict_fn=predict, lam0=1.0, record_loss_every_k=4, record_rho_every_k=2, plan=plan)

    counts, infos = _counts(make, "ce", steps=6)
    assert [i for i, info in enumerate(infos) if np.isfinite(info["loss"])] == [0, 4]
    assert [i for i, info in enumerate(infos) if np.isfinite(info["rho"])] == [0, 2, 4]
    assert steps_where_more_ran(counts) == [0, 2, 4]
    assert [int(info["step"]) for info in infos] == list(range(6))


def test_switched_off_metrics_are_not_in_the_info():
    with precision("float32"):
        method = curvax.sgn_ce(
            predict_fn=MODEL.predict, record_loss_every_k=-1, record_lam=False, record_cg_stats=False
        )
        params, batch = MODEL.params(jnp.float32), batch_of(MODEL, "ce", jnp.float32)
        _, _, info = quick_jit(method.step)(params, batch, method.init(params), key())
    assert set(info) == {"step", "accepted", "finite", "rejected", "batch_fault"}
