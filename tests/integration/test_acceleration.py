"""Geodesic acceleration: the second-order correction is the dense one in every lane, and only where it is small."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.losses import SquaredError
from curvax.solvers import GeodesicAcceleration
from curvax.solvers.dense import factorized
from tests.integration.harness import key, moved
from tests.oracle.compiling import quick_jit
from tests.oracle.token_model import drawn

LAM, EXACT = 0.3, {"tol": 1e-13, "maxiter": 200}
RECORD = (curvax.telemetry.MetricRecord(curvax.telemetry.Metric.ACCELERATION),)


def _predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


@functools.cache
def _problem() -> tuple[Any, dict, np.ndarray, np.ndarray]:
    """(parameters, batch, direction s, correction c), dense."""
    params = {"v": drawn(0, 4, 2), "w": drawn(1, 3, 4)}
    batch = {"x": drawn(2, 7, 3), "y": drawn(3, 7, 2)}

    def outputs(vector: jax.Array) -> jax.Array:
        return _predict({"v": vector[:8].reshape(4, 2), "w": vector[8:].reshape(3, 4)}, batch["x"]).ravel()

    at = np.concatenate([np.ravel(params["v"]), np.ravel(params["w"])])
    dense = quick_jit(lambda at: (outputs(at), jax.jacobian(outputs)(at), jax.hessian(outputs)(at)))
    out, jacobian, hessians = map(np.asarray, dense(at))
    system = jacobian.T @ jacobian / 7 + LAM * np.eye(20)
    s = np.linalg.solve(system, jacobian.T @ (out - np.ravel(batch["y"])) / 7)
    bent = np.einsum("kij,i,j->k", hessians, s, s)
    return params, batch, s, np.linalg.solve(system, jacobian.T @ bent / 7) / 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("egn", {}),
        ("sgn", EXACT | {"microbatch_size": 3}),
        ("egn_mse_cg", EXACT),
        ("ggn_direct_mse", {}),
    ],
)
def test_the_correction_is_the_dense_one(name: str, options: dict, x64: None) -> None:
    params, batch, s, c = _problem()
    ratio = 2 * np.linalg.norm(c) / np.linalg.norm(s)
    loss = {"loss": SquaredError()} if name in ("egn", "sgn") else {}

    @quick_jit
    def run(most: jax.Array) -> tuple[Any, dict]:
        accelerated = {"acceleration": GeodesicAcceleration(most), "metrics": RECORD}
        method = curvax.make(name, predict_fn=_predict, lam0=LAM, **accelerated, **loss, **options)
        after, _, info = method.step(params, batch, method.init(params), key())
        return after, info

    for most, want in ((2 * ratio, s + c), (ratio / 2, s)):
        after, info = run(most)
        np.testing.assert_allclose(moved(params, after), want, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(float(info["acceleration"]), ratio, rtol=1e-8)
        assert float(info["residual"]) < 1e-9
    assert np.linalg.norm(c) > 0.01 * np.linalg.norm(s)


def test_one_factor_serves_several_right_hand_sides(x64: None) -> None:
    """Singular and indefinite systems go by eigenvalues, as they do without a factor."""
    half, b = np.asarray(drawn(4, 6, 4)), np.asarray(drawn(5, 6))
    signs = np.diag([1.0, 2.0, -3.0, 4.0, 5.0, 6.0])
    solve = quick_jit(lambda c, lam, b: factorized(c, lam, "reference")(b))
    for c, lam, result in (
        (half @ half.T, 0.1, "CONVERGED"),
        (half @ half.T, 0.0, "SINGULAR"),
        (signs, 0.0, "INDEFINITE"),
    ):
        x, code, _ = solve(c, jnp.asarray(lam), b)
        want = np.linalg.pinv(np.abs(c) if result == "INDEFINITE" else c + lam * np.eye(6), rcond=1e-10) @ b
        np.testing.assert_allclose(x, want, rtol=1e-8, atol=1e-10)
        assert curvax.solvers.Result(int(code)).name == result


def test_what_cannot_be_accelerated_says_so() -> None:
    @jax.custom_vjp
    def opaque(x: jax.Array) -> jax.Array:
        return jnp.sin(x)

    opaque.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * jnp.cos(x),))
    method = curvax.egn(predict_fn=lambda p, x: opaque(x @ p), loss=SquaredError(), acceleration=GeodesicAcceleration())
    params = jnp.ones((3, 2))
    with pytest.raises(ValueError, match="holds a custom_vjp: drop"):
        jax.eval_shape(method.step, params, {"x": jnp.ones((4, 3)), "y": jnp.ones((4, 2))}, method.init(params))
    with pytest.raises(ValueError, match="drop it, or take egn"):
        curvax.assemble(
            curvature=curvax.curvature.Hessian(curvax.curvature.LossFunction(lambda p, b: jnp.sum(p**2))),
            solver=curvax.solvers.CG(), acceleration=GeodesicAcceleration(),
        )  # fmt: skip
