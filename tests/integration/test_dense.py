"""The dense direct solve, by either implementation of its factorization, against float64 NumPy."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Implementation
from curvax.solvers import Result
from curvax.solvers.dense import solve_dense
from tests.oracle.compiling import quick_jit
from tests.oracle.systems import IMPLEMENTATIONS, exact, positive, skip_unless_supported, vectors

over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
SOLVE = quick_jit(solve_dense, static_argnames="implementation")
LAM = 0.25


def solve(implementation: Implementation, c: Any, b: Any) -> tuple[np.ndarray, int, float]:
    skip_unless_supported(implementation)
    x, result, residual = SOLVE(jnp.asarray(c), jnp.asarray(b), jnp.asarray(LAM), implementation=implementation)
    assert x.shape == b.shape and x.dtype == jnp.asarray(b).dtype
    return np.asarray(x), int(result), float(residual)


def spectrum(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric matrix with these eigenvalues after damping, and its eigenvectors."""
    n = len(values)
    q, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((n, n)))
    return (q * (values - LAM)) @ q.T, q


@over_implementations
@pytest.mark.parametrize("n", [1, 6, 300])
class TestOutcomes:
    def test_positive_definite(self, n: int, implementation: Implementation, x64: None) -> None:
        c, b = positive((), n), vectors(n)
        x, result, residual = solve(implementation, c, b)
        assert result == Result.CONVERGED and residual < 1e-13
        np.testing.assert_allclose(x, exact(c + LAM * np.eye(n), b), rtol=0, atol=1e-12 * float(np.linalg.norm(b)))

    def test_several_right_hand_sides(self, n: int, implementation: Implementation, x64: None) -> None:
        c, b = positive((), n), vectors(n, 3)
        x, result, residual = solve(implementation, c, b)
        assert result == Result.CONVERGED and residual < 1e-13
        want = np.linalg.solve(c + LAM * np.eye(n), b)
        np.testing.assert_allclose(x, want, rtol=0, atol=1e-12 * float(np.linalg.norm(b)))

    def test_singular_adds_lam_to_magnitudes(self, n: int, implementation: Implementation, x64: None) -> None:
        values = np.linspace(1, 2, n) * (np.arange(n) > n // 3)
        c, q = spectrum(values)
        b = vectors(n)
        x, result, _ = solve(implementation, c, b)
        assert result == Result.SINGULAR
        np.testing.assert_allclose(x, q @ (q.T @ b / (abs(values - LAM) + LAM)), rtol=0, atol=1e-10)

    def test_indefinite_adds_lam_to_magnitudes(self, n: int, implementation: Implementation, x64: None) -> None:
        values = np.linspace(1, 2, n) * np.where(np.arange(n) == n // 2, -1, 1)
        c, q = spectrum(values)
        b = vectors(n)
        x, result, _ = solve(implementation, c, b)
        assert result == Result.INDEFINITE
        np.testing.assert_allclose(x, q @ (q.T @ b / (abs(values - LAM) + LAM)), rtol=0, atol=1e-10)

    @pytest.mark.parametrize("where", ["matrix", "rhs"])
    def test_not_finite(self, where: str, n: int, implementation: Implementation, x64: None) -> None:
        c, b = positive((), n), vectors(n)
        (c if where == "matrix" else b)[-1] = np.nan
        x, result, residual = solve(implementation, c, b)
        assert result == Result.NON_FINITE and np.all(np.isnan(x)) and np.isnan(residual)


@over_implementations
def test_zero_right_hand_side_and_scale(implementation: Implementation, x64: None) -> None:
    c, b = positive((), 200), vectors(200)
    x, result, residual = solve(implementation, c, np.zeros(200))
    assert result == Result.CONVERGED and residual == 0
    np.testing.assert_array_equal(x, 0)
    plain, tiny = solve(implementation, c, b)[0], solve(implementation, c, 2.0**-300 * b)[0]
    np.testing.assert_array_equal(tiny * 2.0**300, plain)
