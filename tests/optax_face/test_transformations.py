"""The Optax face inside Optax's own wrappers, against the method it wraps or the dense answer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import curvax
from curvax.curvature import GeneralizedGaussNewton, Model, ModelLoss
from curvax.losses import SoftmaxCrossEntropy
from curvax.preconditioners import KFAC
from curvax.solvers import CG, Cholesky
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.oracle.losses import softmax_cross_entropy

LAM = 0.1
EXACT = CG(tol=1e-12, maxiter=200)


def predict(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["first"]["w"]) @ params["last"]


@pytest.fixture
def problem(x64: None) -> Any:
    return _problem()


@quick_jit
def _problem() -> Any:
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    params = {"first": {"w": jax.random.normal(k1, (4, 5))}, "last": jax.random.normal(k2, (5, 3))}
    batch = {"x": jax.random.normal(k3, (6, 4)), "y": jax.random.randint(k4, (6,), 0, 3)}
    return params, batch


def loss(params: Any, batch: Any) -> jax.Array:
    logits = predict(params, batch["x"])
    return optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


gradient_of = quick_jit(jax.grad(loss))


def direction(params: Any, batch: Any, lam: float = LAM) -> Any:
    truth = dense.truth(predict, softmax_cross_entropy, params, batch["x"], batch["y"])
    flat = np.linalg.solve(truth.ggn + lam * np.eye(truth.ggn.shape[0]), truth.gradient)
    return dense.like(flat, params)


def assert_close(actual: Any, expected: Any, scale: float = 1.0, rtol: float = 1e-8) -> None:
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(a), scale * np.asarray(e), rtol=rtol, atol=1e-10)


def ggn(lam: Any = LAM) -> Any:
    return curvax.transforms.scale_by_ggn(predict, SoftmaxCrossEntropy(), lam, solver=EXACT)


@pytest.mark.fast
def test_scale_by_ggn_is_the_dense_direction_in_a_jitted_chain(problem: Any) -> None:
    params, batch = problem
    tx = optax.chain(ggn(), optax.scale_by_learning_rate(0.5))
    update = quick_jit(lambda g, s, p: tx.update(g, s, p, batch=batch))
    updates, _ = update(gradient_of(params, batch), tx.init(params), params)
    assert_close(updates, direction(params, batch), -0.5)


def updated(tx: Any, gradients: Any, params: Any, **more: Any) -> Any:
    """(updates, state) of the first step, as one program."""
    return quick_jit(lambda g, s: tx.update(g, s, params, **more))(gradients, tx.init(params))


def test_egn_form_agrees_with_the_cg_form(problem: Any) -> None:
    params, batch = problem
    tx = curvax.transforms.scale_by_egn(predict, SoftmaxCrossEntropy(), LAM)
    updates, _ = updated(tx, gradient_of(params, batch), params, batch=batch)
    assert_close(updates, direction(params, batch))


def test_the_incoming_gradient_is_the_right_hand_side(problem: Any) -> None:
    params, batch = problem
    tx = optax.chain(optax.scale(3.0), ggn())
    updates, _ = updated(tx, gradient_of(params, batch), params, batch=batch)
    assert_close(updates, direction(params, batch), 3.0)


def test_newton_form_uses_the_hessian(problem: Any) -> None:
    params, batch = problem
    tx = curvax.transforms.scale_by_newton_cg(loss, 5.0, solver=Cholesky())
    updates, _ = updated(tx, gradient_of(params, batch), params, batch=batch)
    flat, unravel = ravel_pytree(params)
    hessian = np.asarray(quick_jit(jax.hessian(lambda v: loss(unravel(v), batch)))(flat))
    gradient = np.asarray(quick_jit(jax.grad(lambda v: loss(unravel(v), batch)))(flat))
    expected = np.linalg.solve(hessian + 5.0 * np.eye(flat.size), gradient)
    np.testing.assert_allclose(np.asarray(ravel_pytree(updates)[0]), expected, rtol=1e-8)


def test_faces_take_weights_and_microbatches_and_a_model_with_a_loss(problem: Any) -> None:
    """What weighs nothing is as if it were not there, in whatever pieces."""
    params, batch = problem
    padded = {
        "x": jnp.concatenate([batch["x"], 7 * batch["x"][:2]]),
        "y": jnp.concatenate([batch["y"], batch["y"][:2]]),
        "weight": jnp.asarray([1.0] * 6 + [0.0] * 2),
    }
    ce, key, grads = SoftmaxCrossEntropy(), jax.random.key(0), gradient_of(params, batch)
    objective = ModelLoss(Model(predict, weight_key="weight"), ce)
    plain = ModelLoss(Model(predict), ce)
    pieces = {"weight_key": "weight", "microbatch_size": 3}
    pairs = [
        (curvax.transforms.scale_by_egn(predict, ce, LAM), curvax.transforms.scale_by_egn(predict, ce, LAM, **pieces)),
        (
            curvax.transforms.scale_by_newton_cg(plain, 5.0, solver=EXACT),
            curvax.transforms.scale_by_newton_cg(objective, 5.0, solver=EXACT, microbatch_size=3),
        ),
        (
            curvax.transforms.scale_by_adahessian(plain),
            curvax.transforms.scale_by_adahessian(objective, microbatch_size=3),
        ),
    ]
    for whole, cut in pairs:
        expected, found = (
            quick_jit(lambda tx=tx, of=of: tx.update(grads, tx.init(params), params, batch=of, rng=key)[0])()
            for tx, of in ((whole, batch), (cut, padded))
        )
        assert_close(found, expected)
    sampled = curvax.transforms.scale_by_sophia_g(predict, ce, n_samples=2, **pieces)
    run = quick_jit(lambda of: sampled.update(grads, sampled.init(params), params, batch=of, rng=key)[0])
    assert_close(run(padded), run({**padded, "x": padded["x"].at[6:].set(-3.0)}))
    with pytest.raises(ValueError, match="extras, reduction and batch_axes go into the objective"):
        curvax.transforms.scale_by_sophia_h(objective, reduction="sum")


def test_whole_method_equals_its_step(problem: Any) -> None:
    params, batch = problem
    method = curvax.sgn_ce(predict_fn=predict, lam0=LAM, learning_rate=0.3, direction_momentum=0.5)
    tx = curvax.as_gradient_transformation(method)
    stepped, state, opt_state, moved = params, method.init(params), tx.init(params), params
    step, update = quick_jit(method.step), quick_jit(lambda g, s, p: tx.update(g, s, p, batch=batch))
    for _ in range(3):
        stepped, state, _ = step(stepped, batch, state)
        updates, opt_state = update(gradient_of(moved, batch), opt_state, moved)
        moved = optax.apply_updates(moved, updates)
    assert_close(moved, stepped)


def test_masked_solves_the_system_of_the_unmasked_part(problem: Any) -> None:
    params, batch = problem
    tx = optax.masked(ggn(), {"first": False, "last": True})
    grads = gradient_of(params, batch)
    updates: Any = updated(tx, grads, params, batch=batch, full_params=params)[0]
    assert_close(updates["first"], grads["first"])
    part = dense.truth(
        lambda last, x: predict({**params, "last": last}, x),
        softmax_cross_entropy,
        params["last"],
        batch["x"],
        batch["y"],
    )
    expected = np.linalg.solve(part.ggn + LAM * np.eye(part.ggn.shape[0]), part.gradient)
    np.testing.assert_allclose(np.asarray(updates["last"]).ravel(), expected, rtol=1e-8)


def test_partition_with_sgd_for_the_rest(problem: Any) -> None:
    params, batch = problem
    labels = {"first": "sgd", "last": "ggn"}
    tx = optax.partition({"sgd": optax.sgd(0.1), "ggn": optax.chain(ggn(), optax.scale(-1.0))}, labels)
    grads = gradient_of(params, batch)
    answer: Any = updated(tx, grads, params, batch=batch, full_params=params)
    updates, state = answer
    assert_close(updates["first"], grads["first"], -0.1)
    updates = jax.tree.map(lambda x: x, tx.update(grads, state, params, batch=batch, full_params=params)[0])
    assert bool(jnp.all(jnp.isfinite(updates["last"])))


def kfac(problem: Any, predict_fn: Any = predict, **keywords: Any) -> Any:
    preconditioner = KFAC(GeneralizedGaussNewton(), inverse_every=1)
    return curvax.transforms.scale_by_kfac(
        predict_fn, SoftmaxCrossEntropy(), problem[1], LAM, preconditioner=preconditioner, **keywords
    )


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, {"first": False, "last": True}),
        lambda tx: optax.partition({"sgd": optax.sgd(0.1), "kfac": tx}, {"first": "sgd", "last": "kfac"}),
        lambda tx: optax.transforms.selective_transform(tx, freeze_mask={"first": {"w": True}, "last": False}),
    ],
    ids=["masked", "partition", "selective_transform"],
)
def test_kfac_of_a_part_is_kfac_of_a_model_with_that_part(problem: Any, wrap: Any) -> None:
    """The whole parameters may be given as shapes alone."""
    params, batch = problem
    grads, key = gradient_of(params, batch), jax.random.key(0)
    part = kfac(problem, lambda last, x: predict({**params, "last": last}, x))
    alone = quick_jit(lambda g, s: part.update(g, s, params["last"], batch=batch, rng=key))
    expected, _ = alone(grads["last"], part.init(params["last"]))
    for full_params in (params, jax.eval_shape(lambda: params)):
        tx = wrap(kfac(problem, full_params=full_params))
        update = quick_jit(lambda g, s, tx=tx: tx.update(g, s, params, batch=batch, full_params=params, rng=key))
        updates, state = update(grads, tx.init(params))
        assert_close(updates["last"], expected)
        optax.tree.map_params(tx, lambda x: x, state)


def test_a_masked_whole_method_of_a_part(problem: Any) -> None:
    params, batch = problem
    method = curvax.kfac(predict_fn=predict, loss=SoftmaxCrossEntropy())
    tx = optax.masked(
        curvax.as_gradient_transformation(method, batch=batch, full_params=params), {"first": False, "last": True}
    )
    update = quick_jit(lambda g, s: tx.update(g, s, params, batch=batch, full_params=params, rng=jax.random.key(0)))
    updates, _ = update(gradient_of(params, batch), tx.init(params))
    assert np.any(updates["last"]) and np.all(np.isfinite(updates["last"]))


def test_masked_kfac_without_the_full_parameters_says_so(problem: Any) -> None:
    params, _ = problem
    with pytest.raises(ValueError, match=r"masked.*full_params=params"):
        optax.masked(kfac(problem), {"first": False, "last": True}).init(params)


def test_masked_without_the_full_parameters_says_so(problem: Any) -> None:
    params, batch = problem
    tx = optax.masked(ggn(), {"first": False, "last": True})
    with pytest.raises(ValueError, match="full_params"):
        tx.update(gradient_of(params, batch), tx.init(params), params, batch=batch)


@jax.numpy_dtype_promotion("standard")  # Optax's schedules compare integers with floats
def test_injected_damping_schedule(problem: Any) -> None:
    params, batch = problem
    make = optax.inject_hyperparams(curvax.transforms.scale_by_ggn, static_args=("predict_fn",))
    tx = make(predict, SoftmaxCrossEntropy(), optax.piecewise_constant_schedule(1.0, {1: 0.1}), solver=EXACT)
    state, grads = tx.init(params), gradient_of(params, batch)
    update = quick_jit(lambda g, s: tx.update(g, s, params, batch=batch))
    for lam in (1.0, 0.1):
        updates, state = update(grads, state)
        assert_close(updates, direction(params, batch, lam))


@jax.numpy_dtype_promotion("standard")  # Optax's accumulator is float32
def test_multi_steps_accumulates_the_gradient(problem: Any) -> None:
    params, batch = problem
    tx = optax.MultiSteps(ggn(), every_k_schedule=2)
    state, grads = tx.init(params), gradient_of(params, batch)
    first, state = tx.update(grads, state, params, batch=batch)
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(first))
    double = jax.tree.map(lambda g: 3.0 * g, grads)
    second, _ = tx.update(double, state, params, batch=batch)
    assert_close(second, direction(params, batch), 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: curvax.transforms.scale_by_sophia_g(predict),
        lambda: curvax.transforms.scale_by_sophia_h(loss),
        lambda: curvax.transforms.scale_by_adahessian(loss),
    ],
    ids=["sophia_g", "sophia_h", "adahessian"],
)
def test_diagonal_forms_divide_by_a_positive_diagonal(problem: Any, make: Any) -> None:
    params, batch = problem
    tx, grads = make(), gradient_of(params, batch)
    updates, _ = updated(tx, grads, params, batch=batch, rng=jax.random.key(0))
    for u, g in zip(jax.tree.leaves(updates), jax.tree.leaves(grads), strict=True):
        assert np.array_equal(np.sign(u), np.sign(g))


def test_missing_arguments_are_named(problem: Any) -> None:
    params, batch = problem
    tx, grads = ggn(), gradient_of(params, batch)
    with pytest.raises(ValueError, match=r"update\(grads, state, params"):
        tx.update(grads, tx.init(params), batch=batch)
    with pytest.raises(ValueError, match="batch=batch"):
        tx.update(grads, tx.init(params), params)
    random = curvax.transforms.scale_by_sophia_g(predict)
    with pytest.raises(ValueError, match="random key"):
        random.update(grads, random.init(params), params, batch=batch)


def test_a_rejected_step_is_a_zero_update(problem: Any) -> None:
    params, batch = problem
    tx = ggn()
    bad = {**batch, "x": batch["x"].at[0, 0].set(jnp.nan)}
    updates, state = updated(tx, gradient_of(params, bad), params, batch=bad)
    assert all(not np.any(np.asarray(leaf)) for leaf in jax.tree.leaves(updates))
    assert int(state.rejected) == 1
