"""Trace estimators against exact traces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.estimators import HutchinsonTrace, HutchPlusPlus, XTrace
from curvax.estimators.xtrace import _leave_one_out
from tests.estimators import standin
from tests.estimators.standin import SIZE, Dense, assert_mean, keys
from tests.oracle.compiling import array, quick_jit

N = 60
BUDGET = 12
METHODS = [HutchinsonTrace(BUDGET), HutchPlusPlus(BUDGET), XTrace(BUDGET)]
each = pytest.mark.parametrize("estimator", METHODS, ids=lambda e: type(e).__name__)
sketched = pytest.mark.parametrize("estimator", METHODS[1:], ids=lambda e: type(e).__name__)


def _trace(estimator, matrix, key, dtype):
    lin = Dense(matrix, standin.like(dtype) if len(matrix) == SIZE else standin.flat_like(len(matrix), dtype))
    return estimator.trace(lin.product, lin.params_like, key)


_one = quick_jit(_trace, static_argnums=(0, 3))
_many = quick_jit(jax.vmap(_trace, in_axes=(None, None, 0, None)), static_argnums=(0, 3))


def once(estimator, matrix: np.ndarray, dtype=jnp.float32, seed: int = 0):
    return _one(estimator, array(matrix, dtype), jax.random.key(seed), dtype)


def sample(estimator, matrix: np.ndarray, m: int = 1000):
    return _many(estimator, jnp.asarray(matrix), keys(m), jnp.float64)


@pytest.mark.fast
@each
@pytest.mark.parametrize("make", [standin.decaying, standin.indefinite], ids=["positive", "indefinite"])
def test_unbiased_with_an_honest_standard_error(x64, estimator, make):
    matrix = make(N)
    got = sample(estimator, matrix)
    assert got.products == BUDGET
    assert_mean(np.asarray(got.value), np.trace(matrix))
    claimed = np.sqrt(np.mean(np.square(got.standard_error)))
    assert 0.6 < claimed / np.std(got.value) < 1.7


def test_each_method_beats_the_last_on_a_decaying_spectrum(x64):
    spread = [np.std(sample(type(e)(2 * BUDGET), standin.decaying(N)).value) for e in METHODS]
    assert spread[2] < spread[1] / 2 < spread[0] / 4


def test_xtrace_beats_the_length_noise_on_a_flat_spectrum(x64):
    """All of the identity's trace is in the normalization of the test vectors."""
    np.testing.assert_allclose(sample(XTrace(BUDGET), np.eye(N)).value, N, rtol=1e-12)


@each
def test_more_products_have_less_variance(x64, estimator):
    more = type(estimator)(2 * BUDGET)
    matrix = standin.decaying(N)
    assert np.std(sample(more, matrix).value) < 0.8 * np.std(sample(estimator, matrix).value)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize(("estimator", "rank"), [(HutchPlusPlus(12), 4), (XTrace(12), 5), (XTrace(12), 1)], ids=str)
def test_exact_on_low_rank(x64, estimator, rank, dtype):
    matrix = standin.low_rank(N, rank)
    got = once(estimator, matrix, dtype)
    tolerance = 200 * float(np.finfo(dtype).eps)
    np.testing.assert_allclose(got.value, np.trace(matrix), rtol=tolerance)
    assert float(got.standard_error) < tolerance * np.trace(matrix)


@sketched
def test_exact_on_a_low_rank_coordinate_block(estimator):
    """Images that are exactly 0 in most entries, and an exactly singular triangular factor."""
    got = once(estimator, np.diag(np.concatenate([[3.0, 2.0], np.zeros(N - 2)])), jnp.float32)
    np.testing.assert_allclose(got.value, 5.0, rtol=1e-5)


@each
def test_the_zero_operator_has_trace_zero(estimator):
    got = once(estimator, np.zeros((N, N)), jnp.float32)
    assert got.value == 0 and got.standard_error == 0


