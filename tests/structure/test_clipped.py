"""Clipped sums against gradients of single examples, formed and clipped one by one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.structure import clipped_gradient
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.oracle.models import ATTENTION, CNN, EMBEDDING, MLP_TANH


def one_by_one(predict, loss, params, x, y, w, bound):
    """Each example's part of the gradient, clipped; weights enter the normalizer of the whole batch."""
    effective = loss.effective_weights(jax.eval_shape(predict, params, x), w)

    def part(p, x, y, w):
        return loss.value(predict(p, x[None]), y[None], w[None])

    own = quick_jit(jax.vmap(jax.grad(part), (None, 0, 0, 0)))(params, x, y, effective)
    each = np.concatenate([np.reshape(leaf, (len(x), -1)) for leaf in jax.tree.leaves(own)], axis=1)
    norms = np.linalg.norm(each, axis=1)
    return np.minimum(1, bound / norms) @ each, norms


@pytest.mark.parametrize(
    ("model", "reduction"),
    [(MLP_TANH, "sum"), (MLP_TANH, "mean"), (CNN, "mean"), (ATTENTION, "mean"), (EMBEDDING, "mean")],
    ids=str,
)
def test_sum_of_clipped_gradients(x64, model, reduction):
    params = model.init(jax.random.key(0), jnp.float64)
    rng = np.random.default_rng(1)
    shape = model.input_shape
    x = jnp.asarray(rng.integers(0, model.vocabulary, shape) if model.vocabulary else rng.normal(size=shape))
    outputs = jax.eval_shape(model.predict, params, x)
    y = jnp.asarray(rng.integers(0, outputs.shape[-1], outputs.shape[:-1]))
    w = jnp.asarray(rng.uniform(0.5, 2, shape[:1]))
    loss = SoftmaxCrossEntropy(reduction=reduction)
    clipped = quick_jit(lambda p, c: clipped_gradient(model.predict, loss, p, x, y, w, max_norm=c))
    bound = float(jnp.median(clipped(params, 1.0).norms))
    found = clipped(params, bound)
    want, norms = one_by_one(model.predict, loss, params, x, y, w, bound)
    np.testing.assert_allclose(dense.vector(found.gradient), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.norms, norms, rtol=1e-9)
    assert 0 < np.sum(norms > bound) < len(norms)


def _linear(params, x):
    return x @ params


def test_the_example_of_the_docstring():
    """Residuals of 1 at w = 0 make each gradient minus its input."""
    x = jnp.array([[3.0, 4.0], [0.6, 0.8]])
    loss = SquaredError(reduction="sum")
    found = clipped_gradient(_linear, loss, jnp.zeros((2, 1)), x, jnp.ones((2, 1)), max_norm=1.0)
    np.testing.assert_allclose(found.norms, [5, 1], rtol=1e-6)
    np.testing.assert_allclose(found.gradient[:, 0], [-1.2, -1.6], rtol=1e-6)


def test_what_weighs_nothing_contributes_nothing():
    x = jnp.array([[3.0, 4.0], [jnp.nan, jnp.inf], [0.0, 0.0]])
    loss, y, w = SquaredError(reduction="sum"), jnp.ones((3, 1)), jnp.array([1.0, 0.0, 1.0])
    found = clipped_gradient(_linear, loss, jnp.zeros((2, 1)), x, y, w, max_norm=1.0)
    np.testing.assert_allclose(found.gradient[:, 0], [-0.6, -0.8], rtol=1e-6)
    np.testing.assert_array_equal(found.norms[1:], 0)


def test_bad_arguments():
    x, y = jnp.ones((3, 2)), jnp.ones((3, 1))
    with pytest.raises(ValueError, match="max_norm must be positive"):
        clipped_gradient(_linear, SquaredError(), jnp.zeros((2, 1)), x, y, max_norm=0.0)
    with pytest.raises(TypeError, match="max_norm"):
        clipped_gradient(_linear, SquaredError(), jnp.zeros((2, 1)), x, y)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="no gradients of their own"):
        clipped_gradient(lambda p, x: (x - x.mean(0)) @ p, SquaredError(), jnp.ones((2, 1)), x, y, max_norm=1.0)
