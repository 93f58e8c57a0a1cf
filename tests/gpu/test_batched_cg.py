"""batched_cg on a GPU, by each implementation that it has there, against float64 NumPy and the reference on the CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Implementation, Request
from curvax.kernels.batched_cg import BATCHED_CG, BatchedSolution, batched_cg
from curvax.solvers import Result
from tests.oracle.systems import exact, positive, relative_residual, vectors

pytestmark = pytest.mark.gpu

over_implementations = pytest.mark.parametrize("implementation", ["native", "pallas"])


def solve(implementation: Implementation, a: Any, b: Any, *, dtype: Any = jnp.float32, **options: Any) -> Any:
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, jnp.float32)
    variant = BATCHED_CG.variant(implementation)
    assert variant is not None
    reason = variant.cannot(Request.of(a, b))
    if reason is not None:
        pytest.skip(reason)
    found = jax.jit(lambda a, b: batched_cg(a, b, implementation=implementation, **options))(a, b)
    return jax.tree.map(np.asarray, found)


def on_the_cpu(a: Any, b: Any, **options: Any) -> BatchedSolution:
    with jax.default_device(jax.devices("cpu")[0]):
        found = batched_cg(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), **options)
    return jax.tree.map(np.asarray, found)


@over_implementations
@pytest.mark.parametrize("n", [1, 8, 33, 64, 65, 100, 128, 190, 232, 256])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_solutions(n: int, dtype: Any, implementation: Implementation) -> None:
    a, b = np.asarray(jnp.asarray(positive((300,), n, 10.0), dtype), np.float64), vectors(300, n)
    found = solve(implementation, a, b, dtype=dtype)
    assert np.all(found.result == Result.CONVERGED)
    np.testing.assert_allclose(found.residual, relative_residual(a, b, found.value), atol=1e-6)
    np.testing.assert_allclose(found.value, exact(a, b), rtol=0, atol=1e-3 * np.linalg.norm(b, axis=-1).max())


@over_implementations
@pytest.mark.parametrize("n", [20, 72])
def test_start_preconditioner_and_limits_of_their_own(n: int, implementation: Implementation) -> None:
    scale = np.geomspace(1, 30, n)
    a, b = positive((40,), n, 8.0) * scale[:, None] * scale, vectors(40, n)
    options = {
        "x0": jnp.asarray(0.5 * exact(a, b), jnp.float32),
        "diagonal": jnp.asarray(np.einsum("bii->bi", a), jnp.float32),
        "rtol": jnp.asarray(np.geomspace(1e-1, 1e-5, 40), jnp.float32),
        "maxiter": jnp.arange(40, dtype=jnp.int32),
    }
    found, want = solve(implementation, a, b, **options), on_the_cpu(a, b, **options)
    assert np.all(abs(found.iterations - want.iterations) <= 1)
    same = found.iterations == want.iterations
    assert np.mean(same) > 0.8
    np.testing.assert_array_equal(found.result[same], want.result[same])
    np.testing.assert_allclose(found.value[same], want.value[same], rtol=1e-3, atol=1e-3)


@over_implementations
def test_outcomes_do_not_meet(implementation: Implementation) -> None:
    """Systems of every kind in one batch, each with the outcome that it has on the CPU."""
    n = 40
    good = positive((), n, 50.0)
    a, b = np.stack([good] * 8), vectors(8, n)
    a[1], a[2], a[3] = -good, good - 0.5 * np.eye(n), 0
    a[4, 3, 5] = a[4, 5, 3] = np.nan
    b[5], b[6, 0] = 0, np.inf
    found, want = solve(implementation, a, b, rtol=1e-4), on_the_cpu(a, b, rtol=1e-4)
    np.testing.assert_array_equal(found.result, want.result)
    assert np.all(abs(found.iterations - want.iterations) <= 1)
    plain = [0, 1, 3, 4, 5, 7]
    np.testing.assert_allclose(found.value[plain], want.value[plain], rtol=1e-2, atol=1e-2)


@over_implementations
def test_one_matrix_for_many_right_hand_sides(implementation: Implementation) -> None:
    a, b = positive((1, 3), 24, 10.0), vectors(50, 3, 24)
    found = solve(implementation, a, b)
    np.testing.assert_allclose(found.value, exact(a, b), rtol=0, atol=1e-2)