@pytest.mark.parametrize("rank", [N, 3])
def test_xtrace_is_the_leave_one_out_formula(x64, rank):
    """Each estimate against a QR factorization without the column that is left out."""
    matrix = standin.decaying(N) if rank == N else standin.low_rank(N, rank)
    k = 6
    weights = np.random.default_rng(1).normal(size=(N, k))
    y = matrix @ weights
    q, _ = np.linalg.qr(y)
    got = _leave_one_out(*(jnp.asarray(a) for a in (weights, y, q, matrix @ q)))
    for i in range(k):
        u, s, _ = np.linalg.svd(np.delete(y, i, axis=1), full_matrices=False)
        u = u[:, s > 1e-12 * s[0]]
        rest = weights[:, i] - u @ (u.T @ weights[:, i])
        expected = np.trace(u.T @ matrix @ u) + (N - k + 1) * rest @ matrix @ rest / (rest @ rest)
        np.testing.assert_allclose(got[i], expected, rtol=1e-9)


@sketched
def test_budgets_beyond_the_size_are_exact(x64, estimator):
    matrix = standin.indefinite(SIZE)
    got = once(type(estimator)(2 * SIZE), matrix, jnp.float64)
    np.testing.assert_allclose(got.value, np.trace(matrix), rtol=1e-13)
    assert got.standard_error == 0 and got.products == SIZE


def test_a_budget_just_below_the_size_still_works(x64):
    matrix = standin.decaying(SIZE, 0.9)
    for estimator in (XTrace(2 * SIZE - 1), HutchPlusPlus(SIZE - 1)):
        assert_mean(np.asarray(sample(estimator, matrix).value), np.trace(matrix))
        assert sample(estimator, matrix).products == estimator.n_products // 2 * 2


def test_one_probe_does_not_know_its_error():
    got = once(HutchinsonTrace(), np.eye(SIZE), jnp.float32)
    assert got.value == SIZE and np.isinf(got.standard_error)


@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-25, 1e25])
@each
def test_scale_equivariance(estimator, scale):
    matrix = standin.decaying(N)
    a, b = once(estimator, matrix), once(estimator, matrix * scale)
    np.testing.assert_allclose(b.value, scale * float(a.value), rtol=2e-5)
    np.testing.assert_allclose(b.standard_error, scale * float(a.standard_error), rtol=1e-3)


@each
@pytest.mark.parametrize("empty", [{}, {"a": jax.ShapeDtypeStruct((0, 3), jnp.bfloat16)}], ids=["none", "zero-size"])
def test_empty_trees(estimator, empty):
    got = estimator.trace(lambda v: v, empty, jax.random.key(0))
    assert got.value.dtype == jnp.float32 and got.products == 0
    assert got.value == 0 and got.standard_error == 0


@each
def test_mixed_and_narrow_dtypes(x64, estimator):
    shapes = {
        "a": jax.ShapeDtypeStruct((20,), jnp.bfloat16),
        "b": jax.ShapeDtypeStruct((20,), jnp.float32),
        "c": jax.ShapeDtypeStruct((20,), jnp.float64),
    }
    seen = []

    def product(v):
        seen.append(jax.tree.map(lambda x: x.dtype.name, v))
        return jax.tree.map(lambda x: x + x, v)

    got = estimator.trace(product, shapes, jax.random.key(0))
    assert got.value.dtype == jnp.float64
    assert seen[0] == {"a": "float32", "b": "float32", "c": "float64"}
    np.testing.assert_allclose(got.value, 120, rtol=1e-5 if not isinstance(estimator, HutchPlusPlus) else 0.1)


@pytest.mark.parametrize("make", [HutchPlusPlus, XTrace])
def test_counts_are_checked(make):
    with pytest.raises(ValueError, match="n_products must be at least 4, got 3"):
        make(3)
    with pytest.raises(ValueError, match="n_probes must be at least 1"):
        HutchinsonTrace(0)
