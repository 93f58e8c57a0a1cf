"""The oracle against itself: two independent ways to the same dense object agree to rounding."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.oracle import dense, losses, models
from tests.oracle.compiling import quick_jit

PLAIN = (*models.CLASSIFIERS, models.SCALAR, models.ONE_OUTPUT)
TWICE = [m for m in PLAIN if m.true_derivative]


def _jax_cross_entropy(outputs, labels):
    log_p = jax.nn.log_softmax(outputs)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


def _jax_squared_error(outputs, targets):
    positions = max(outputs.size // (outputs.shape[-1] if outputs.ndim > 1 else 1), 1)
    return jnp.asarray(0.5, outputs.dtype) * jnp.sum((outputs - targets) ** 2) / jnp.asarray(positions, outputs.dtype)


@pytest.mark.parametrize("model", models.ALL, ids=str)
def test_models_are_small_and_keep_their_shapes(model):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
            params, inputs = model.params(dtype), model.inputs(dtype)
            out = jax.eval_shape(model.predict, params, inputs)
            assert out.shape == model.output_shape and out.dtype == dtype
        assert dense.vector(params).size < 200
    assert 5 <= model.output_shape[0] <= 7


@pytest.mark.parametrize("model", [m for m in PLAIN if m.forward_mode], ids=str)
def test_reverse_and_forward_jacobians_agree(model):
    with jax.enable_x64(True):
        params, inputs = model.params(), model.inputs()
        forward = quick_jit(jax.jacfwd(model.predict))(params, inputs)
        outputs, jacobian = dense.outputs_and_jacobian(model.predict, params, inputs)
        columns = [np.asarray(leaf).reshape(outputs.size, -1) for leaf in jax.tree.leaves(forward)]
    np.testing.assert_allclose(np.concatenate(columns, 1), jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["softmax", "soft", "smooth", "squared", "sigmoid", "poisson"])
def test_hand_written_losses_match_automatic_differentiation(name):
    rng = np.random.default_rng(0)
    f, w = rng.standard_normal((5, 3)), rng.random(5)
    w[1] = 0.0
    soft = rng.random((5, 3))
    if name in ("softmax", "soft", "smooth"):
        labels = rng.integers(0, 3, 5)
        smoothing = 0.2 if name == "smooth" else 0.0
        y, one_hot = (soft, soft) if name == "soft" else (labels, np.eye(3)[labels])
        one_hot = (1 - smoothing) * one_hot + smoothing * one_hot.sum(1, keepdims=True) / 3
        ours = losses.softmax_cross_entropy(f, y, w, "mean", smoothing)

        def row(f_i, y_i):
            return -jnp.sum(y_i * jax.nn.log_softmax(f_i))

        y = one_hot
    elif name == "squared":
        y, ours = soft, losses.squared_error(f, soft, w)

        def row(f_i, y_i):
            return 0.5 * jnp.sum((f_i - y_i) ** 2)

    elif name == "sigmoid":
        y, ours = soft, losses.sigmoid_cross_entropy(f, soft, w)

        def row(f_i, y_i):
            return jnp.sum(jax.nn.softplus(f_i) - y_i * f_i)

    else:
        y, ours = soft, losses.poisson(f, soft, w)

        def row(f_i, y_i):
            return jnp.sum(jnp.exp(f_i) - y_i * f_i)

    with jax.enable_x64(True):

        def total(out):
            return jnp.sum(w * jax.vmap(row)(out, jnp.asarray(y))) / w.sum()

        f = jnp.asarray(f)
        np.testing.assert_allclose(ours.value, total(f), rtol=1e-13)
        np.testing.assert_allclose(ours.gradient, jax.grad(total)(f), rtol=1e-12, atol=1e-14)
        full = np.array(jax.hessian(total)(f))
    blocks = np.einsum("ikil->ikl", full)
    np.testing.assert_allclose(ours.hessian, blocks, rtol=1e-12, atol=1e-14)
    full[np.arange(5), :, np.arange(5), :] = 0.0
    assert not full.any()


@pytest.mark.parametrize("loss", ["softmax", "squared"])
def test_ggn_is_the_hessian_of_a_linear_model(loss):
    model = models.LINEAR
    with jax.enable_x64(True):
        params, x = model.params(), model.inputs()
        y = model.labels() if loss == "softmax" else model.targets()
        by_hand, by_jax = {
            "softmax": (losses.softmax_cross_entropy, _jax_cross_entropy),
            "squared": (losses.squared_error, _jax_squared_error),
        }[loss]
        truth = dense.truth(model.predict, by_hand, params, x, y)

        def function(p):
            return by_jax(model.predict(p, x), y)

        np.testing.assert_allclose(truth.loss.value, function(params), rtol=1e-13)
        np.testing.assert_allclose(truth.ggn, dense.hessian(function, params), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("model", TWICE, ids=str)
def test_gradient_is_the_gradient_of_the_loss(model):
    with jax.enable_x64(True):
        params, x = model.params(), model.inputs()
        for y, by_hand, by_jax in (
            (model.labels(), losses.softmax_cross_entropy, _jax_cross_entropy),
            (model.targets(), losses.squared_error, _jax_squared_error),
        ):
            if by_jax is _jax_cross_entropy and len(model.output_shape) == 1:
                continue
            truth = dense.truth(model.predict, by_hand, params, x, y)
            want = quick_jit(jax.grad(lambda p, y=y, by_jax=by_jax: by_jax(model.predict(p, x), y)))(params)
            np.testing.assert_allclose(truth.gradient, dense.vector(want), rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("model", [models.MLP_TANH, models.ODD_TREE, models.ARRAY, models.CUSTOM_VJP], ids=str)
def test_hessian_columns_are_differences_of_gradients(model):
    with jax.enable_x64(True):
        params, x, y = model.params(), model.inputs(), model.labels()

        def function(p):
            return _jax_cross_entropy(model.predict(p, x), y)

        matrix = dense.hessian(function, params)
        grad = quick_jit(jax.grad(function))
        flat = dense.vector(params)
        direction = np.random.default_rng(0).standard_normal(flat.size)
        step = 1e-5

        def at(t):
            return dense.vector(grad(jax.tree.map(jnp.asarray, dense.like(flat + t * direction, params))))

        difference = (at(step) - at(-step)) / (2 * step)
    np.testing.assert_allclose(matrix @ direction, difference, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(matrix, matrix.T, rtol=1e-10, atol=1e-12)


def test_ggn_is_positive_semidefinite_and_the_direction_solves_its_system():
    model = models.ATTENTION
    with jax.enable_x64(True):
        truth = dense.truth(
            model.predict, losses.softmax_cross_entropy, model.params(), model.inputs(), model.labels(), model.weights()
        )
    assert np.linalg.eigvalsh(truth.ggn).min() > -1e-13
    s = truth.direction(1e-2)
    np.testing.assert_allclose(truth.ggn @ s + 1e-2 * s, truth.gradient, rtol=1e-9, atol=1e-13)


def test_softmax_fisher_is_the_ggn_in_expectation_over_labels():
    model = models.MLP_TANH
    with jax.enable_x64(True):
        params, x = model.params(), model.inputs()
        truth = dense.truth(model.predict, losses.softmax_cross_entropy, params, x, model.labels())
        outputs, jacobian = truth.outputs, truth.jacobian
    p = np.exp(outputs - outputs.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    total = np.zeros_like(truth.ggn)
    for i in range(outputs.shape[0]):
        for k in range(outputs.shape[1]):
            weights = np.eye(outputs.shape[0])[i]
            labels = np.full(outputs.shape[0], k)
            at = losses.softmax_cross_entropy(outputs, labels, weights)
            total += p[i, k] / outputs.shape[0] * dense.empirical_fisher(jacobian, at)
    np.testing.assert_allclose(total, truth.ggn, rtol=1e-10, atol=1e-13)
