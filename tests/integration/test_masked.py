"""What has weight zero contributes exactly nothing: examples, and positions, whose numbers or slopes are not finite."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.curvature import GeneralizedGaussNewton
from curvax.layerwise import ByLeaf, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.integration.harness import TOLERANCE, all_finite, assert_close, key, moved, precision, truth_of
from tests.oracle.compiling import quick_jit

PyTree = Any
LAM = 0.1
EXACT = {"tol": 1e-13, "maxiter": 300}


def _drawn(seed: int, *shape: int, dtype: Any = None) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def _params(dtype: Any = None) -> PyTree:
    return {"w": _drawn(0, 4, 5, dtype=dtype), "v": _drawn(1, 5, 2, dtype=dtype)}


# Each has an infinite slope, or is not a number, at zero; all act on the last axis.
MODELS: dict[str, Callable[[PyTree, jax.Array], jax.Array]] = {
    "logarithm": lambda p, x: jnp.log(jnp.abs(x @ p["w"])) @ p["v"],
    "root": lambda p, x: jnp.sqrt(jnp.abs(x @ p["w"])) @ p["v"],
    "norm": lambda p, x: jnp.linalg.norm(x @ p["w"], axis=-1, keepdims=True) * p["v"][0],
    "direction": lambda p, x: ((x @ p["w"]) / jnp.sqrt(jnp.sum(jnp.square(x @ p["w"]), -1, keepdims=True))) @ p["v"],
}
JUNK = {"zero": 0.0, "not a number": np.nan, "infinite": np.inf}
METHODS: dict[str, Callable[..., Any]] = {
    "sgn": lambda **k: curvax.sgn(loss=SquaredError(), lam0=LAM, **EXACT, **k),
    "egn": lambda **k: curvax.egn(loss=SquaredError(), lam0=LAM, **k),
    "ggn_direct_mse": lambda **k: curvax.ggn_direct_mse(lam0=LAM, **k),
    "gauss_newton": lambda **k: curvax.gauss_newton(loss=SquaredError(), lam0=LAM, lam_policy="const", **EXACT, **k),
    "newton_cg": lambda **k: curvax.newton_cg(loss=SquaredError(), lam0=10.0, **EXACT, **k),
    "kfac": lambda **k: curvax.kfac(loss=SquaredError(), fisher=GeneralizedGaussNewton(), **k),
    "ekfac": lambda **k: curvax.ekfac(loss=SquaredError(), fisher=GeneralizedGaussNewton(), **k),
    "sophia_g": lambda **k: curvax.sophia_g(loss=SquaredError(), **k),
    "adahessian": lambda **k: curvax.adahessian(loss=SquaredError(), **k),
    "exact diagonal": lambda **k: curvax.sgn(
        loss=SquaredError(), lam0=LAM, precond="diag_direct", estimator=curvax.estimators.ExactDiagonal(), **EXACT, **k
    ),
}


def _batch(mask: np.ndarray, junk: float, clean: bool, dtype: Any = None) -> PyTree:
    """Where the mask is zero, inputs and targets hold junk, or, clean, ordinary numbers."""
    x, y = np.array(_drawn(2, *mask.shape, 4)), np.array(_drawn(3, *mask.shape, 2))
    if not clean:
        x[mask == 0], y[mask == 0] = junk, np.nan
    return {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype), "m": jnp.asarray(mask, dtype)}


@functools.lru_cache(maxsize=4)
def _compiled(method: Any) -> Any:
    return quick_jit(method.step)


def _step(method: Any, params: PyTree, batch: PyTree) -> tuple[np.ndarray, dict[str, Any], Any]:
    state = method.init(params, batch=jax.eval_shape(lambda: batch))
    new, state, info = _compiled(method)(params, batch, state, key())
    return moved(params, new), info, state


EXAMPLES = np.asarray([1.0, 1.0, 0.0, 2.0, 0.0, 0.5])
POSITIONS = np.asarray([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])


@pytest.mark.parametrize("mask", ["examples", "positions"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_does_not_see_what_is_masked(name: str, mask: str, x64: None) -> None:
    shape = EXAMPLES if mask == "examples" else POSITIONS
    method = METHODS[name](predict_fn=MODELS["logarithm"], weight_key="m")
    want, info, _ = _step(method, _params(), _batch(shape, 0.0, clean=True))
    got, other, state = _step(method, _params(), _batch(shape, 0.0, clean=False))
    assert_close(got, want, 1e-9)
    assert bool(other["accepted"]) and all_finite(state)
    assert float(other["loss"]) == pytest.approx(float(info["loss"]), rel=1e-12)
    assert float(info["loss"]) == pytest.approx(
        truth_of(
            types.SimpleNamespace(predict=MODELS["logarithm"]),
            "mse",
            _params(),
            {**(clean := _batch(shape, 0.0, clean=True)), "w": clean["m"]},
        ).loss.value,
        rel=1e-12,
    )


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_whatever_masked_positions_hold(model: str, dtype: str) -> None:
    """The direction of the dense Gauss-Newton matrix, in one piece and in pieces one of which is masked as a whole."""
    predict = MODELS[model]
    with precision(jnp.float64):
        clean = {**_batch(POSITIONS, 0.0, clean=True)}
        truth = truth_of(types.SimpleNamespace(predict=predict), "mse", _params(), {**clean, "w": clean["m"]})
    with precision(dtype):
        for size in (None, 1):
            method = curvax.egn(predict_fn=predict, loss=SquaredError(), lam0=LAM, weight_key="m", microbatch_size=size)
            for junk in JUNK.values():
                got, info, _ = _step(method, _params(dtype), _batch(POSITIONS, junk, clean=False, dtype=dtype))
                assert_close(got, truth.direction(LAM), TOLERANCE[dtype], f"{junk} where masked")
                assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-4 if dtype == "float32" else 1e-10)


@pytest.mark.parametrize("name", ["sgn", "kfac", "newton_cg", "sophia_g"])
def test_masked_pieces(name: str, x64: None) -> None:
    mask = np.asarray([1.0, 1.0, 0.0, 0.0, 2.0, 1.0])
    options = {"predict_fn": MODELS["logarithm"], "weight_key": "m", "microbatch_size": 2}
    method = METHODS[name](**options)
    got, info, state = _step(method, _params(), _batch(mask, np.nan, clean=False))
    want, _, _ = _step(method, _params(), _batch(mask, 0.0, clean=True))
    assert_close(got, want, 1e-9)
    assert bool(info["accepted"]) and all_finite(state)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["sgn", "egn", "newton_cg", "kfac"])
def test_a_batch_that_is_masked_as_a_whole_moves_nothing(name: str, x64: None) -> None:
    method = METHODS[name](predict_fn=MODELS["logarithm"], weight_key="m")
    got, info, _ = _step(method, _params(), _batch(np.zeros(4), np.nan, clean=False))
    assert not np.any(got) and bool(info["finite"]) and float(info["loss"]) == 0.0


def test_a_curvature_batch_of_its_own_may_hold_masked_examples(x64: None) -> None:
    method = METHODS["sgn"](predict_fn=MODELS["logarithm"], weight_key="m")
    step = quick_jit(lambda p, b, s, c: method.step(p, b, s, key(), curvature_batch=c))
    directions = []
    for clean in (True, False):
        batch, other = _batch(EXAMPLES, 0.0, clean=clean), _batch(EXAMPLES[::-1], np.nan, clean=clean)
        new, _, info = step(_params(), batch, method.init(_params()), other)
        assert bool(info["accepted"])
        directions.append(moved(_params(), new))
    assert_close(directions[1], directions[0], 1e-9)


@pytest.mark.parametrize("kind", ["full", "blocks", "shares", "pieces", "conjugate gradients"])
def test_inner_loops_do_not_see_what_is_masked(kind: str, x64: None) -> None:
    options: dict[str, Any] = {"inner_steps": 2, "inner": optax.sgd(0.01)}
    if kind in ("blocks", "shares"):
        options |= {"partition": ByLeaf(), "shares": 2 if kind == "shares" else 1}
    if kind == "pieces":
        options["microbatch_size"] = 2
    if kind == "conjugate gradients":
        options |= {"inner_steps": 1, "inner": curvax.layerwise.ConjugateGradients(lam=0.1)}
    build = layerwise_gn if "partition" in options else full_gn
    method = build(predict_fn=MODELS["logarithm"], loss=SquaredError(), weight_key="m", **options)
    mask = np.asarray([1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0, 2.0, 0.0, 1.0, 1.0, 1.0])
    directions = []
    for clean in (True, False):
        batch, state = _batch(mask, 0.0, clean=clean), method.init(_params())
        new, state, info = _compiled(method)(_params(), batch, state, key())
        assert bool(info["accepted"]) and all_finite(state), (clean, info)
        directions.append(moved(_params(), new))
    assert_close(directions[1], directions[0], 1e-9)


def test_a_model_that_mixes_positions_keeps_those_that_others_see(x64: None) -> None:
    """A padded position that attention looks at is part of the others: nothing stands in for it."""

    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        hidden = jnp.tanh(x @ params["w"])
        return jnp.cumsum(hidden, 1) @ params["v"]

    batch = _batch(POSITIONS, 0.0, clean=True)
    truth = truth_of(types.SimpleNamespace(predict=predict), "mse", _params(), {**batch, "w": batch["m"]})
    got, _, _ = _step(curvax.egn(predict_fn=predict, loss=SquaredError(), lam0=LAM, weight_key="m"), _params(), batch)
    assert_close(got, truth.direction(LAM), 1e-9)


def test_ignored_labels_stand_for_masked_examples(x64: None) -> None:
    """`ignore_index` is a mask, so what stands beside such a label is not looked at either."""

    def predict(params: PyTree, x: jax.Array) -> jax.Array:
        return jnp.log(jnp.abs(x @ params["w"])) @ params["v"]

    labels = jnp.asarray([0, 1, -100, 1, -100, 0])
    clean = _batch(EXAMPLES, 0.0, clean=True)["x"]
    junk = jnp.where((labels < 0)[:, None], 0.0, clean)
    loss = SoftmaxCrossEntropy(ignore_index=-100)
    kept = np.flatnonzero(np.asarray(labels) >= 0)
    truth = truth_of(types.SimpleNamespace(predict=predict), "ce", _params(), {"x": clean[kept], "y": labels[kept]})
    for size in (None, 2):
        method = curvax.egn(predict_fn=predict, loss=loss, lam0=LAM, microbatch_size=size)
        got, info, _ = _step(method, _params(), {"x": junk, "y": labels})
        assert_close(got, truth.direction(LAM), 1e-9)
        assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-12)
