"""Operators multiply like the dense matrices of all examples, whatever pieces the data come in."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import operators
from curvax.curvature import ModelLoss
from curvax.losses import SquaredError
from tests.operators.problem import LOSS, MODELS, problem
from tests.oracle import dense
from tests.oracle.models import MLP_TANH

CENTERED = SquaredError(centered=True)
pytestmark = pytest.mark.usefixtures("x64", "quick_programs")


class Loader:
    """Starts anew at each iteration, as data loaders do."""

    def __init__(self, batches):
        self.batches, self.walks = batches, 0

    def __iter__(self):
        self.walks += 1
        return iter(self.batches)


def data(p, kind):
    return {"one": p.batch, "list": p.batches, "loader": Loader(p.batches)}[kind]


@pytest.mark.parametrize(
    ("model", "kind"), [*((m, "list") for m in MODELS), (MLP_TANH, "one"), (MLP_TANH, "loader")], ids=str
)
def test_ggn_is_that_of_all_examples(model, kind):
    p = problem(model)
    matrix = operators.ggn(p.model, LOSS, p.params, data(p, kind))
    np.testing.assert_allclose(matrix.to_dense(), p.truth.ggn, atol=1e-12 * np.abs(p.truth.ggn).max())
    if model is MLP_TANH:
        flat = np.random.default_rng(0).normal(size=matrix.shape[0])
        want = p.truth.ggn @ flat
        np.testing.assert_allclose(matrix @ flat, want, atol=1e-12)
        np.testing.assert_allclose(dense.vector(matrix @ dense.like(flat, p.params)), want, atol=1e-12)


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_hessian_and_empirical_fisher(kind):
    p = problem(MLP_TANH)

    def loss_fn(params, batch):
        log_p = jax.nn.log_softmax(p.predict(params, batch["x"]))
        mask = jnp.asarray(batch["mask"], log_p.dtype)
        return -jnp.sum(mask * jnp.take_along_axis(log_p, batch["y"][:, None], 1)[:, 0]), jnp.sum(mask)

    want = dense.hessian(lambda q: loss_fn(q, p.batch)[0] / loss_fn(q, p.batch)[1], p.params)
    for objective in (loss_fn, ModelLoss(p.model, LOSS)):
        got = operators.hessian(objective, p.params, data(p, kind))
        np.testing.assert_allclose(got.to_dense(), want, atol=1e-12)
        assert got.is_symmetric and not got.is_positive
    got = operators.empirical_fisher(p.model, LOSS, p.params, data(p, kind))
    np.testing.assert_allclose(got.to_dense(), p.truth.empirical_fisher, atol=1e-12)


def test_plain_mean_of_a_loss_function_weighs_batches_by_their_examples():
    p = problem(MLP_TANH)

    def loss_fn(params, batch):
        return jnp.mean(jnp.sum(p.predict(params, batch["x"]) ** 4, -1))

    want = dense.hessian(lambda q: loss_fn(q, p.batch), p.params)
    np.testing.assert_allclose(operators.hessian(loss_fn, p.params, p.batches).to_dense(), want, atol=1e-11)


def test_fisher_of_a_key_is_one_matrix_and_approaches_the_ggn():
    p = problem(MLP_TANH)
    key = jax.random.key(3)
    first, second = (operators.fisher(p.model, LOSS, p.params, p.batches, key) for _ in range(2))
    np.testing.assert_array_equal(first.to_dense(), second.to_dense())
    other = operators.fisher(p.model, LOSS, p.params, p.batches, jax.random.key(4))
    assert np.abs(first.to_dense() - other.to_dense()).max() > 1e-4
    many = operators.fisher(p.model, LOSS, p.params, p.batches, key, n_samples=4000).to_dense()
    assert dense.relative_error(np.asarray(many), p.truth.ggn) < 0.05


def test_jacobian_and_its_transpose():
    p = problem(MLP_TANH)
    jacobian = operators.jacobian(p.predict, p.params, p.batch["x"])
    np.testing.assert_allclose(jacobian.to_dense(), p.truth.jacobian, atol=1e-12)
    np.testing.assert_allclose(jacobian.T.to_dense(), p.truth.jacobian.T, atol=1e-12)
    np.testing.assert_allclose((jacobian @ jacobian.T).to_dense(), p.truth.jacobian @ p.truth.jacobian.T, atol=1e-11)


def test_algebra_restriction_and_transformations():
    p = problem(MLP_TANH)
    ggn = operators.ggn(p.model, LOSS, p.params, p.batch)
    c, n = p.truth.ggn, len(p.truth.ggn)
    combined = (2 * ggn - ggn * 0.5 + ggn).shift(0.3)
    np.testing.assert_allclose(combined.to_dense(), 2.5 * c + 0.3 * np.eye(n), atol=1e-12)
    np.testing.assert_allclose((-ggn).T.to_dense(), -c, atol=1e-12)
    first = jax.tree.leaves(p.params)[0].size
    kept = jax.tree.unflatten(jax.tree.structure(p.params), [i == 0 for i in range(len(jax.tree.leaves(p.params)))])
    block = ggn.restrict(kept)
    np.testing.assert_allclose(block.to_dense(), c[:first, :first], atol=1e-12)
    assert block.is_positive and block.shape == (first, first)
    # As an argument of a compiled function, and along an axis of several parameter points.
    v = np.random.default_rng(0).normal(size=n)
    np.testing.assert_allclose(jax.jit(lambda op, v: op @ v)(combined, v), combined.to_dense() @ v, atol=1e-12)
    points = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), p.params)
    each = jax.vmap(lambda q: operators.ggn(p.model, LOSS, q, p.batch) @ v)(points)
    np.testing.assert_allclose(each[0], c @ v, atol=1e-12)
    assert np.abs(each[1] - c @ v).max() > 1e-3


def test_stream_is_walked_once_per_product_and_says_how_far():
    p = problem(MLP_TANH)
    loader, seen = Loader(p.batches), []
    matrix = operators.StreamedCurvature(*_parts(p), loader, progress=seen.append)
    v = np.ones(matrix.shape[0])
    assert np.isfinite(matrix @ v).all()
    assert (loader.walks, seen) == (2, [1, 2])  # the shares, and the product
    assert (matrix @ np.ones((matrix.shape[0], 5))).shape == (matrix.shape[0], 5)
    assert loader.walks == 3
    with pytest.raises(TypeError, match="pass its batches as a list"):
        jax.jit(lambda v: matrix @ v)(v)


def _parts(p):
    matrix = operators.ggn(p.model, LOSS, p.params, p.batch)
    return matrix.curvature, matrix.at


def test_bfloat16_parameters():
    p = problem(MLP_TANH, jnp.bfloat16)
    matrix = operators.ggn(p.predict, LOSS, p.params, p.batch)
    assert matrix.dtype == np.float32
    assert np.isfinite(matrix @ np.ones(matrix.shape[0])).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: operators.ggn(p.model, LOSS, p.params, iter(p.batches)) @ np.ones(3), "multiplies trees"),
        (lambda p: operators.ggn(p.model, LOSS, p.params, []), "data has no batches"),
        (lambda p: operators.ggn(p.model, LOSS, p.params, {"x": p.batch["x"], "y": p.batch["y"]}), "mask"),
        (lambda p: operators.ggn(p.model, LOSS, p.params, p.batch) @ np.ones(3), "multiplies trees like its domain"),
        (lambda p: operators.ggn(p.model, LOSS, p.params, p.batch).to_dense(max_entries=9), "max_entries=9"),
        (lambda p: operators.ggn(p.predict, CENTERED, p.params, _regression(p)), "couples the examples"),
        (lambda p: operators.jacobian(p.predict, p.params, p.batch["x"]).restrict(True), "symmetric"),
        (lambda p: operators.ggn(p.model, LOSS, p.params, p.batch).restrict(False), "keeps no leaf"),
    ],
)
def test_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError, KeyError), match=message):
        make(problem(MLP_TANH))


def _regression(p):
    return [{"x": b["x"], "y": p.predict(p.params, b["x"])} for b in p.batches]


def test_an_iterator_is_told_apart_from_a_loader():
    p = problem(MLP_TANH)
    matrix = operators.ggn(p.model, LOSS, p.params, iter(p.batches))
    with pytest.raises(TypeError, match="empty after one walk"):
        matrix.apply(matrix.at.params)
