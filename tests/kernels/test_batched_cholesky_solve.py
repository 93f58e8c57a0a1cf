"""One table of cases over every implementation of batched_cholesky_solve, against float64 NumPy."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from curvax.kernels import Implementation
from curvax.kernels.batched_cholesky_solve import (
    BATCHED_CHOLESKY_SOLVE,
    BatchedSolution,
    batched_cholesky_solve,
    native,
)
from curvax.solvers import Result
from tests.oracle.compiling import array, quick_jit
from tests.oracle.systems import (
    IMPLEMENTATIONS,
    SIZES,
    eps,
    exact,
    positive,
    relative_residual,
    skip_unless_supported,
    vectors,
)

# Systems and how many: of block columns on the CPU, with few systems all threads on each.
LARGE = ((7, 5), (255, 1), (257, 3), (257, 0), (1000, 1))

over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@partial(quick_jit, static_argnames=("implementation",))
def compiled(a: jax.Array, b: jax.Array, damping: Any, implementation: Implementation) -> BatchedSolution:
    return batched_cholesky_solve(a, b, damping=damping, implementation=implementation)


def solve(
    implementation: Implementation, a: Any, b: Any, *, dtype: Any = jnp.float32, damping: Any = None
) -> BatchedSolution:
    a, b = array(a, dtype), array(b, dtype)
    skip_unless_supported(implementation, BATCHED_CHOLESKY_SOLVE, a, b)
    found = compiled(a, b, damping, implementation)
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-1], np.shape(damping))
    assert found.value.shape == (*batch, b.shape[-1])
    assert found.value.dtype == found.residual.dtype == dtype
    assert found.result.shape == found.iterations.shape == found.residual.shape == batch
    assert found.result.dtype == found.iterations.dtype == jnp.int32
    assert np.all(found.iterations == 0)
    return found


@over_implementations
@pytest.mark.parametrize(("n", "batch"), [*((n, 5) for n in SIZES), (33, 0), (33, 1), *LARGE])
def test_solutions(n: int, batch: int, implementation: Implementation, dtype: Any) -> None:
    a, b = positive((batch,), n), vectors(batch, n)
    found = solve(implementation, a, b, dtype=dtype)
    assert np.all(found.result == Result.CONVERGED)
    a, b = np.asarray(jnp.asarray(a, dtype), np.float64), np.asarray(jnp.asarray(b, dtype), np.float64)
    # Backward stable: a residual of some roundings of |A| |x|, and the solution is within the condition of that.
    x = np.linalg.norm(exact(a, b), axis=-1)
    allowed = (8 + np.sqrt(n)) * eps(dtype) * x
    assert np.all(np.asarray(found.residual) <= allowed / np.linalg.norm(b, axis=-1))
    true = relative_residual(a, b, found.value)
    most = float(np.max(allowed / np.linalg.norm(b, axis=-1), initial=0))
    np.testing.assert_allclose(found.residual, true, rtol=0, atol=most)
    error = np.linalg.norm(np.asarray(found.value, np.float64) - exact(a, b), axis=-1)
    assert np.all(error <= 100 * allowed)


@over_implementations
@pytest.mark.parametrize("n", [1, 5, 33, 100, 300])
def test_outcomes(n: int, implementation: Implementation, dtype: Any) -> None:
    """Systems of every kind in one batch; none touches another."""
    good = positive((), n, 50.0)
    a, b = np.stack([good] * 9), vectors(9, n)
    a[1] = -good
    a[2] = good - 0.9 * np.eye(n)
    a[3] = 0
    a[4, n // 2, n // 2] = np.nan
    a[5, n - 1, 0] = a[5, 0, n - 1] = np.inf
    b[6, 0] = np.nan
    b[7] = 0
    found = solve(implementation, a, b, dtype=dtype)
    kinds = [Result(int(r)) for r in found.result]
    none = Result.NOT_POSITIVE_DEFINITE
    bad = Result.NON_FINITE
    # With one unknown, 0.1 is what 0.9 leaves of 1.
    third = Result.CONVERGED if n == 1 else none
    assert kinds == [Result.CONVERGED, none, third, none, bad, bad, bad, Result.CONVERGED, Result.CONVERGED]
    np.testing.assert_allclose(found.value[8], exact(a[8], b[8]), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.value[7], 0)
    assert found.residual[7] == 0
    for k in (1, 3, 4, 5, 6):
        assert np.all(np.isnan(found.value[k]))
        assert np.isnan(found.residual[k])
    alone = solve(implementation, a[8:], b[8:], dtype=dtype)
    np.testing.assert_allclose(found.value[8], alone.value[0], rtol=1e-5 if dtype == jnp.float32 else 1e-12)


@pytest.mark.fast
@over_implementations
class TestMatrices:
    def test_singular_to_rounding(self, implementation: Implementation) -> None:
        half = vectors(2, 12, 11)
        found = solve(implementation, half @ half.transpose(0, 2, 1), vectors(2, 12))
        assert np.all(found.result == Result.NOT_POSITIVE_DEFINITE)

    def test_damping(self, implementation: Implementation) -> None:
        """It is added to the diagonal, system by system, and makes a singular matrix solvable."""
        half = vectors(3, 12, 11) / 4
        a, b = half @ half.transpose(0, 2, 1), vectors(3, 12)
        lam = np.asarray([0.1, 1.0, 0.0], np.float32)
        found = solve(implementation, a, b, damping=lam)
        assert found.result.tolist() == [Result.CONVERGED, Result.CONVERGED, Result.NOT_POSITIVE_DEFINITE]
        damped = a[:2] + lam[:2, None, None].astype(np.float64) * np.eye(12)
        np.testing.assert_allclose(found.value[:2], exact(damped, b[:2]), rtol=1e-3, atol=1e-3)
        several = solve(implementation, a[0], b[0], damping=lam[:2])
        want = exact(a[0] + lam[:2, None, None].astype(np.float64) * np.eye(12), b[0])
        np.testing.assert_allclose(several.value, want, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("power", [-80, 80])
    def test_scale(self, power: int, implementation: Implementation) -> None:
        """Powers of four keep every bit: the roots of pivots scale exactly."""
        a, b = positive((3,), 20), vectors(3, 20)
        factor = 4.0 ** (power // 2)
        plain, scaled = solve(implementation, a, b), solve(implementation, a * factor, b)
        np.testing.assert_array_equal(scaled.value * np.float32(factor), plain.value)
        scaled = solve(implementation, a, b * factor)
        np.testing.assert_array_equal(scaled.value / np.float32(factor), plain.value)

    def test_refinement_pays(self, implementation: Implementation) -> None:
        """On an ill-conditioned matrix the residual stays at rounding of |A| |x|."""
        a, b = positive((4,), 64, 1e5), vectors(4, 64)
        found = solve(implementation, a, b)
        size = np.linalg.norm(np.asarray(found.value), axis=-1) / np.linalg.norm(b, axis=-1)
        assert np.all(np.asarray(found.residual) <= 8 * eps(jnp.float32) * size)


@over_implementations
class TestBatches:
    @pytest.mark.parametrize(("matrices", "rhs"), [((), (4,)), ((4,), ()), ((2, 1), (2, 3)), ((1, 3), (2, 1))])
    def test_leading_axes_broadcast(
        self, matrices: tuple[int, ...], rhs: tuple[int, ...], implementation: Implementation
    ) -> None:
        a, b = positive(matrices, 9, 10.0), vectors(*rhs, 9)
        found = solve(implementation, a, b)
        np.testing.assert_allclose(found.value, exact(a, b), rtol=1e-4, atol=1e-4)

    def test_large_systems_that_share_a_matrix(self, implementation: Implementation, dtype: Any) -> None:
        """The right-hand sides of one matrix, and of the same with another damping."""
        a, b = positive((), 270, 10.0), vectors(2, 3, 270)
        lam = np.asarray([[0.0], [0.5]], dtype)
        found = solve(implementation, a, b, dtype=dtype, damping=lam)
        want = exact(a + lam[..., None, None].astype(np.float64) * np.eye(270), b)
        np.testing.assert_allclose(found.value, want, rtol=0, atol=float(200 * eps(dtype) * np.max(abs(want))))

    def test_vmap(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        a, b = array(positive((3, 2), 9, 10.0), jnp.float32), array(vectors(3, 2, 9), jnp.float32)
        one = partial(batched_cholesky_solve, implementation=implementation)
        jitted = jax.jit(one)
        cases: list[tuple[tuple[int | None, int | None], tuple[jax.Array, jax.Array]]] = [
            ((0, 0), (a, b)),
            ((0, None), (a, b[0])),
            ((None, 0), (a[0], b)),
        ]
        for axes, operands in cases:
            got = jax.jit(jax.vmap(one, in_axes=axes))(*operands)
            for i in range(3):
                member = [o if x is None else o[i] for o, x in zip(operands, axes, strict=True)]
                np.testing.assert_allclose(got.value[i], jitted(*member).value, rtol=1e-4, atol=1e-4)

    def test_shard_map(self, implementation: Implementation) -> None:
        skip_unless_supported(implementation)
        a, b = array(positive((4,), 9, 10.0), jnp.float32), array(vectors(4, 9), jnp.float32)
        mesh, along = Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec("x")
        own = partial(batched_cholesky_solve, implementation=implementation)
        sharded = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=(along, along), out_specs=along))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), sharded(a, b), jax.jit(own)(a, b))

    @pytest.mark.parametrize("n", [16, 261])
    def test_bfloat16_matrices_are_widened(self, n: int, implementation: Implementation) -> None:
        a, b = array(positive((3,), n, 10.0), jnp.bfloat16), array(vectors(3, n), jnp.float32)
        skip_unless_supported(implementation, BATCHED_CHOLESKY_SOLVE, a, b)
        found = batched_cholesky_solve(a, b, implementation=implementation)
        assert found.value.dtype == jnp.float32
        np.testing.assert_allclose(found.value, exact(np.asarray(a, np.float64), np.asarray(b)), rtol=1e-3, atol=1e-3)

    def test_no_unknowns(self, implementation: Implementation) -> None:
        found = solve(implementation, np.zeros((3, 0, 0)), np.zeros((3, 0)))
        assert np.all(found.result == Result.CONVERGED)


@pytest.mark.parametrize(("n", "count"), [(7, 37), (64, 37), (300, 1), (300, 5)])
def test_native_does_not_depend_on_threads(n: int, count: int) -> None:
    skip_unless_supported("native")
    a, b = array(positive((count,), n), jnp.float32), array(vectors(count, n), jnp.float32)
    want = native.solve(a, b, jnp.zeros((1,)), (count,), threads=1)
    for threads in (0, 2, 3, 8):
        got = native.solve(a, b, jnp.zeros((1,)), (count,), threads=threads)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_lists_and_numpy_arrays_are_arrays() -> None:
    matrices, rhs = np.diag([2.0, 4.0]), np.ones(2)
    conversions: tuple[Any, ...] = (np.asarray, np.ndarray.tolist)
    for of in conversions:
        np.testing.assert_allclose(batched_cholesky_solve(of(matrices), of(rhs)).value, [0.5, 0.25], rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(TypeError, match=r"batched_cholesky_solve: matrices must be \(\.\.\., n, n\)"):
        batched_cholesky_solve(jnp.ones((2, 3)), jnp.ones(3))
    with pytest.raises(TypeError, match="leading axes do not broadcast"):
        batched_cholesky_solve(jnp.ones((2, 3, 3)), jnp.ones((5, 3)))
    with pytest.raises(TypeError, match="matrices has dtype int32"):
        batched_cholesky_solve(jnp.ones((2, 3, 3), jnp.int32), jnp.ones(3))
