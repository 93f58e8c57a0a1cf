"""Where pieces meet: microbatches with keys and states, sizes read as numbers, uphill starts, wrong arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax.damping import TrustRegion
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.solvers import CG, Result, System
from curvax.telemetry import MetricRecord
from tests.oracle.compiling import quick_jit
from tests.oracle.token_model import drawn

LAM = 0.1


@pytest.fixture
def problem(x64: None) -> Any:
    return {"w": drawn(0, 6, 8), "v": drawn(1, 8, 3)}, {"x": drawn(2, 5, 6), "y": drawn(3, 5, 3)}


def mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def dropout(params: Any, x: jax.Array, rng: jax.Array) -> jax.Array:
    mask = jax.random.bernoulli(rng, 0.5, (8,)).astype(x.dtype)
    return (jnp.tanh(x @ params["w"]) * mask) @ params["v"]


def annealed(params: Any, x: jax.Array, state: Any) -> tuple[jax.Array, Any]:
    return mlp(params, x) * (1 + state["t"]), {"t": state["t"] + 1.0}


def moved(method: curvax.Method, params: Any, batch: Any, **init: Any) -> tuple[np.ndarray, Any]:
    new, _, info = quick_jit(method.step)(params, batch, method.init(params, **init), jax.random.key(3))
    return np.concatenate([np.ravel(new[k] - params[k]) for k in params]), info


@pytest.mark.parametrize("kind", ["dropout", "state"])
def test_row_lane_and_cg_agree_on_microbatches_with_keys_and_states(problem: Any, kind: str) -> None:
    params, batch = problem
    options: dict[str, Any] = {"loss": SquaredError(), "lam0": LAM, "microbatch_size": 2}
    init: dict[str, Any] = {}
    if kind == "dropout":
        options |= {"predict_fn": dropout, "has_rng": True}
    else:
        options |= {"predict_fn": annealed, "has_state": True}
        init = {"model_state": {"t": jnp.zeros(())}}
    rows, info = moved(curvax.egn(**options), params, batch, **init)
    products, _ = moved(curvax.sgn(tol=1e-13, maxiter=200, **options), params, batch, **init)
    np.testing.assert_allclose(rows, products, rtol=1e-8, atol=1e-10)
    assert info["residual"] < 1e-10


@pytest.mark.parametrize(
    "predict",
    [
        lambda p, x: mlp(p, x) * jnp.arange(x.shape[0] + 1).sum().astype(x.dtype),
        lambda p, x: x[:, : x.shape[0]] @ p["w"][: x.shape[0], :3],
    ],
    ids=["length of a range", "number of columns"],
)
def test_batch_size_read_through_a_shape(problem: Any, predict: Callable[..., Any]) -> None:
    params, batch = problem
    with pytest.warns(UserWarning, match="the model's examples interact"):
        _, info = moved(curvax.egn(predict_fn=predict, loss=SquaredError(), lam0=LAM), params, batch)
    assert info["residual"] < 1e-10 and info["result"] == Result.CONVERGED


def test_cg_never_returns_an_uphill_direction(x64: None) -> None:
    a, b = jnp.array([[1.0, 0.3], [0.3, -0.2]]), jnp.array([1.0, 0.1])
    start = jnp.array([0.5, 5.0])
    solve = quick_jit(lambda b, start: CG(tol=1e-10).iterate(System(lambda v: a @ v), b, start, jnp.asarray(0.0)))
    solution = solve(b, start)
    assert float(b @ solution.value) > 0
    assert int(solution.result) == Result.NEGATIVE_CURVATURE


def test_curvature_batch_without_damping_says_that_it_failed(problem: Any) -> None:
    params, batch = problem
    method = curvax.egn(predict_fn=mlp, loss=SquaredError(), lam0=0.0)
    step = quick_jit(lambda p, b, s: method.step(p, b, s, curvature_batch=b))
    new, _, info = step(params, batch, method.init(params))
    assert not bool(info["accepted"]) and info["result"] == Result.NON_FINITE
    assert all(np.array_equal(new[k], params[k]) for k in params)


def test_spring_forgets_a_rejected_direction(problem: Any) -> None:
    params, batch = problem
    method = curvax.spring(predict_fn=mlp, lam0=1e-6, lam_policy="trust_region", learning_rate=1e6, momentum=0.9)
    _, state, info = quick_jit(method.step)(params, batch, method.init(params))
    assert not bool(info["accepted"])
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(state.solver))


# What a type checker refuses, a running program must refuse too.
untyped: Any = curvax
record: Any = MetricRecord

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "no learning rate": (lambda: untyped.sgn_ce(predict_fn=mlp, learning_rate=None), "learning_rate must be a number"),
    "no learning rate, sophia": (lambda: untyped.sophia_g(predict_fn=mlp, learning_rate=None), "learning_rate must be"),
    "class as loss": (lambda: untyped.sgn(predict_fn=mlp, loss=SoftmaxCrossEntropy), "pass an instance"),
    "function as loss": (lambda: untyped.sgn(predict_fn=mlp, loss=lambda f, y: f), "CustomLoss"),
    "negative array": (lambda: untyped.sgn_ce(predict_fn=mlp, lam0=jnp.asarray(-0.5)), "at least 0"),
    "text as damping": (lambda: untyped.sgn_ce(predict_fn=mlp, lam0="1"), "must be a number"),
    "trust region from zero": (lambda: TrustRegion(0.0), "above 0"),
    "trust region options without one": (
        lambda: untyped.sgn_ce(predict_fn=mlp, lam0=1.0, lam_kwargs={"min_lam": 1.0}),
        "trust_region",
    ),
    "schedule without one": (lambda: untyped.sgn_ce(predict_fn=mlp, lam_policy="schedule"), "schedule"),
    "unknown metric": (lambda: record("los"), "los"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_are_refused_at_construction(name: str) -> None:
    make, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def test_wrong_calls_are_refused_in_a_sentence(problem: Any) -> None:
    params, batch = problem
    method = curvax.sgn_mse(predict_fn=mlp)
    state = method.init(params)
    with pytest.raises(TypeError, match="step takes"):
        untyped.Method.step(method, params, state, batch)
    with pytest.raises(TypeError, match="random key"):
        untyped.Method.step(method, params, batch, state, 0)
    with pytest.raises(ValueError, match="empty"):
        method.step(params, jax.tree.map(lambda x: x[:0], batch), state)
    with pytest.raises(ValueError, match="model_state"):
        curvax.sgn_mse(predict_fn=annealed, has_state=True).init(params)
    with pytest.raises(ValueError, match="has_state"):
        method.init(params, model_state={"t": jnp.zeros(())})
    with pytest.raises(ValueError, match="boolean"):
        curvax.sgn_mse(predict_fn=mlp, frozen={"w": "False", "v": False}).init(params)


def test_the_report_gives_the_planners_reasons(problem: Any) -> None:
    params, batch = problem
    curvax.clear_report()
    method = curvax.sgn_mse(predict_fn=mlp)
    jax.eval_shape(method.step, params, batch, method.init(params))
    reasons = [record.choice.reason for record in curvax.report()]
    assert reasons and all(reason.startswith("auto") for reason in reasons)
