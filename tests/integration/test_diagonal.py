"""The diagonal lane against plain NumPy.

With a loss that is a sum over parameters of one-dimensional functions the Hessian is diagonal, and a Rademacher probe
gives its diagonal exactly: z (H z) = diag(H) whatever the signs. So AdaHessian and Sophia-H have exact references.
Both means are corrected for their start at zero, and floors are relative to the mean magnitude of the diagonal.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.integration.harness import batch_of, key, precision, standard_truth
from tests.oracle import dense, models
from tests.oracle.compiling import quick_jit

SIZE = 5
BATCH = {"x": np.linspace(-1.0, 1.0, SIZE), "y": np.zeros(SIZE)}


def _separable(params, batch):
    """sum_i cosh(p_i - x_i) + p_i^4/4, of gradient sinh(p - x) + p^3 and Hessian diag(cosh(p - x) + 3 p^2)."""
    x = jnp.asarray(batch["x"], params.dtype)
    return jnp.sum(jnp.cosh(params - x) + params**4 / 4)


def _by_hand(p):
    x = BATCH["x"]
    return np.sinh(p - x) + p**3, np.cosh(p - x) + 3 * p**2


def _run(method, start, steps):
    with precision("float64"):
        params = jnp.asarray(start)
        step, state = quick_jit(method.step), method.init(params)
        path = []
        for i in range(steps):
            params, state, _ = step(params, BATCH, state, key(i))
            path.append(np.asarray(params))
    return path


START = np.array([0.4, -0.7, 1.1, 0.2, -0.3])


@pytest.mark.fast
@pytest.mark.parametrize("power", [1.0, 0.5])
@pytest.mark.parametrize("every", [1, 3])
def test_adahessian_step_by_step(power, every):
    b1, b2, rate, eps = 0.9, 0.95, 0.15, 1e-4
    method = curvax.adahessian(
        clip_value=None,
        loss_fn=_separable,
        beta1=b1,
        beta2=b2,
        hessian_power=power,
        eps=eps,
        eval_every_k=every,
        learning_rate=rate,
    )
    path = _run(method, START, 6)
    p, m, v, refreshed = START.copy(), np.zeros(SIZE), np.zeros(SIZE), 0
    for t, got in enumerate(path):
        g, h = _by_hand(p)
        m = b1 * m + (1 - b1) * g
        if t % every == 0:
            v, refreshed = b2 * v + (1 - b2) * h**2, refreshed + 1
        diagonal = np.sqrt(v / (1 - b2**refreshed))
        direction = (m / (1 - b1 ** (t + 1))) / (diagonal**power + eps * np.mean(diagonal) ** power)
        p = p - rate * direction
        np.testing.assert_allclose(got, p, rtol=1e-9, err_msg=f"step {t}")


@pytest.mark.fast
@pytest.mark.parametrize("every", [1, 4])
def test_sophia_h_step_by_step(every):
    b1, b2, gamma, rate, decay = 0.9, 0.95, 0.4, 0.1, 0.2
    method = curvax.sophia_h(
        loss_fn=_separable,
        beta1=b1,
        beta2=b2,
        gamma=gamma,
        eval_every_k=every,
        learning_rate=rate,
        weight_decay=decay,
    )
    path = _run(method, START, 6)
    p, m, h_mean, refreshed = START.copy(), np.zeros(SIZE), np.zeros(SIZE), 0
    for t, got in enumerate(path):
        g, h = _by_hand(p)
        m = b1 * m + (1 - b1) * g
        if t % every == 0:
            h_mean, refreshed = b2 * h_mean + (1 - b2) * h, refreshed + 1
        diagonal = h_mean / (1 - b2**refreshed)
        quotient = m / (1 - b1 ** (t + 1)) / np.maximum(gamma * diagonal, 1e-8 * np.mean(np.abs(diagonal)))
        direction = np.clip(quotient, -1.0, 1.0)
        p = p - rate * (direction + decay * p)
        np.testing.assert_allclose(got, p, rtol=1e-9, err_msg=f"step {t}")


def test_sophia_follows_the_gradient_sign_where_curvature_is_negative():
    def concave(params, batch):
        return -0.5 * jnp.sum(params**2) + 0.0 * jnp.sum(jnp.asarray(batch["x"], params.dtype))

    method = curvax.sophia_h(loss_fn=concave, learning_rate=0.1, weight_decay=0.0)
    (got,) = _run(method, START, 1)
    np.testing.assert_allclose(got, START + 0.1 * np.sign(START), rtol=1e-6)


def test_adahessian_averages_over_the_spatial_axes_of_a_convolution_kernel():
    """HWIO kernels: one curvature per (input, output) channel pair, the mean over the first two axes."""
    rng = np.random.default_rng(0)
    scale = np.exp(rng.standard_normal((3, 3, 2, 2)))
    start = rng.standard_normal((3, 3, 2, 2))
    # Inputs with a single entry of one: the outputs are the kernel itself, and `scale` is the Hessian's diagonal.
    inputs = np.eye(18).reshape(18, 3, 3, 2)

    def loss_fn(params, batch):
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = jnp.asarray(inputs, params.dtype)
        outputs = jax.lax.conv_general_dilated(x, params, (1, 1), "VALID", dimension_numbers=dimensions)
        return 0.5 * jnp.sum(jnp.asarray(scale, params.dtype) * outputs.reshape(scale.shape) ** 2)

    method = curvax.adahessian(loss_fn=loss_fn, eps=0.0, learning_rate=1.0, clip_value=None, spatial_averaging=True)
    (got,) = _run(method, start, 1)
    averaged = scale.mean(axis=(0, 1), keepdims=True)
    np.testing.assert_allclose(start - got, scale * start / averaged, rtol=1e-9)
    plain = curvax.adahessian(loss_fn=loss_fn, eps=0.0, learning_rate=1.0, clip_value=None, spatial_averaging=False)
    (got,) = _run(plain, start, 1)
    np.testing.assert_allclose(start - got, start, rtol=1e-9)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_sophia_g_curvature_is_the_ggn_diagonal_on_average(n_samples):
    """With a huge gamma nothing clips, so the first direction gives the curvature back: h = m / (gamma d)."""
    model, gamma, draws = models.MLP_TANH, 1e6, 4000
    truth = standard_truth(model, "ce")
    with precision("float64"):
        method = curvax.sophia_g(
            predict_fn=model.predict,
            beta2=0.0,
            gamma=gamma,
            eps=0.0,
            n_samples=n_samples,
            weight_decay=0.0,
            learning_rate=1.0,
        )
        params, batch = model.params(), batch_of(model, "ce", "float64")
        state = method.init(params)

        @quick_jit
        @jax.vmap
        def direction(k):
            new, _, _ = method.step(params, batch, state, k)
            return jnp.concatenate(
                [jnp.ravel(a - b) for a, b in zip(*map(jax.tree.leaves, (params, new)), strict=True)]
            )

        found = np.asarray(direction(jax.random.split(key(), draws)))
    with np.errstate(divide="ignore"):
        drawn = truth.gradient / (gamma * found)
    # Recovered through a difference of parameters: only where the direction is not lost to rounding.
    usable = np.all(np.abs(found) > 1e-12, axis=0) & np.all(drawn > 0, axis=0)
    assert usable.mean() > 0.5
    mean, error = drawn.mean(0)[usable], drawn.std(0)[usable] / np.sqrt(draws)
    want = np.diag(truth.ggn)[usable]
    assert np.all(np.abs(mean - want) <= 5.0 * error + 1e-3 * want)
    assert dense.relative_error(mean, want) < 0.2
