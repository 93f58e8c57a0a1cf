"""Solvers inside whole steps: warm starts, stopping, preconditioners, momentum in row space."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.solvers import Result
from tests.integration import presets
from tests.integration.harness import (
    TOLERANCE,
    assert_close,
    batch_of,
    directions,
    key,
    moved,
    precision,
    standard_truth,
    truth_of,
)
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

MODEL = models.MLP_TANH
LAM = 1e-2
ITERATIVE = ["sgn_ce", "sgn_mse", "egn_mse_cg"]


@pytest.mark.fast
@pytest.mark.parametrize("name", ITERATIVE)
def test_warm_start_spends_nothing_on_a_solved_system(name):
    preset = presets.BY_NAME[name]
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, preset.kind, "float64")
        options = {"lam0": LAM, "tol": 1e-10, "maxiter": 300}
        found, infos = directions(preset.make(MODEL, warm_start=True, **options), params, batch, 2)
        cold, cold_infos = directions(preset.make(MODEL, warm_start=False, **options), params, batch, 2)
    # Two programs round differently, which may shift the end by an iteration.
    assert cold_infos[0]["iterations"] == cold_infos[1]["iterations"] > 3
    assert abs(int(infos[0]["iterations"]) - int(cold_infos[0]["iterations"])) <= 1
    # In row space the direction is seen through the rows, which multiplies its error by the curvature over lam.
    limit = cold_infos[1]["iterations"] // 3 if name == "egn_mse_cg" else 2
    assert infos[1]["iterations"] <= limit
    for step in (*found, *cold):
        assert_close(step, standard_truth(MODEL, preset.kind).direction(LAM), 1e-7)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_mse_cg", "newton_cg"])
def test_stopping_is_reported_as_it_was(name):
    preset = presets.BY_NAME[name]
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, preset.kind, "float64")
        _, (limited,) = directions(preset.make(MODEL, lam0=10.0, maxiter=2, tol=1e-12), params, batch)
        (_step,), (converged,) = directions(preset.make(MODEL, lam0=10.0, maxiter=300, tol=1e-6), params, batch)
    assert int(limited["result"]) == Result.MAX_ITERATIONS and int(limited["iterations"]) == 2
    assert int(converged["result"]) == Result.CONVERGED
    assert 2 < int(converged["iterations"]) < 300
    assert float(converged["residual"]) <= 1.01e-6 < float(limited["residual"])


@pytest.mark.parametrize("name", ["sgn_ce", "egn_mse_cg", "egn_ce"])
def test_reported_residual_is_the_dense_one(name):
    preset = presets.BY_NAME[name]
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, preset.kind, "float64")
        options = {"maxiter": 5, "tol": 1e-12} if name in ITERATIVE else {}
        (step,), (info,) = directions(preset.make(MODEL, lam0=LAM, **options), params, batch)
        truth = standard_truth(MODEL, preset.kind)
    rest = truth.gradient - truth.ggn @ step - LAM * step
    want = np.linalg.norm(rest) / np.linalg.norm(truth.gradient)
    assert float(info["residual"]) == pytest.approx(want, rel=1e-3, abs=1e-12)


def test_iterates_of_row_and_parameter_space_cg_are_the_same():
    """Row-space CG stopped early gives the direction of parameter-space CG stopped as early."""
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "mse", "float64")
        for maxiter in (1, 3, 6):
            options = {"lam0": LAM, "tol": 0.0, "maxiter": maxiter, "warm_start": False}
            (row,), _ = directions(curvax.egn_mse_cg(predict_fn=MODEL.predict, **options), params, batch)
            (param,), _ = directions(curvax.sgn_mse(predict_fn=MODEL.predict, **options), params, batch)
            assert_close(row, param, 1e-7, f"{maxiter} iterations")


@pytest.mark.parametrize("name", [*ITERATIVE, "newton_cg"])
def test_a_tolerance_beyond_the_dtype_does_no_harm(name):
    """In float32 nothing reaches 1e-9: the iteration goes on to its limit or stops, and the answer stays good."""
    preset = presets.BY_NAME[name]
    with precision("float32"):
        model = models.SCALAR if preset.kind == "mse" else models.LINEAR
        params, batch = model.params(jnp.float32), batch_of(model, preset.kind, jnp.float32)
        method = preset.make(model, lam0=1e-3, tol=1e-9, maxiter=1000)
        (step,), (info,) = directions(method, params, batch)
    assert_close(step, standard_truth(model, preset.kind).direction(1e-3), TOLERANCE["float32"])
    assert float(info["residual"]) < 1e-2


PRECONDITIONERS = {
    "diag_direct": lambda: {"precond": "diag_direct", "estimator": "hutchinson"},
    "diag_ema": lambda: {"precond": "diag_ema", "estimator": "gnb_ce"},
    "jacobi": lambda: {"precond": curvax.preconditioners.Jacobi(curvax.estimators.Hutchinson(n_probes=4))},
    "nystrom": lambda: {"precond": curvax.preconditioners.NystromPreconditioner(rank=8)},
}


@pytest.mark.parametrize("name", list(PRECONDITIONERS))
def test_preconditioners_change_the_way_and_not_the_answer(name):
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        method = curvax.sgn_ce(predict_fn=MODEL.predict, lam0=LAM, tol=1e-11, maxiter=1000, **PRECONDITIONERS[name]())
        found, infos = directions(method, params, batch, 2)
    for step, info in zip(found, infos, strict=True):
        assert int(info["result"]) == Result.CONVERGED
        assert_close(step, standard_truth(MODEL, "ce").direction(LAM), TOLERANCE["float64"])


def test_nystrom_of_full_rank_needs_next_to_no_iterations():
    with precision("float64"):
        params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
        plain = curvax.sgn_ce(predict_fn=MODEL.predict, lam0=1e-4, tol=1e-8, maxiter=1000)
        helped = curvax.sgn_ce(
            predict_fn=MODEL.predict,
            lam0=1e-4,
            tol=1e-8,
            maxiter=1000,
            precond=curvax.preconditioners.NystromPreconditioner(rank=30),
        )
        _, (without,) = directions(plain, params, batch)
        _, (with_it,) = directions(helped, params, batch)
    assert int(with_it["iterations"]) <= 6 < int(without["iterations"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("model", [models.MLP_TANH, models.SCALAR], ids=str)
def test_spring_is_its_own_recursion(model, momentum):
    """(C + lam I) s_k = g + lam mu s_(k-1): the previous direction where the batch says nothing."""
    with precision("float64"):
        params = model.params()
        method = curvax.spring(predict_fn=model.predict, loss=curvax.losses.SquaredError(), lam0=LAM, momentum=momentum)
        step, state = quick_jit(method.step), method.init(params)
        previous = np.zeros_like(dense.vector(params))
        for i in range(3):
            batch = batch_of(model, "mse", "float64", seed=i)
            truth = truth_of(model, "mse", params, batch)
            new, state, _ = step(params, batch, state, key())
            want = dense.damped_direction(truth.ggn, truth.gradient + LAM * momentum * previous, LAM)
            assert_close(moved(params, new), want, TOLERANCE["float64"], f"step {i}")
            params, previous = new, want


def test_centred_squared_error_projects_the_mean_out():
    """Variational Monte Carlo: energies enter minus their batch mean, and so do the Jacobian rows."""
    model = models.SCALAR
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        loss = curvax.losses.SquaredError(centered=True)
        truth = truth_of(model, "mse", params, batch)
        rows = truth.jacobian - truth.jacobian.mean(0)
        residual = truth.outputs - np.asarray(batch["y"])
        count = len(residual)
        gradient, matrix = rows.T @ (residual - residual.mean()) / count, rows.T @ rows / count
        want = dense.damped_direction(matrix, gradient, LAM)
        for method in (
            curvax.spring(predict_fn=model.predict, loss=loss, lam0=LAM, momentum=0.0),
            curvax.egn(predict_fn=model.predict, loss=loss, lam0=LAM),
            curvax.sgn(predict_fn=model.predict, loss=loss, lam0=LAM, tol=1e-12, maxiter=300),
        ):
            (got,), _ = directions(method, params, batch)
            assert_close(got, want, TOLERANCE["float64"])


def _indefinite(size=10):
    rng = np.random.default_rng(1)
    q, _ = np.linalg.qr(rng.standard_normal((size, size)))
    return q @ np.diag(np.concatenate([[-4.0, -1.0], np.linspace(0.5, 3.0, size - 2)])) @ q.T


def test_stale_warm_start_on_an_indefinite_hessian_still_descends():
    """The gradient turns round between two steps, so the previous solution points uphill: it must not be returned."""
    matrix = _indefinite()
    first = np.random.default_rng(2).standard_normal(len(matrix))

    def loss_fn(params, batch):
        return 0.5 * params @ jnp.asarray(matrix, params.dtype) @ params + batch["x"].astype(params.dtype) @ params

    with precision("float64"):
        method = curvax.newton_cg(loss_fn=loss_fn, lam0=1e-2, warm_start=True)
        params = jnp.zeros(len(matrix))
        step, state = quick_jit(method.step), method.init(params)
        for sign in (1.0, -1.0, 1.0, -1.0):
            gradient = sign * first
            new, state, _info = step(params, {"x": jnp.asarray(gradient)}, state, key())
            direction = moved(params, new)
            assert np.all(np.isfinite(direction))
            assert direction @ gradient > 0, f"uphill at gradient sign {sign:g}"


def test_newton_direct_on_an_indefinite_hessian_adds_lam_to_the_magnitudes_of_its_eigenvalues():
    matrix = _indefinite()
    gradient = np.random.default_rng(2).standard_normal(len(matrix))

    def loss_fn(params, batch):
        return 0.5 * params @ jnp.asarray(matrix, params.dtype) @ params + batch["x"].astype(params.dtype) @ params

    with precision("float64"):
        method = curvax.newton_direct(loss_fn=loss_fn, lam0=1e-2)
        (step,), (info,) = directions(method, jnp.zeros(len(matrix)), {"x": jnp.asarray(gradient)})
    assert int(info["result"]) == Result.INDEFINITE
    values, vectors = np.linalg.eigh(matrix)
    np.testing.assert_allclose(step, vectors @ ((vectors.T @ gradient) / (np.abs(values) + 1e-2)), rtol=1e-8)


@pytest.mark.parametrize("name", ["sgn_ce", "egn_mse_cg"])
def test_curvature_batch_of_another_size_keeps_the_warm_start_usable(name):
    """States do not depend on the batch size: batches of 6, then 4, then 6 examples run with one state."""
    preset = presets.BY_NAME[name]
    with precision("float64"):
        params = MODEL.params()
        method = preset.make(MODEL, lam0=LAM, tol=1e-12, maxiter=300)
        step, state = quick_jit(method.step), method.init(params)
        for size in (6, 4, 6):
            batch = jax.tree.map(lambda x, size=size: x[:size], batch_of(MODEL, preset.kind, "float64", seed=size))
            new, state, _ = step(params, batch, state, key())
            assert_close(moved(params, new), truth_of(MODEL, preset.kind, params, batch).direction(LAM), 1e-8)
