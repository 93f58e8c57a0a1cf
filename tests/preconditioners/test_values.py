"""Each preconditioner against its formula in float64 NumPy."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.estimators import DiagonalEstimator, Hutchinson
from curvax.preconditioners import (
    AdaHessianPower,
    Damped,
    EmaDiagonal,
    IdentityPreconditioner,
    Jacobi,
    NystromPreconditioner,
    SophiaFloor,
)
from tests.estimators import standin
from tests.estimators.standin import SIZE, Dense, dense, flat
from tests.oracle.compiling import quick_jit

N = 60
ONES = np.ones(SIZE)


def ones(dtype=jnp.float64):
    return jax.tree.map(lambda x: jnp.ones(x.shape, dtype), standin.like())


def test_identity(x64):
    method = IdentityPreconditioner()
    assert method.apply(method.init(standin.like()), 0.3, v := ones()) is v


@pytest.mark.fast
@pytest.mark.parametrize("lam", [0.0, 0.3])
@pytest.mark.parametrize("add_lam", [True, False])
def test_jacobi(x64, lam, add_lam):
    d = np.linspace(-1, 2, SIZE)
    d[4] = 0
    method = Jacobi(Hutchinson(), add_lam=add_lam)
    state = refreshed(method, [d])
    expected = np.maximum(d, 0) + (lam if add_lam else 0)
    expected[expected == 0] = np.abs(d).mean()
    np.testing.assert_allclose(inverse_diagonal(method, state, lam), 1 / expected, rtol=1e-13)


def test_jacobi_keeps_only_the_latest(x64):
    method = Jacobi(Hutchinson(), every=4)
    state = refreshed(method, [3 * ONES, 5 * ONES])
    np.testing.assert_allclose(inverse_diagonal(method, state, 1.0), ONES / 6)
    assert method.every == 4


_refresh = quick_jit(
    lambda method, state, matrix, key, dtype: method.refresh(state, Dense(matrix, standin.like(dtype)), key),
    static_argnums=(0, 4),
)
_inverse = quick_jit(lambda method, state, lam, dtype: method.apply(state, lam, ones(dtype)), static_argnums=(0, 3))


def refreshed(method, diagonals, dtype=jnp.float64):
    """The state after refreshes with these diagonal matrices, which Hutchinson recovers exactly."""
    state = method.init(standin.like(dtype))
    for i, d in enumerate(diagonals):
        state = _refresh(method, state, jnp.asarray(np.diag(d), dtype), jax.random.key(i), dtype)
    return state


def inverse_diagonal(method, state, lam, dtype=jnp.float64) -> np.ndarray:
    return flat(_inverse(method, state, jnp.asarray(lam, dtype), dtype))


def history() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    rows = [rng.normal(size=SIZE) + 0.5 for _ in range(5)]
    for row in rows:
        row[3] = 0
    return rows


def dense_ema(rows, beta, square, correct) -> np.ndarray:
    total = np.zeros(SIZE)
    for row in rows:
        total = beta * total + (1 - beta) * (row**2 if square else row)
    total = total / (1 - beta ** len(rows)) if correct else total
    return np.sqrt(total) if square else total


@pytest.mark.fast
@pytest.mark.parametrize("correct", [True, False], ids=["corrected", "raw"])
@pytest.mark.parametrize("beta", [0.0, 0.99])
@pytest.mark.parametrize(
    "policy", [SophiaFloor(0.04, 1e-3), AdaHessianPower(1.0, 1e-4), AdaHessianPower(0.5, 1e-2), Damped()], ids=str
)
def test_ema(x64, policy, beta, correct):
    lam, rows = 0.2, history()
    method = EmaDiagonal(Hutchinson(), beta, 1, policy, correct)
    state = refreshed(method, rows)
    h = dense_ema(rows, beta, policy.root_mean_square, correct)
    scale = np.abs(h).mean()
    if isinstance(policy, SophiaFloor):
        expected = np.maximum(0.04 * h, 1e-3 * scale)
    elif isinstance(policy, AdaHessianPower):
        expected = h**policy.power + policy.eps * scale**policy.power
    else:
        expected = np.maximum(h, 0) + lam
    assert state.count == 5 and state.rejected == 0
    np.testing.assert_allclose(state.scale, scale, rtol=1e-12)
    np.testing.assert_allclose(inverse_diagonal(method, state, lam), 1 / expected, rtol=1e-12)


def test_bias_correction_makes_the_first_refresh_count_in_full():
    """In float32 too, where 1 - beta2^t loses digits if formed naively."""
    for policy, expected in ((Damped(), 1 / 3), (AdaHessianPower(eps=0.0), 1 / 3), (SophiaFloor(0.5), 2 / 3)):
        method = EmaDiagonal(Hutchinson(), 0.9999, denominator=policy)
        state = refreshed(method, [3 * ONES], jnp.float32)
        np.testing.assert_allclose(inverse_diagonal(method, state, 0.0, jnp.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_squares_neither_overflow_nor_underflow(scale):
    method = EmaDiagonal(Hutchinson(), 0.99, denominator=AdaHessianPower(eps=0.0))
    state = refreshed(method, [scale * ONES] * 3, jnp.float32)
    assert state.rejected == 0
    np.testing.assert_allclose(inverse_diagonal(method, state, 0.0, jnp.float32) * scale, 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("policy", "average"),
    [
        (SophiaFloor(0.04, 0.0), 0.04),
        (AdaHessianPower(0.5, 0.0), None),
        (AdaHessianPower(1.0, 0.0), 1.0),
        (Damped(), 1.0),
    ],
    ids=str,
)
def test_entries_without_curvature_get_an_average_step(x64, policy, average):
    d = np.concatenate([np.linspace(1, 4, SIZE - 2), [0, 0]])
    method = EmaDiagonal(Hutchinson(), 0.9, denominator=policy)
    got = inverse_diagonal(method, refreshed(method, [d]), 0.0)
    mean = d.mean()
    np.testing.assert_allclose(got[-2:], 1 / (np.sqrt(mean) if average is None else average * mean), rtol=1e-12)


def test_sophia_turns_negative_curvature_into_a_clipped_sign():
    method = EmaDiagonal(Hutchinson(), 0.99, 10, SophiaFloor())
    state = refreshed(method, [np.linspace(-2, -1, SIZE)], jnp.float32)
    momentum = jax.tree.map(lambda x: -1e-3 * x, ones(jnp.float32))
    np.testing.assert_array_equal(np.clip(flat(method.apply(state, 0.0, momentum)), -1, 1), -ONES)


def _nystrom_state(method, matrix, key, dtype):
    like = standin.like(dtype) if len(matrix) == SIZE else standin.flat_like(len(matrix), dtype)
    return method.refresh(method.init(like), Dense(matrix, like), key)


def _nystrom_inverse(method, state, lam):
    apply = jax.vmap(lambda v: method.apply(state, lam, {"a": v})["a"])
    return apply(jnp.eye(len(state.basis), dtype=state.basis.dtype))


_nystrom_state = quick_jit(_nystrom_state, static_argnums=(0, 3))
_nystrom_inverse = quick_jit(_nystrom_inverse, static_argnums=0)


def nystrom(matrix, rank, dtype=jnp.float64, indefinite=False):
    """The state after one refresh, and lam -> the dense P^-1."""
    method = NystromPreconditioner(rank, indefinite=indefinite)
    state = _nystrom_state(method, jnp.asarray(matrix, dtype), jax.random.key(0), dtype)
    return state, lambda lam: np.asarray(_nystrom_inverse(method, state, jnp.asarray(lam, dtype)), np.float64)


@pytest.mark.parametrize("lam", [1e-6, 1e-2, 10.0])
def test_nystrom_is_the_inverse_of_its_formula(x64, lam):
    state, inverse = nystrom(standin.decaying(N), 8)
    u, values = np.asarray(state.basis), np.asarray(state.values)
    p = (u * ((values + lam) / (values[-1] + lam))) @ u.T + np.eye(N) - u @ u.T
    np.testing.assert_allclose(inverse(lam) @ p, np.eye(N), atol=1e-10 * np.linalg.cond(p))


@pytest.mark.parametrize("lam", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("rank", [4, 12])
def test_nystrom_condition_number(x64, rank, lam):
    """At most (l + lam + |C - C_nys|) / lam, and far below that of C + lam I where the rank covers the spectrum."""
    matrix = standin.decaying(N)
    state, inverse = nystrom(matrix, rank)
    u, values = np.asarray(state.basis), np.asarray(state.values)
    error = np.linalg.norm(matrix - (u * values) @ u.T, 2)
    eigenvalues = np.linalg.eigvals(inverse(lam) @ (matrix + lam * np.eye(N))).real
    condition = eigenvalues.max() / eigenvalues.min()
    assert condition <= (values[-1] + lam + error) / lam * (1 + 1e-8)
    if rank == 12 and lam == 1e-2:
        assert condition < 7 < 100 < 1 / lam * 1.01


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nystrom_solves_low_rank_exactly(x64, dtype):
    """With the whole range covered, P is C + lam I up to a factor: one iteration of CG solves the system."""
    matrix, lam = standin.low_rank(N, 4), 0.1
    _, inverse = nystrom(matrix, 6, dtype)
    np.testing.assert_allclose(
        inverse(lam) @ (matrix + lam * np.eye(N)) / lam, np.eye(N), atol=2e3 * np.finfo(dtype).eps
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_nystrom_without_damping_on_low_rank_is_positive_definite(x64, dtype):
    _, inverse = nystrom(standin.low_rank(N, 4), 9, dtype)
    p = inverse(0.0)
    assert np.linalg.eigvalsh((p + p.T) / 2)[0] > 0


def test_nystrom_leaves_negative_directions_alone(x64):
    spectrum = np.concatenate([[8.0, 4.0, -6.0, -3.0], np.zeros(N - 4)])
    matrix, lam = standin.symmetric(spectrum), 0.5
    _, inverse = nystrom(matrix, 6, indefinite=True)
    vectors = np.linalg.eigh(matrix).eigenvectors
    acted = np.diag(vectors.T @ inverse(lam) @ vectors)
    np.testing.assert_allclose(acted[[0, 1, -2, -1]], [1, 1, lam / (4 + lam), lam / (8 + lam)], rtol=1e-9)


def test_nystrom_rank_beyond_the_size(x64):
    state, inverse = nystrom(standin.decaying(SIZE), 100)
    assert state.basis.shape == (SIZE, SIZE)
    lam = 0.1
    product = inverse(lam) @ (standin.decaying(SIZE) + lam * np.eye(SIZE))
    np.testing.assert_allclose(product, product[0, 0] * np.eye(SIZE), atol=1e-10)


def test_refreshes_use_their_key():
    method = NystromPreconditioner(3)
    matrix = jnp.asarray(standin.decaying(N), jnp.float32)
    a, b, again = (_nystrom_state(method, matrix, jax.random.key(seed), jnp.float32) for seed in (0, 1, 0))
    assert np.all(a.basis == again.basis) and not np.allclose(a.basis, b.basis)


@dataclasses.dataclass(frozen=True)
class Doubled(DiagonalEstimator):
    """An estimator that answers in another floating dtype."""

    @property
    def needs_product(self) -> bool:
        return False

    @property
    def needs_sampling(self) -> bool:
        return False

    def diagonal(self, linearization, key):
        return jax.tree.map(lambda x: jnp.full(x.shape, 2, jnp.float16), linearization.params_like)


@pytest.mark.parametrize("make", [Jacobi, EmaDiagonal])
def test_any_estimator_serves(make):
    method = make(Doubled())
    lin = dense(np.eye(SIZE), jnp.float32)
    state = method.refresh(method.init(lin.params_like), lin, jax.random.key(0))
    np.testing.assert_allclose(flat(method.apply(state, 0.0, ones(jnp.float32))), 0.5, rtol=1e-6)
    assert not method.needs_product and not method.needs_sampling


def test_settings_are_checked():
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        Jacobi(Hutchinson(), every=0)
    with pytest.raises(TypeError, match="rank must be a Python integer"):
        NystromPreconditioner(cast(Any, 2.0))
    with pytest.raises(ValueError, match=r"beta2 must be in \[0, 1\), got 1.0"):
        EmaDiagonal(Hutchinson(), 1.0)
    with pytest.raises(ValueError, match="gamma must be positive"):
        SophiaFloor(0.0)
    with pytest.raises(ValueError, match="eps must be non-negative"):
        AdaHessianPower(eps=-1.0)
    with pytest.raises(ValueError, match="power must be positive"):
        AdaHessianPower(power=0.0)
