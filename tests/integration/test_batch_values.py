"""Labels out of range and weights of both signs: refused where they are at hand, reported by the step where not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import curvax
from curvax.layerwise import full_gn
from curvax.losses import BatchFault, SoftmaxCrossEntropy, SquaredError
from curvax.structure import ggn_diagonal, per_example_gradient_norms
from tests.integration.harness import TOLERANCE, assert_close, batch_of, directions, key, precision, same_bits, truth_of
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

PyTree = Any
MODEL = models.MLP_TANH
LAM = 0.1
IGNORING = SoftmaxCrossEntropy(ignore_index=-100)


def _labelled(dtype: Any, **changes: int) -> dict[str, Any]:
    batch = batch_of(MODEL, "ce", dtype)
    labels = np.array(batch["y"])
    for place, label in changes.items():
        labels[int(place[1:])] = label
    return {**batch, "y": jnp.array(labels)}


# --- ignored labels ---------------------------------------------------------------------------------------------------


METHODS: dict[str, Callable[..., Any]] = {
    "sgn": lambda **k: curvax.sgn(tol=1e-13, maxiter=300, **k),
    "egn": lambda **k: curvax.egn(**k),
    "gauss_newton": lambda **k: curvax.gauss_newton(lam_policy="const", **k),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("size", [None, 2])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_ignored_labels_equal_dropped_examples(name: str, size: int | None, dtype: str) -> None:
    if dtype == "float32" and (name, size) != ("egn", 2):
        return
    with precision("float64"):
        batch = _labelled("float64")
        clean = {name: np.asarray(leaf)[[0, 2, 3, 5]] for name, leaf in batch.items()}
        truth = truth_of(MODEL, "ce", MODEL.params("float64"), clean)
    with precision(dtype):
        batch = _labelled(dtype, _1=-100, _4=-100)
        method = METHODS[name](predict_fn=MODEL.predict, loss=IGNORING, lam0=LAM, microbatch_size=size)
        (got,), (info,) = directions(method, MODEL.params(dtype), batch)
    assert_close(got, truth.direction(LAM), TOLERANCE[dtype])
    assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-10 if dtype == "float64" else 1e-5)
    assert int(info["batch_fault"]) == BatchFault.NONE


def test_ignored_labels_and_weights_of_positions(x64: None) -> None:
    model = models.SHARED
    params, batch = model.params(), batch_of(model, "ce", "float64")
    mask = np.asarray(np.arange(15).reshape(5, 3) % 4 > 0, np.float64)
    weights = np.linspace(0.5, 2.0, 5)
    labels = np.where(mask > 0, np.asarray(batch["y"]), -7)
    truth = truth_of(model, "ce", params, {**batch, "w": mask * weights[:, None]})
    loss = SoftmaxCrossEntropy(ignore_index=-7)
    ignored = {"x": batch["x"], "y": jnp.asarray(labels), "w": jnp.asarray(weights)}
    variants: list[dict[str, Any]] = [{}, {"microbatch_size": 2}]
    for options in variants:
        method = curvax.egn(predict_fn=model.predict, loss=loss, weight_key="w", lam0=LAM, **options)
        (got,), (info,) = directions(method, params, ignored)
        assert_close(got, truth.direction(LAM), 1e-8)
        assert float(info["loss"]) == pytest.approx(truth.loss.value, rel=1e-10)
    diagonal = quick_jit(lambda p, x, y, w: ggn_diagonal(model.predict, loss, p, x, y, w))
    exact = diagonal(params, batch["x"], labels, weights)
    np.testing.assert_allclose(dense.vector(exact), np.diag(truth.ggn), rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), [("kfac", {}), ("sophia_g", {}), ("newton_cg", {"lam0": 1.0})])
def test_methods_train_on_ignored_labels(name: str, options: dict[str, Any]) -> None:
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), _labelled(jnp.float32, _1=-100)
        method = getattr(curvax, name)(predict_fn=MODEL.predict, loss=IGNORING, **options)
        state = method.init(params, batch=jax.eval_shape(lambda: batch))
        new, _, info = quick_jit(method.step)(params, batch, state, key())
        assert bool(info["accepted"]) and not same_bits(new, params)


def test_ignored_labels_at_a_head(x64: None) -> None:
    """The logits of a language model are never made in full, and the labels that do not count are none of theirs."""
    params = {
        "w": jnp.asarray(np.random.default_rng(0).standard_normal((3, 4))),
        "out": jnp.asarray(np.random.default_rng(3).standard_normal((4, 5))),
    }
    x = jnp.asarray(np.random.default_rng(1).standard_normal((12, 2, 3)))
    y = jnp.asarray(np.random.default_rng(2).integers(0, 5, (12, 2))).at[1, 0].set(-100).at[7, 1].set(-100)

    def hidden(p: PyTree, inputs: jax.Array) -> jax.Array:
        return jnp.tanh(inputs @ p["w"])

    common: dict[str, Any] = {"inner": optax.sgd(0.1), "inner_steps": 2}
    with_head = full_gn(predict_fn=hidden, head=lambda p: p["out"], loss=IGNORING, **common)
    plain = full_gn(predict_fn=lambda p, i: hidden(p, i) @ p["out"], loss=IGNORING, **common)
    weighted = full_gn(
        predict_fn=lambda p, i: hidden(p, i) @ p["out"], loss=SoftmaxCrossEntropy(), weight_key="w", **common
    )
    found = []
    for method in (with_head, plain, weighted):
        batch = (
            {"x": x, "y": y}
            if method is not weighted
            else {"x": x, "y": jnp.abs(y) % 5, "w": (y >= 0).astype(jnp.float64)}
        )
        new, _, info = quick_jit(method.step)(params, batch, method.init(params))
        assert bool(info["accepted"]) and int(info["batch_fault"]) == 0
        found.append(dense.vector(new))
    np.testing.assert_allclose(found[0], found[2], rtol=1e-9)
    np.testing.assert_allclose(found[1], found[2], rtol=1e-9)


# --- labels out of range ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", [-100, 4])
def test_labels_out_of_range_are_refused_where_they_are_seen(label: int) -> None:
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), _labelled(jnp.float32, _2=label)
        method = curvax.kfac(predict_fn=MODEL.predict, loss=SoftmaxCrossEntropy())
        with pytest.raises(ValueError, match=rf"label.*ignore_index.*{label}") as raised:
            method.init(params, batch=batch)
        assert "\n" not in str(raised.value)
        other = curvax.sgn_ce(predict_fn=MODEL.predict)
        with pytest.raises(ValueError, match="ignore_index"):
            other.step(params, batch, other.init(params), key())
        with pytest.raises(ValueError, match="ignore_index"):
            per_example_gradient_norms(MODEL.predict, SoftmaxCrossEntropy(), params, batch["x"], batch["y"])
        # A weight of zero, or the ignored label, is no fault.
        weights = jnp.asarray([1, 1, 0, 1, 1, 1.0])
        curvax.kfac(predict_fn=MODEL.predict, loss=SoftmaxCrossEntropy(), weight_key="w").init(
            params, batch={**batch, "w": weights}
        )
        curvax.kfac(predict_fn=MODEL.predict, loss=SoftmaxCrossEntropy(ignore_index=label)).init(params, batch=batch)


@pytest.mark.parametrize(
    ("name", "size"),
    [("sgn_ce", None), ("egn_ce", 2), ("sophia_g", None), ("kfac", 2), ("full_gn", None), ("full_gn", 2)],
)
def test_a_step_says_that_a_label_is_out_of_range(name: str, size: int | None) -> None:
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), _labelled(jnp.float32)
        options: dict[str, Any] = {"loss": SoftmaxCrossEntropy()} if name in ("kfac", "full_gn") else {}
        if name == "full_gn":
            method = full_gn(
                predict_fn=MODEL.predict, inner=optax.sgd(0.1), inner_steps=2, microbatch_size=size, **options
            )
            state = method.init(params)
        else:
            method = getattr(curvax, name)(predict_fn=MODEL.predict, microbatch_size=size, **options)
            state = method.init(params, batch=jax.eval_shape(lambda: batch))
        step = quick_jit(method.step)
        kept, state, info = step(params, {**batch, "y": batch["y"].at[1].set(9)}, state, key())
        assert same_bits(kept, params) and not bool(info["accepted"])
        assert int(info["batch_fault"]) == BatchFault.LABEL_OUT_OF_RANGE
        assert "ignore_index" in BatchFault(int(info["batch_fault"])).describe()
        _, _, info = step(params, batch, state, key())
        assert int(info["batch_fault"]) == BatchFault.NONE


# --- weights of both signs --------------------------------------------------------------------------------------------


def _signed(dtype: Any) -> dict[str, Any]:
    return {**batch_of(MODEL, "ce", dtype), "w": jnp.asarray([1.0, 0.5, -0.1, 1.0, 1.0, 2.0], dtype)}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_both_signs_are_refused_where_they_are_seen(reduction: Any) -> None:
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), _signed(jnp.float32)
        method = curvax.sgn(predict_fn=MODEL.predict, loss=SoftmaxCrossEntropy(reduction=reduction), weight_key="w")
        with pytest.raises(ValueError, match=r"weight is negative.*scale_by_ggn.*-0.1") as raised:
            method.step(params, batch, method.init(params), key())
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("sgn", np.nan),
        ("egn", -0.1),
        ("ggn_direct_ce", -0.1),
        ("kfac", -0.1),
        ("ekfac", -0.1),
        ("sophia_g", -0.1),
        ("full_gn", np.nan),
    ],
)
def test_no_method_takes_a_step_with_a_weight_that_is_none(name: str, weight: float) -> None:
    with precision("float32"):
        params, batch = MODEL.params(jnp.float32), _signed(jnp.float32)
        loss = {} if name in ("ggn_direct_ce", "sophia_g") else {"loss": SoftmaxCrossEntropy()}
        options: dict[str, Any] = {"predict_fn": MODEL.predict, "weight_key": "w", **loss}
        if name == "full_gn":
            method = full_gn(inner=optax.sgd(0.1), inner_steps=2, **options)
            state = method.init(params)
        else:
            method = getattr(curvax, name)(**options)
            state = method.init(params, batch=jax.eval_shape(lambda: batch))
        batch["w"] = batch["w"].at[2].set(weight)
        step = quick_jit(method.step)
        kept, state, info = step(params, batch, state, key())
        assert same_bits(kept, params) and not bool(info["accepted"])
        assert int(info["batch_fault"]) == BatchFault.NEGATIVE_WEIGHT
        _, _, info = step(params, {**batch, "w": jnp.abs(batch["w"]).at[2].set(1.0)}, state, key())
        assert int(info["batch_fault"]) == BatchFault.NONE and np.isfinite(info["loss"])


def test_a_signed_gradient_goes_through_the_optax_face(x64: None) -> None:
    """A policy gradient: advantages weigh the gradient, the curvature is that of the policy."""
    params, batch = MODEL.params(), batch_of(MODEL, "ce", "float64")
    advantages = jnp.asarray([1.0, -0.5, 0.3, -2.0, 0.7, 1.1])
    truth = truth_of(MODEL, "ce", params, batch)

    def surrogate(p: PyTree) -> jax.Array:
        terms = optax.softmax_cross_entropy_with_integer_labels(MODEL.predict(p, batch["x"]), batch["y"])
        return jnp.mean(advantages * terms)

    gradient = quick_jit(jax.grad(surrogate))(params)
    tx = curvax.transforms.scale_by_ggn(
        MODEL.predict, SoftmaxCrossEntropy(), LAM, solver=curvax.solvers.RowSpace(curvax.solvers.Cholesky())
    )
    update, _ = quick_jit(lambda g, s, p: tx.update(g, s, p, batch=batch))(gradient, tx.init(params), params)
    want = dense.damped_direction(truth.ggn, dense.vector(gradient), LAM)
    assert_close(dense.vector(update), want, 1e-8)


def test_a_hessian_takes_a_sum_with_weights_of_both_signs(x64: None) -> None:
    """Its curvature is not said to be positive, and a sum has no normalizer that could vanish."""
    params, batch = MODEL.params(), _signed("float64")
    loss = SquaredError(reduction="sum")
    batch["y"] = MODEL.targets("float64")

    def total(p: PyTree) -> jax.Array:
        return 0.5 * jnp.sum(batch["w"][:, None] * (MODEL.predict(p, batch["x"]) - batch["y"]) ** 2)

    gradient = dense.vector(quick_jit(jax.grad(total))(params))
    want = dense.damped_direction(dense.hessian(total, params), gradient, 50.0)
    for size in (None, 4):
        method = curvax.newton_direct(
            predict_fn=MODEL.predict, loss=loss, weight_key="w", lam0=50.0, microbatch_size=size
        )
        (got,), (info,) = directions(method, params, batch)
        assert_close(got, want, 1e-8)
        assert int(info["batch_fault"]) == BatchFault.NONE
    mean = curvax.newton_direct(predict_fn=MODEL.predict, loss=SquaredError(), weight_key="w")
    _, (info,) = directions(mean, params, batch)
    assert int(info["batch_fault"]) == BatchFault.NEGATIVE_WEIGHT and not bool(info["accepted"])


def test_faults_are_described() -> None:
    assert {len(fault.describe()) > 20 for fault in BatchFault} == {True}
