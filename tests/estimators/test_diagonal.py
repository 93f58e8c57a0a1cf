"""Diagonal estimators against dense diagonals."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.estimators import BlockAverage, GaussNewtonBartlett, Hutchinson
from curvax.tree import accumulation_dtype
from tests.estimators import standin
from tests.estimators.standin import SIZE, Dense, assert_mean, dense, flat, flat_rows, keys
from tests.oracle.compiling import quick_jit


def _diagonal(estimator, matrix, factor, key, dtype):
    return estimator.diagonal(Dense(matrix, standin.like(dtype), factor), key)


_one = quick_jit(_diagonal, static_argnums=(0, 4))
_many = quick_jit(jax.vmap(_diagonal, in_axes=(None, None, None, 0, None)), static_argnums=(0, 4))


def once(estimator, matrix, factor=None, dtype=jnp.float32, seed: int = 0):
    wide = accumulation_dtype(dtype)
    factor = None if factor is None else jnp.asarray(factor, wide)
    return _one(estimator, jnp.asarray(matrix, wide), factor, jax.random.key(seed), dtype)


def sample(estimator, matrix, factor=None, m: int = 3000) -> np.ndarray:
    """Estimates (m, SIZE) in float64."""
    return flat_rows(_many(estimator, matrix, factor, keys(m), jnp.float64))


@dataclasses.dataclass(frozen=True)
class Softmax:
    """Weighted softmax regression on (B, D) inputs with weights weights; parameters (D, K)."""

    inputs: jax.Array
    weights: jax.Array
    params: jax.Array
    has_sampling: bool = True
    product: None = None

    @property
    def params_like(self):
        return jax.ShapeDtypeStruct(self.params.shape, self.params.dtype)

    def sampled_gradient(self, key):
        logits = self.inputs @ self.params
        labels = jax.nn.one_hot(jax.random.categorical(key, logits), logits.shape[-1], dtype=logits.dtype)
        return self.inputs.T @ (jnp.sqrt(self.weights)[:, None] * (jax.nn.softmax(logits) - labels))

    def exact(self) -> np.ndarray:
        p = np.asarray(jax.nn.softmax(self.inputs @ self.params))
        return np.einsum("b,bd,bk->dk", self.weights, np.asarray(self.inputs) ** 2, p * (1 - p))


@pytest.mark.fast
@pytest.mark.parametrize("n_probes", [1, 3])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_hutchinson_is_exact_on_diagonal_matrices(x64, n_probes, dtype):
    values = np.linspace(-2, 3, SIZE)
    got = once(Hutchinson(n_probes), np.diag(values), dtype=dtype)
    np.testing.assert_allclose(flat(got), values, rtol=4 * np.finfo(dtype).eps)
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), standin.like(dtype))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), got) == shapes


@pytest.mark.fast
@pytest.mark.parametrize("make", [standin.decaying, standin.indefinite], ids=["positive", "indefinite"])
def test_hutchinson_is_unbiased_with_its_known_variance(x64, make):
    matrix = make(SIZE)
    spread = {}
    for n_probes in (1, 8):
        samples = sample(Hutchinson(n_probes), matrix)
        assert_mean(samples, np.diag(matrix))
        spread[n_probes] = samples.var(axis=0)
        exact = (np.sum(matrix**2, axis=1) - np.diag(matrix) ** 2) / n_probes
        np.testing.assert_allclose(spread[n_probes], exact, rtol=0.15)
    assert np.all(spread[8] < spread[1] / 6)


def test_several_probes_are_one_batched_product(x64):
    calls = []
    lin = dense(standin.decaying(SIZE))

    @dataclasses.dataclass(frozen=True)
    class Counted:
        params_like = lin.params_like

        def product(self, v):
            calls.append(jax.typeof(jax.tree.leaves(v)[0]).shape)
            return lin.product(v)

    counted: Any = Counted()
    quick_jit(lambda k: Hutchinson(5).diagonal(counted, k))(jax.random.key(0))
    assert len(calls) == 1
    text = str(jax.make_jaxpr(lambda k: Hutchinson(5).diagonal(lin, k))(jax.random.key(0)))
    assert text.count("dot_general") == 1 and "scan" not in text


def test_magnitudes_are_taken_after_the_probes_and_before_the_blocks(x64):
    matrix = standin.indefinite(SIZE)
    plain = once(Hutchinson(4), matrix, dtype=jnp.float64)
    both = once(Hutchinson(4, use_abs=True, block_average=BlockAverage()), matrix, dtype=jnp.float64)
    np.testing.assert_allclose(both["b"], np.abs(plain["b"]))
    mean = np.abs(plain["w"]).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(both["w"], np.broadcast_to(mean, (3, 4)))
    signed = once(Hutchinson(4, block_average=BlockAverage()), matrix, dtype=jnp.float64)
    np.testing.assert_allclose(signed["w"], np.broadcast_to(np.mean(plain["w"], axis=1, keepdims=True), (3, 4)))


@pytest.mark.parametrize("n_samples", [1, 4])
def test_gauss_newton_bartlett_is_unbiased_for_a_weighted_softmax(x64, n_samples):
    rng = np.random.default_rng(0)
    lin: Any = Softmax(
        jnp.asarray(rng.normal(size=(6, 3))), jnp.asarray(rng.uniform(0, 1, 6)), jnp.asarray(rng.normal(size=(3, 4)))
    )
    samples = np.asarray(quick_jit(jax.vmap(lambda k: GaussNewtonBartlett(n_samples).diagonal(lin, k)))(keys(3000)))
    assert np.all(samples >= 0)
    assert_mean(samples, lin.exact())


def test_more_samples_have_less_variance(x64):
    factor = np.random.default_rng(0).normal(size=(SIZE, 9))
    matrix = factor @ factor.T
    few, many = (sample(GaussNewtonBartlett(n), matrix, factor) for n in (1, 8))
    assert_mean(few, np.diag(matrix))
    assert_mean(many, np.diag(matrix))
    assert np.all(many.var(axis=0) < few.var(axis=0) / 5)


def test_each_draw_of_targets_is_new():
    factor = np.random.default_rng(0).normal(size=(SIZE, 9))
    first, second, again = (
        flat(once(GaussNewtonBartlett(), factor @ factor.T, factor, seed=seed)) for seed in (0, 1, 0)
    )
    assert not np.allclose(first, second)
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("estimator", [Hutchinson(3, True), GaussNewtonBartlett(2)], ids=lambda e: type(e).__name__)
def test_scale_equivariance(estimator, scale):
    factor = np.random.default_rng(0).normal(size=(SIZE, 9))
    matrix = factor @ factor.T
    a, b = (flat(once(estimator, c * matrix, np.sqrt(c) * factor)) for c in (1.0, scale))
    np.testing.assert_allclose(b, scale * a, rtol=1e-4, atol=1e-5 * scale * np.abs(a).max())


def test_needs_are_static_facts():
    assert Hutchinson().needs_product and not Hutchinson().needs_sampling
    assert GaussNewtonBartlett().needs_sampling and not GaussNewtonBartlett().needs_product
    assert hash(Hutchinson(2, True, BlockAverage())) == hash(Hutchinson(2, True, BlockAverage()))


def test_bfloat16_parameters_get_float32_diagonals():
    got = once(Hutchinson(2), np.diag(np.linspace(1, 2, SIZE)), dtype=jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(got)} == {np.dtype("float32")}
    np.testing.assert_allclose(flat(got), np.linspace(1, 2, SIZE), rtol=1e-6)


@pytest.mark.parametrize("empty", [{}, {"a": jax.ShapeDtypeStruct((0, 3), jnp.float32)}], ids=["none", "zero-size"])
def test_empty_trees(empty):
    lin: Any = Dense(jnp.zeros((0, 0)), empty, jnp.zeros((0, 2)))
    for estimator in (Hutchinson(1), Hutchinson(3, block_average=BlockAverage()), GaussNewtonBartlett(3)):
        got = estimator.diagonal(lin, jax.random.key(0))
        assert jax.tree.map(jnp.shape, got) == jax.tree.map(lambda x: x.shape, empty)


def test_what_is_missing_is_said():
    bare = dense(np.eye(SIZE), jnp.float32)
    with pytest.raises(ValueError, match="Hutchinson estimator"):
        GaussNewtonBartlett().diagonal(bare, jax.random.key(0))
    without_products: Any = Softmax(jnp.ones((1, 1)), jnp.ones(1), jnp.ones((1, 1)))
    with pytest.raises(ValueError, match="products"):
        Hutchinson().diagonal(without_products, jax.random.key(0))


@pytest.mark.parametrize(("bad", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_counts_are_checked(bad, error):
    for make in (Hutchinson, GaussNewtonBartlett):
        with pytest.raises(error, match=r"n_(probes|samples) must be"):
            make(bad)
