"""Damping by lam D in every lane that solves a system, against dense float64 truth."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.damping import Marquardt
from curvax.losses import SquaredError
from curvax.solvers import Cholesky
from tests.integration.harness import TOLERANCE, assert_close, batch_of, directions, key, moved, precision, truth_of
from tests.oracle import models
from tests.oracle.compiling import quick_jit

LAM = 1e-2
_MARQUARDT, _SQUARED = Marquardt(), SquaredError()


def _scaled(truth, diagonal: np.ndarray) -> np.ndarray:
    return np.linalg.solve(truth.ggn + LAM * np.diag(diagonal), truth.gradient)


def _method(name: str, model, scaling=_MARQUARDT, loss=_SQUARED):
    options = {"predict_fn": model.predict, "lam0": LAM, "scaling": scaling}
    if name == "sgn":
        return curvax.sgn(loss=loss, tol=1e-12, maxiter=400, **options)
    if name == "ggn_direct_mse":
        return curvax.ggn_direct_mse(**options)
    if name == "egn_mse_cg":
        return curvax.egn_mse_cg(tol=1e-12, maxiter=400, **options)
    return curvax.egn(loss=loss, **options)


@pytest.mark.parametrize(
    ("name", "model", "dtype"),
    [
        ("sgn", models.LINEAR, "float64"),
        ("ggn_direct_mse", models.LINEAR, "float32"),
        ("egn_mse_cg", models.LINEAR, "float64"),
        ("egn", models.CNN, "float64"),
        ("egn", models.MLP_TANH, "float32"),
    ],
    ids=str,
)
def test_direction_is_the_dense_one_and_the_maximum_runs(name, model, dtype):
    with precision(dtype):
        method = _method(name, model)
        params, state, step = model.params(dtype), None, None
        largest = 0.0
        state, step = method.init(params), quick_jit(method.step)
        for seed in (0, 1):
            batch = batch_of(model, "mse", dtype, seed=seed)
            with precision("float64"):
                exact = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), (params, batch))
                truth = truth_of(model, "mse", *exact)
            largest = np.maximum(largest, np.diag(truth.ggn))
            new, state, _ = step(params, batch, state, key())
            floor = np.where(largest > 0, largest, largest.max())
            assert_close(moved(params, new), _scaled(truth, floor), 10 * TOLERANCE[dtype], f"step {seed}")


def test_steps_do_not_depend_on_units():
    """A parameter in units a thousand times smaller takes a step a thousand times larger, trust region and all."""

    def predict(params, x):
        return jnp.exp(jnp.sin(x @ params))

    with precision("float64"):
        x, y = np.random.default_rng(0).standard_normal((9, 5)), np.random.default_rng(1).standard_normal(9)
        found = []
        for scale in (jnp.ones(5), jnp.asarray([1.0, 1e3, 1e-3, 1.0, 1e4])):
            method = curvax.gauss_newton(
                predict_fn=lambda p, x, scale=scale: predict(p * scale, x), loss=SquaredError(), scaling=Marquardt()
            )
            params, step = jnp.full(5, 0.1) / scale, quick_jit(method.step)
            state = method.init(params)
            for _ in range(8):
                params, state, info = step(params, {"x": jnp.asarray(x), "y": jnp.asarray(y)}, state, key())
            found.append((np.asarray(params * scale), float(info["lam"])))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-6)


def test_a_part_of_the_power():
    with precision("float64"):
        model, method = models.LINEAR, _method("egn", models.LINEAR, Marquardt(power=0.5))
        params, batch = model.params(), batch_of(model, "mse", "float64")
        (got,), _ = directions(method, params, batch)
        truth = truth_of(model, "mse", params, batch)
        assert_close(got, _scaled(truth, np.sqrt(np.diag(truth.ggn))), 1e-8)


def test_scaling_shows_in_the_plan_and_asks_for_rows():
    method = _method("egn", models.LINEAR, Marquardt(every=3))
    params, batch = models.LINEAR.params(jnp.float32), batch_of(models.LINEAR, "mse", "float32")
    text = method.plan_for(params, batch).explain()
    assert "scale of damping" in text and "every 3 steps" in text and "scaled by the largest diag(C) so far" in text
    with pytest.raises(ValueError, match=r"the Hessian.*has no rows"):
        curvax.assemble(
            curvature=curvax.curvature.Hessian(curvax.curvature.LossFunction(lambda p, b: jnp.sum(p))),
            solver=Cholesky(),
            scaling=Marquardt(),
        )
    with pytest.raises(ValueError, match="power must be above 0"):
        Marquardt(power=0.0)
