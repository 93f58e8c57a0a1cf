"""Influence against the dense formula, and against refits that really leave an example out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import influence, operators
from curvax.losses import SquaredError
from tests.operators.problem import LOSS, problem
from tests.oracle import dense
from tests.oracle.models import MLP_TANH

pytestmark = pytest.mark.usefixtures("x64", "quick_programs")
LAM = 2.0


def linear(w, x):
    return x @ w


def ridge(x, y):
    return np.linalg.solve(x.T @ x + LAM * np.eye(x.shape[1]), x.T @ y)


def test_ridge_regression_by_refits():
    """Exactly: without example j the minimum moves by C^-1 g_j / (1 - leverage)."""
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(60, 3)), rng.normal(size=(60, 1))
    y, test = x @ np.ones((3, 1)) + noise, {"x": rng.normal(size=(5, 3)), "y": rng.normal(size=(5, 1))}
    w, loss = ridge(x, y), SquaredError(reduction="sum")
    batches = [{"x": x[:40], "y": y[:40]}, {"x": x[40:], "y": y[40:]}]
    inverse = operators.inverse(operators.ggn(linear, loss, w, batches), LAM)
    scores = influence.scores(
        inverse, influence.Data(linear, loss, w, batches), influence.Data(linear, loss, w, test), at_once=2
    )
    assert scores.shape == (5, 60)
    c = x.T @ x + LAM * np.eye(3)
    gradients, tests = x * (x @ w - y), test["x"] * (test["x"] @ w - test["y"])
    np.testing.assert_allclose(scores, tests @ np.linalg.solve(c, gradients.T), atol=1e-12)
    leverage = np.einsum("bi,ij,bj->b", x, np.linalg.inv(c), x)
    refits = np.stack([ridge(np.delete(x, j, 0), np.delete(y, j, 0)) for j in range(60)])
    slope = tests @ (refits[:, :, 0] - w[:, 0]).T
    np.testing.assert_allclose(scores / (1 - leverage), slope, atol=1e-10)
    losses = 0.5 * np.square(np.einsum("bi,ji->bj", test["x"], refits[:, :, 0]) - test["y"])
    change = losses - 0.5 * np.square(test["x"] @ w - test["y"])
    assert np.corrcoef(scores.ravel(), change.ravel())[0, 1] > 0.99


class Loader:
    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def test_network_with_masks_in_pieces_from_a_loader():
    p = problem(MLP_TANH)
    factors = operators.kfac(p.model, LOSS, p.params, p.batches)
    inverse = operators.inverse(factors, 0.1)
    train = influence.Data(p.model, LOSS, p.params, Loader(p.batches))
    test = influence.Data(p.model, LOSS, p.params, p.batches)
    scores = influence.scores(inverse, train, test, at_once=3)
    j = dense.outputs_and_jacobian(p.predict, p.params, p.batch["x"])[1].reshape(
        len(p.batch["x"]), -1, factors.shape[0]
    )
    f, mask = p.predict(p.params, p.batch["x"]), p.batch["mask"].astype(float)
    residual = (jax.nn.softmax(f) - jax.nn.one_hot(p.batch["y"], f.shape[-1])) * mask[:, None]
    each = np.einsum("bkn,bk->bn", j, residual)
    c = np.linalg.inv(np.asarray(factors.to_dense()) + 0.1 * np.eye(factors.shape[0]))
    want = each @ c @ (each / mask.sum()).T
    np.testing.assert_allclose(scores, want, atol=1e-12)
    assert not scores[:, mask == 0].any()
    np.testing.assert_allclose(influence.self_influences(inverse, test, test), np.diag(want), atol=1e-12)


def test_one_sentence():
    p = problem(MLP_TANH)
    data = influence.Data(p.model, LOSS, p.params, p.batch)
    other = operators.Diagonal(jnp.ones(3))
    with pytest.raises(ValueError, match="other parameters than those of the model"):
        influence.scores(other, data, data)
    with pytest.raises(ValueError, match="at_once must be at least 1"):
        influence.scores(other, data, data, at_once=0)
    centered = influence.Data(p.predict, SquaredError(centered=True), p.params, p.batch)
    with pytest.raises(ValueError, match="couples examples"):
        influence.scores(other, centered, data)
