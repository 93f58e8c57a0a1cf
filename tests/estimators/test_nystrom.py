"""The randomized Nystrom approximation against dense eigenvalues."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.estimators import RandomizedNystrom
from curvax.tree import accumulation_dtype
from tests.estimators import standin
from tests.estimators.standin import SIZE, Dense, keys
from tests.oracle.compiling import array, quick_jit

N = 60
BOTH = pytest.mark.parametrize("indefinite", [False, True], ids=["one-pass", "two-pass"])


def _low_rank(method, matrix, key, dtype):
    lin = Dense(matrix, standin.like(dtype) if len(matrix) == SIZE else standin.flat_like(len(matrix), dtype))
    return method.low_rank(lin.product, lin.params_like, key)


_one = quick_jit(_low_rank, static_argnums=(0, 3))
_many = quick_jit(jax.vmap(_low_rank, in_axes=(None, 0, 0, None)), static_argnums=(0, 3))


def approximate(matrix, rank, dtype=jnp.float64, indefinite=False):
    """The approximation as a dense matrix, and its values."""
    found = _one(
        RandomizedNystrom(rank, indefinite), jnp.asarray(matrix, accumulation_dtype(dtype)), jax.random.key(0), dtype
    )
    basis, values = np.asarray(found.basis, np.float64), np.asarray(found.values, np.float64)
    eps = float(np.finfo(found.values.dtype).eps)
    np.testing.assert_allclose(basis.T @ basis, np.eye(basis.shape[1]), atol=100 * eps)
    assert np.all(values >= 0) and np.all(np.diff(values) <= 0)
    return (basis * values) @ basis.T, values


@pytest.mark.fast
@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("rank", [6, 9])
def test_exact_on_low_rank(x64, rank, dtype, indefinite):
    matrix = standin.low_rank(N, 4)
    got, values = approximate(matrix, rank, dtype, indefinite)
    np.testing.assert_allclose(got, matrix, atol=5000 * float(np.finfo(dtype).eps))
    np.testing.assert_allclose(values[:4], np.linspace(5, 1, 4), rtol=1000 * float(np.finfo(dtype).eps))
    assert np.all(values[4:] <= 5000 * float(np.finfo(dtype).eps))


@BOTH
def test_never_above_and_near_the_best(x64, indefinite):
    """Rank 2 p - 1: E|C - C_nys| <= 3 lambda_p + 4 e^2 / p (sum of lambda_j, j >= p); Frangella et al., section 2."""
    matrix, p = standin.decaying(N), 6
    spectrum = 0.7 ** np.arange(N)
    method = RandomizedNystrom(2 * p - 1, indefinite)
    found = _many(method, jnp.asarray(np.stack([matrix] * 20)), keys(20), jnp.float64)
    assert np.all(found.values <= spectrum[: 2 * p - 1] * (1 + 1e-10))
    rest = matrix - np.einsum("mir,mr,mjr->mij", found.basis, found.values, found.basis)
    eigenvalues = np.linalg.eigvalsh(rest)
    if not indefinite:
        assert eigenvalues.min() > -1e-12
    error = np.mean(np.abs(eigenvalues).max(axis=1))
    assert error <= 3 * spectrum[p - 1] + 4 * np.e**2 / p * spectrum[p - 1 :].sum()
    assert error < 10 * spectrum[2 * p - 1]


@BOTH
def test_the_zero_operator_has_zero_values(indefinite):
    got, values = approximate(np.zeros((N, N)), 5, jnp.float32, indefinite)
    assert np.all(values == 0) and np.all(got == 0)


@BOTH
def test_rank_beyond_the_size(x64, indefinite):
    matrix = standin.decaying(SIZE)
    got, values = approximate(matrix, SIZE + 5, indefinite=indefinite)
    assert values.shape == (SIZE,)
    np.testing.assert_allclose(got, matrix, atol=1e-12)


def test_two_passes_give_the_positive_part(x64):
    spectrum = np.concatenate([[8.0, 4.0, -6.0, -3.0], np.zeros(N - 4)])
    matrix = standin.symmetric(spectrum)
    got, values = approximate(matrix, 6, indefinite=True)
    np.testing.assert_allclose(values[:2], [8, 4], rtol=1e-12)
    q = np.linalg.eigh(matrix)
    positive = (q.eigenvectors * np.maximum(q.eigenvalues, 0)) @ q.eigenvectors.T
    np.testing.assert_allclose(got, positive, atol=1e-11)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_one_pass_stays_bounded_on_indefinite_operators(x64, dtype):
    matrices = np.stack([standin.symmetric(np.random.default_rng(seed).normal(size=N), seed) for seed in range(50)])

    got = np.asarray(_many(RandomizedNystrom(10), jnp.asarray(matrices, dtype), keys(50), dtype).values)
    assert np.all(np.isfinite(got)) and np.all(got >= 0)
    assert np.all(got[:, 0] <= 7 * np.linalg.norm(matrices, axis=(1, 2)))


@BOTH
@pytest.mark.parametrize("scale", [1e-6, 1e6, 1e-25, 1e25])
def test_scale_equivariance(scale, indefinite):
    matrix = standin.decaying(N)
    one, a = approximate(matrix, 8, jnp.float32, indefinite)
    other, b = approximate(scale * matrix, 8, jnp.float32, indefinite)
    np.testing.assert_allclose(b, scale * a, rtol=1e-4, atol=1e-5 * scale)
    np.testing.assert_allclose(other, scale * one, atol=1e-5 * scale)


@BOTH
def test_rounding_in_the_product_is_not_negative_curvature(indefinite):
    """A float32 Gauss-Newton product of low rank has slightly negative eigenvalues; the answer stays accurate."""
    n = 150
    matrix = standin.low_rank(n, 3)
    noise = np.random.default_rng(0).normal(size=(5, n, n)) * 1e-6 / np.sqrt(n)

    noisy = array(matrix + noise + noise.swapaxes(1, 2), jnp.float32)
    found = _many(RandomizedNystrom(12, indefinite), noisy, keys(5), jnp.float32)
    got = np.einsum("mir,mr,mjr->mij", found.basis, found.values, found.basis)
    assert np.linalg.norm(got - matrix, 2, axis=(1, 2)).max() < 1e-3


@BOTH
def test_bfloat16_and_empty_trees(indefinite):
    _, values = approximate(standin.low_rank(N, 3), 5, jnp.bfloat16, indefinite)
    np.testing.assert_allclose(values[:3], [5, 3, 1], rtol=1e-4)
    found = RandomizedNystrom(3, indefinite).low_rank(lambda v: v, {}, jax.random.key(0))
    assert found.basis.shape == (0, 0) and found.values.shape == (0,)


@BOTH
def test_non_finite_products_show(indefinite):
    method = RandomizedNystrom(4, indefinite)
    found = _one(method, jnp.full((N, N), jnp.nan, jnp.float32), jax.random.key(0), jnp.float32)
    assert not np.all(np.isfinite(found.values))


def test_counts_are_checked():
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        RandomizedNystrom(0)
