"""A dense solve that the device cannot afford is told before it is compiled, with the predicted figures."""

from __future__ import annotations

import re
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.plan import machine


def _predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["a"]) @ params["b"]


def _shapes(examples: int, outputs: int, width: int = 128) -> tuple[Any, Any]:
    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    return {"a": of(32, width), "b": of(width, outputs)}, {"x": of(examples, 32), "y": of(examples, outputs)}


def _said(method: Any, params: Any, batch: Any) -> list[str]:
    """What a traced step warns of; nothing is computed."""
    state = jax.eval_shape(method.init, params)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        jax.eval_shape(method.step, params, batch, state)
    assert all(w.filename == __file__ for w in caught), "a warning points to who took the step"
    return [str(w.message) for w in caught]


def _seconds(text: str) -> float:
    number, unit = re.findall(r"take ([\d.e+]+) (s|ms|us) a step", text)[0]
    return float(number) * {"s": 1.0, "ms": 1e-3, "us": 1e-6}[unit]


def test_a_cholesky_of_many_rows_is_told_with_both_times():
    method = curvax.egn(predict_fn=_predict, loss=curvax.losses.SquaredError())
    params, batch = _shapes(449, 64)
    (text,) = _said(method, params, batch)
    assert "28736 unknowns" in text and "GB" in text and "CG" in text and "gauss_newton" in text
    assert _seconds(text) > 1 and "ms" in text.split("where")[1]
    plan = method.plan_for(params, batch)
    assert f"{plan.cost.memory / 1e9:.3g} GB" in text, "the figure is the plan's own"


def test_dense_parameters_of_a_large_model_are_told():
    method = curvax.ggn_direct_mse(predict_fn=_predict)
    (text,) = _said(method, *_shapes(8, 4, width=600))
    assert "21600 unknowns" in text and "conjugate gradients" in text


@pytest.mark.parametrize("name", ["egn", "ggn_direct_mse", "sgn", "gauss_newton", "kfac"])
def test_what_is_affordable_is_not_commented(name):
    params, batch = _shapes(32, 4)
    given = {} if name == "ggn_direct_mse" else {"loss": curvax.losses.SquaredError()}
    method = getattr(curvax, name)(predict_fn=_predict, **given)
    if name == "kfac":
        state = jax.eval_shape(lambda p, b: method.init(p, batch=b), params, batch)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            jax.eval_shape(method.step, params, batch, state, jax.random.key(0))
        return
    assert _said(method, params, batch) == []


def test_half_of_the_memory_is_too_much(monkeypatch):
    params, batch = _shapes(64, 32)
    method = curvax.egn(predict_fn=_predict, loss=curvax.losses.SquaredError())
    needed = method.plan_for(params, batch).cost.memory
    assert _said(method, params, batch) == []
    monkeypatch.setattr(machine, "memory", lambda: int(1.9 * needed))
    (text,) = _said(method, params, batch)
    assert "of the" in text and "2048 unknowns" in text
    monkeypatch.setattr(machine, "memory", lambda: int(2.1 * needed))
    assert _said(method, params, batch) == []
    monkeypatch.setattr(machine, "memory", lambda: None)
    assert _said(method, params, batch) == []


def test_more_than_all_of_the_memory_is_refused(monkeypatch):
    params, batch = _shapes(64, 32)
    method = curvax.egn(predict_fn=_predict, loss=curvax.losses.SquaredError())
    needed = method.plan_for(params, batch).cost.memory
    monkeypatch.setattr(machine, "memory", lambda: int(0.9 * needed))
    with pytest.raises(ValueError, match=r"2048 unknowns .* MB of the .* there are.* take gauss_newton"):
        _said(method, params, batch)


def test_an_automatic_choice_fits_into_memory(monkeypatch):
    """What is fastest on paper is not taken where it does not fit."""
    params, batch = _shapes(64, 8, width=512)
    method = curvax.gauss_newton(predict_fn=_predict, loss=curvax.losses.SquaredError(), maxiter=5000, tol=0.0)
    roomy = method.plan_for(params, batch)
    largest = max(roomy.candidates, key=lambda c: c.cost.memory)
    chosen = next(c for c in roomy.candidates if c.solver == roomy.solver)
    assert chosen.cost.memory < largest.cost.memory
    monkeypatch.setattr(machine, "memory", lambda: int(1.5 * chosen.cost.memory))
    narrow = method.plan_for(params, batch)
    picked = next(c for c in narrow.candidates if c.solver == narrow.solver)
    assert picked.cost.memory <= 0.75 * chosen.cost.memory
    monkeypatch.setattr(machine, "memory", lambda: 1)
    least = method.plan_for(params, batch)
    assert least.solver == min(roomy.candidates, key=lambda c: c.cost.memory).solver
    with pytest.raises(ValueError, match=r"no solver fits: .* takes least, is predicted .* set microbatch_size="):
        jax.eval_shape(method.step, params, batch, method.init(params))


def test_the_row_lane_of_several_terms_keeps_to_its_bound(monkeypatch):
    """In the prediction: rows of two models within `max_bytes`, beside the matrix."""
    params = {"w": jax.ShapeDtypeStruct((64, 64), jnp.float32)}
    sides = curvax.Terms(
        forward=curvax.Term(lambda p, x: jnp.tanh(x @ p["w"])[:, :2]),
        back=curvax.Term(lambda p, x: jnp.tanh(x @ p["w"].T)[:, :2]),
    )
    one = {"x": jax.ShapeDtypeStruct((32, 64), jnp.float32), "y": jax.ShapeDtypeStruct((32, 2), jnp.float32)}
    batch = {"forward": one, "back": one}
    plain, bounded = (
        curvax.egn(loss=sides, max_bytes=size).plan_for(params, batch).cost.memory for size in (1 << 30, 1 << 16)
    )
    assert plain > 64**2 * 64 * 4 > bounded
