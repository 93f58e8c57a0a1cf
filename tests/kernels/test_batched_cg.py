"""One table of cases over every implementation of batched_cg, against float64 NumPy.

The Mosaic kernel runs in Pallas' interpreter on the CPU, with race detection, where this JAX has one.
"""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

from curvax.kernels import Choice, Implementation, Request, Unsupported, _mosaic
from curvax.kernels.batched_cg import BATCHED_CG, BatchedSolution, batched_cg, native, on_chip, pallas
from curvax.solvers import CG, Result, System
from tests.oracle.compiling import array, quick_jit
from tests.oracle.mosaic import interpret
from tests.oracle.systems import (
    IMPLEMENTATIONS,
    SIZES,
    eps,
    exact,
    positive,
    relative_residual,
    skip_unless_supported,
    textbook,
    vectors,
)

over_implementations = pytest.mark.parametrize("implementation", (*IMPLEMENTATIONS, "pallas"))


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Mosaic kernel runs in the interpreter."""
    if _mosaic.absent() is None:
        monkeypatch.setattr(pallas, "solve", partial(pallas.solve, interpret=interpret()))


def supported(implementation: Implementation, *operands: jax.Array) -> Implementation | Choice:
    """What to ask `batched_cg` for, on these matrices and vectors; skips the test where that cannot run."""
    if implementation != "pallas":
        skip_unless_supported(implementation, BATCHED_CG, *operands)
        return implementation
    dtypes = tuple(sorted({v.dtype for v in operands}, key=str))
    reason = pallas.cannot(Request("gpu", 1, dtypes, (operands[0].shape,), (9, 0)))
    if reason is not None:
        pytest.skip(reason)
    return Choice("batched_cg", "pallas", "in the interpreter")


def called(
    a: jax.Array, b: jax.Array, options: dict[str, Any], implementation: Implementation | Choice
) -> BatchedSolution:
    return batched_cg(a, b, implementation=implementation, **options)


QUICK, OPTIMISED = (jit(called, static_argnames=("implementation",)) for jit in (quick_jit, jax.jit))


def solve(
    implementation: Implementation, a: Any, b: Any, *, dtype: Any = jnp.float32, compiled: Any = QUICK, **options: Any
) -> BatchedSolution:
    options = {k: array(v, dtype) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    a, b = array(a, dtype), array(b, dtype)
    found = compiled(a, b, options, supported(implementation, a, b))
    if implementation == "pallas":
        jax.block_until_ready(found)
        assert not _mosaic.races_found()
    batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-1])
    assert found.value.shape == (*batch, b.shape[-1])
    assert found.value.dtype == found.residual.dtype == dtype
    assert found.result.shape == found.iterations.shape == found.residual.shape == batch
    assert found.result.dtype == found.iterations.dtype == jnp.int32
    return found


@over_implementations
@pytest.mark.parametrize(("n", "batch"), [*((n, 5) for n in SIZES), (33, 0), (33, 1), (200, 2)])
def test_solutions(n: int, batch: int, implementation: Implementation, dtype: Any) -> None:
    a, b = positive((batch,), n), vectors(batch, n)
    tol = 1e-5 if dtype == jnp.float32 else 1e-11
    found = solve(implementation, a, b, dtype=dtype, tol=tol)
    assert np.all(found.result == Result.CONVERGED)
    assert np.all(found.iterations >= 1)
    assert np.all(np.asarray(found.residual) <= 2 * tol)
    # What rounding adds to the recurrence, in products of norm 1 and solutions of norm at most the condition, 100.
    attainable = tol + 100 * 8 * eps(dtype)
    assert np.all(np.asarray(found.residual) <= attainable)
    a, b = np.asarray(jnp.asarray(a, dtype), np.float64), np.asarray(jnp.asarray(b, dtype), np.float64)
    np.testing.assert_allclose(found.residual, relative_residual(a, b, found.value), rtol=0, atol=100 * 8 * eps(dtype))
    error = np.linalg.norm(np.asarray(found.value, np.float64) - exact(a, b), axis=-1)
    assert np.all(error <= 100 * 2 * attainable * np.linalg.norm(b, axis=-1))


@over_implementations
class TestTextbook:
    """float64, where rounding has no say in when a well-conditioned iteration ends."""

    @pytest.mark.parametrize("n", [1, 3, 33])
    @pytest.mark.parametrize("preconditioned", [False, True])
    @pytest.mark.parametrize("warm", [False, True])
    def test_iterations(
        self, n: int, preconditioned: bool, warm: bool, implementation: Implementation, x64: None
    ) -> None:
        a, b = positive((6,), n, 8.0), vectors(6, n)
        scale = np.geomspace(1, 1.5, n)
        a = a * scale[:, None] * scale
        options: dict[str, Any] = {"diagonal": np.einsum("bii->bi", a)} if preconditioned else {}
        if warm:
            options["x0"] = exact(a, b) * (1 + 0.1 * vectors(6, n, seed=2))
        for tol in (1e-2, 1e-6):
            found = solve(implementation, a, b, dtype=jnp.float64, tol=tol, **options)
            for k in range(6):
                start = options["x0"][k] if warm else None
                m = options["diagonal"][k] if preconditioned else None
                expected = textbook(a[k], b[k], tol, 10 * n, start, m)
                assert found.iterations[k] == expected.iterations
                np.testing.assert_allclose(found.value[k], expected.value, rtol=1e-8, atol=1e-10)

    @pytest.mark.parametrize("helped", [False, True])
    def test_iterates(self, helped: bool, implementation: Implementation, dtype: Any) -> None:
        """After k iterations each system is where the textbook is, and says that the limit came first."""
        a, b = positive((4,), 20, 1e4), vectors(4, 20)
        options: dict[str, Any] = {}
        if helped:
            options = {"x0": exact(a, b + 0.2 * vectors(4, 20, seed=2)), "diagonal": np.einsum("bii->bi", a)}
        for k in (0, 1, 2, 5):
            found = solve(implementation, a, b, dtype=dtype, tol=1e-12, maxiter=k, **options)
            assert np.all(found.result == Result.MAX_ITERATIONS)
            assert np.all(found.iterations == k)
            given = [(options["x0"][i], options["diagonal"][i]) if helped else () for i in range(4)]
            want = np.stack([textbook(a[i], b[i], 1e-12, k, *given[i]).value for i in range(4)])
            size = np.linalg.norm(want, axis=-1, keepdims=True)
            assert np.all(abs(found.value - want) <= 1e3 * eps(dtype) * size)
            np.testing.assert_allclose(found.residual, relative_residual(a, b, want), rtol=1e5 * eps(dtype))

    def test_same_course_as_the_solver(self, implementation: Implementation, x64: None) -> None:
        a, b = positive((), 40, 30.0), vectors(40)
        solver = CG(tol=1e-6, maxiter=400, warm_start=False, stabilize_every=0)
        matrix = jnp.asarray(a)
        one = solver.solve(System(lambda v: matrix @ v), jnp.asarray(b), (), jnp.zeros(()))
        found = solve(implementation, a, b, dtype=jnp.float64, tol=1e-6)
        assert found.iterations == one.iterations
        assert found.result == one.result
        np.testing.assert_allclose(found.value, one.value, rtol=1e-5, atol=1e-6)


def mixed(n: int) -> tuple[np.ndarray, np.ndarray, list[Result], np.ndarray]:
    """Systems of every kind in one batch: matrices, right-hand sides, outcomes, and which are plain."""
    good = positive((), n, 50.0, seed=3)
    b = vectors(10, n, seed=4)
    a = np.stack([good] * 10)
    kinds = [Result.CONVERGED] * 10
    a[1] = -good
    kinds[1] = Result.NEGATIVE_CURVATURE
    a[2] = good - 0.5 * np.eye(n)
    kinds[2] = Result.NEGATIVE_CURVATURE
    a[3] = 0
    kinds[3] = Result.BREAKDOWN
    b[4] = 0
    a[5, n // 2, n // 3] = a[5, n // 3, n // 2] = np.nan
    kinds[5] = Result.NON_FINITE
    b[6, n - 1] = np.inf
    kinds[6] = Result.NON_FINITE
    b[7, 0] = np.nan
    kinds[7] = Result.NON_FINITE
    a[8] = np.eye(n)
    return a, b, kinds, np.asarray([0, 8, 9])


@over_implementations
class TestOutcomes:
    @pytest.mark.fast
    @pytest.mark.parametrize("n", [4, 31, 100])
    def test_mixed_batch(self, n: int, implementation: Implementation, dtype: Any) -> None:
        a, b, kinds, plain = mixed(n)
        found = solve(implementation, a, b, dtype=dtype, tol=1e-4)
        assert [Result(int(r)) for r in found.result] == kinds
        np.testing.assert_allclose(found.value[plain], exact(a[plain], b[plain]), rtol=0, atol=0.05)
        assert np.all(np.asarray(found.residual)[plain] < 2e-4)
        assert found.iterations[8] == 1
        # Along a first direction of negative curvature: |b| / |A b| times b.
        curvature = np.linalg.norm(a[1] @ b[1]) / np.linalg.norm(b[1])
        np.testing.assert_allclose(found.value[1], b[1] / curvature, rtol=1e-4)
        assert found.iterations[1] == 1
        # Later on: the iterate before, whose quadratic is below zero.
        x = np.asarray(found.value[2], np.float64)
        assert np.all(np.isfinite(x))
        assert x @ a[2] @ x / 2 - b[2] @ x < 0
        assert found.iterations[2] >= 1
        for zero in (3, 4):
            np.testing.assert_array_equal(found.value[zero], 0)
        assert (found.iterations[4], found.residual[4]) == (0, 0)
        np.testing.assert_array_equal(found.value[5], 0)
        assert np.all(np.isnan(found.value[6])) and np.all(np.isnan(found.value[7]))

    @pytest.mark.parametrize("n", [7, 31, 100])
    def test_a_system_in_a_batch_is_a_system_alone(self, n: int, implementation: Implementation) -> None:
        """What goes on beside it, for longer or with NaN, changes no bit of a system in a kernel, or only rounding."""
        a, b, _, _ = mixed(n)
        together = solve(implementation, a, b, tol=1e-4)
        for k in range(len(a)):
            alone = solve(implementation, a[k : k + 1], b[k : k + 1], tol=1e-4)
            for t, s in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
                if implementation in ("native", "pallas"):
                    np.testing.assert_array_equal(t[k], s[0])
                else:
                    np.testing.assert_allclose(t[k], s[0], rtol=1e-3, atol=1e-3)

    def test_done_is_done(self, implementation: Implementation, x64: None) -> None:
        """A system's solution does not move while others go on: it is the textbook's at its own tolerance."""
        a, b = positive((4,), 30, 20.0), vectors(4, 30)
        tol = np.asarray([1e-1, 1e-5, 1e-2, 1e-3])
        found = solve(implementation, a, b, dtype=jnp.float64, tol=tol)
        for k in range(4):
            want = textbook(a[k], b[k], tol[k], 300)
            assert found.iterations[k] == want.iterations
            np.testing.assert_allclose(found.value[k], want.value, rtol=1e-7, atol=1e-9)

    def test_iteration_limits_of_their_own(self, implementation: Implementation) -> None:
        a, b = positive((3,), 30, 300.0), vectors(3, 30)
        found = solve(implementation, a, b, maxiter=jnp.asarray([2, 300, 0]))
        assert found.iterations[0] == 2
        assert found.iterations[2] == 0
        assert list(np.asarray(found.result)) == [Result.MAX_ITERATIONS, Result.CONVERGED, Result.MAX_ITERATIONS]
        np.testing.assert_array_equal(found.value[2], 0)
        np.testing.assert_allclose(found.residual[2], 1, rtol=1e-6)

    @pytest.mark.parametrize("power", [-100, 100])
    @pytest.mark.parametrize("what", ["rhs", "matrix", "diagonal"])
    def test_scale(self, what: str, power: int, implementation: Implementation) -> None:
        """Powers of two, 1e30 or 1e-30, change the scale of the solution and nothing else, bit by bit."""
        a, b = positive((3,), 20), vectors(3, 20)
        diagonal = np.einsum("bii->bi", a)
        plain = solve(implementation, a, b, diagonal=diagonal)
        factor = 2.0**power
        scaled = {
            "rhs": lambda: solve(implementation, a, b * factor, diagonal=diagonal),
            "matrix": lambda: solve(implementation, a * factor, b, diagonal=diagonal),
            "diagonal": lambda: solve(implementation, a, b, diagonal=diagonal * factor),
        }[what]()
        back = {"rhs": 1 / factor, "matrix": factor, "diagonal": 1.0}[what]
        np.testing.assert_array_equal(scaled.value * np.float32(back), plain.value)
        np.testing.assert_array_equal(scaled.iterations, plain.iterations)
        np.testing.assert_array_equal(scaled.residual, plain.residual)

    @pytest.mark.parametrize("factor", [1e-30, 1e30])
    def test_scale_of_everything(self, factor: float, implementation: Implementation) -> None:
        a, b = positive((3,), 20), vectors(3, 20)
        # Counts of iterations depend on rounding: of the code that users run.
        plain = solve(implementation, a, b, compiled=OPTIMISED)
        scaled = solve(implementation, a * factor, b * factor, compiled=OPTIMISED)
        np.testing.assert_allclose(scaled.value, plain.value, rtol=0, atol=1e-2)
        assert np.all(abs(scaled.iterations - plain.iterations) <= 1)
        assert np.all(scaled.result == Result.CONVERGED)

    def test_a_limit_of_64_bits_does_not_wrap(self, implementation: Implementation, x64: None) -> None:
        a, b = 2 * jnp.eye(3, dtype=jnp.float32), jnp.ones(3, jnp.float32)
        limit = jnp.asarray(2**40)
        found = batched_cg(a, b, maxiter=limit, implementation=supported(implementation, a, b))
        np.testing.assert_allclose(found.value, 0.5)

    def test_singular_but_consistent(self, implementation: Implementation) -> None:
        """CG does not mind a null space that the right-hand side has no part in."""
        a = np.zeros((2, 6, 6))
        a[:, :3, :3] = positive((2,), 3)
        b = vectors(2, 6) * np.asarray([1, 1, 1, 0, 0, 0])
        found = solve(implementation, a, b)
        assert np.all(found.result == Result.CONVERGED)
        np.testing.assert_allclose(found.value[:, :3], exact(a[:, :3, :3], b[:, :3]), rtol=1e-2)
        np.testing.assert_array_equal(found.value[:, 3:], 0)

    def test_no_unknowns(self, implementation: Implementation) -> None:
        found = solve(implementation, np.zeros((3, 0, 0)), np.zeros((3, 0)))
        assert np.all(found.result == Result.CONVERGED)
        assert np.all(found.residual == 0)

    def test_what_a_dtype_cannot_attain_is_inaccurate(self, implementation: Implementation, x64: None) -> None:
        """The recurrence meets the tolerance, the solution in float32 does not, in float64 it does."""
        a, b = positive((2,), 40, 1e5), vectors(2, 40)
        found = solve(implementation, a, b, tol=1e-6, maxiter=5000)
        assert np.all(found.result == Result.INACCURATE)
        assert np.all(np.asarray(found.residual) > 2e-6)
        single = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(found.residual, relative_residual(*single, found.value), rtol=0.5)
        assert np.all(solve(implementation, a, b, dtype=jnp.float64, tol=1e-6, maxiter=5000).result == Result.CONVERGED)


@over_implementations
class TestStart:
    def test_the_solution_is_a_good_start(self, implementation: Implementation, x64: None) -> None:
        a, b = positive((3,), 20), vectors(3, 20)
        found = solve(implementation, a, b, dtype=jnp.float64, x0=exact(a, b), tol=1e-8)
        assert np.all(found.iterations == 0)
        assert np.all(found.result == Result.CONVERGED)
        np.testing.assert_allclose(found.value, exact(a, b), rtol=1e-12)

    @pytest.mark.parametrize("bad", ["uphill", "far", "nan", "inf"])
    def test_a_start_worse_than_none_is_dropped(self, bad: str, implementation: Implementation) -> None:
        a, b = positive((2,), 20), vectors(2, 20)
        start = {"uphill": -b, "far": 1e3 * b, "nan": b * np.nan, "inf": b * np.inf}[bad]
        start[1] = 0.9 * exact(a[1], b[1])
        cold, warm = solve(implementation, a, b), solve(implementation, a, b, x0=start)
        assert cold.iterations[0] == warm.iterations[0]
        np.testing.assert_allclose(cold.value[0], warm.value[0], rtol=1e-6)
        assert np.all(warm.result == Result.CONVERGED)
        np.testing.assert_allclose(warm.value, exact(a, b), rtol=0, atol=2e-2)

    def test_one_start_for_all(self, implementation: Implementation) -> None:
        a, b = positive((3,), 8), vectors(3, 8)
        found = solve(implementation, a, b, x0=np.zeros(8))
        np.testing.assert_array_equal(found.value, solve(implementation, a, b).value)


@over_implementations
class TestDiagonal:
    def test_it_helps(self, implementation: Implementation) -> None:
        scale = np.geomspace(1, 1e2, 40)
        a = positive((3,), 40, 4.0) * scale[:, None] * scale
        b = vectors(3, 40)
        plain = solve(implementation, a, b, maxiter=1000)
        helped = solve(implementation, a, b, maxiter=1000, diagonal=np.einsum("bii->bi", a))
        assert np.all(2 * helped.iterations < plain.iterations)
        assert np.all(helped.result == Result.CONVERGED)
        assert np.all(relative_residual(a, b, helped.value) < 1e-4)

    def test_entries_that_cannot_be_count_as_the_largest(self, implementation: Implementation, x64: None) -> None:
        a, b = positive((2,), 12), vectors(2, 12)
        diagonal = np.abs(vectors(2, 12, seed=7)) + 0.5
        mended = diagonal.copy()
        for k, bad in enumerate((0.0, -3.0, np.nan, np.inf)):
            diagonal[0, k], mended[0, k] = bad, 0
        mended[0, :4] = mended[0].max()
        diagonal[1] = -1
        found = solve(implementation, a, b, dtype=jnp.float64, diagonal=diagonal)
        want = solve(implementation, a, b, dtype=jnp.float64, diagonal=mended)
        np.testing.assert_array_equal(found.value[0], want.value[0])
        plain = solve(implementation, a, b, dtype=jnp.float64)
        np.testing.assert_allclose(found.value[1], plain.value[1], rtol=1e-6)
        assert np.all(found.result == Result.CONVERGED)


@over_implementations
class TestBatches:
    @pytest.mark.parametrize(
        ("matrices", "rhs"),
        [((), (4,)), ((4,), ()), ((2, 1), (2, 3)), ((1, 3), (2, 1)), ((2, 3), (3,)), ((1, 3, 1, 2), (2, 1, 4, 1))],
    )
    def test_leading_axes_broadcast(
        self, matrices: tuple[int, ...], rhs: tuple[int, ...], implementation: Implementation
    ) -> None:
        a, b = positive(matrices, 9), vectors(*rhs, 9)
        found = solve(implementation, a, b)
        np.testing.assert_allclose(found.value, exact(a, b), rtol=0, atol=1e-2)
        assert np.all(relative_residual(a, b, found.value) < 1e-4)

    def test_vmap(self, implementation: Implementation) -> None:
        a, b = array(positive((3, 2), 9, 10.0), jnp.float32), array(vectors(3, 2, 9), jnp.float32)
        chosen = supported(implementation, a, b)

        def one(a: jax.Array, b: jax.Array, tol: jax.Array) -> BatchedSolution:
            return batched_cg(a, b, diagonal=jnp.ones(9), tol=tol, implementation=chosen)

        jitted = jax.jit(one)
        tol = jnp.asarray([1e-3, 1e-5, 1e-6])
        cases: list[tuple[tuple[int | None, ...], tuple[Any, ...]]] = [
            ((0, 0, 0), (a, b, tol)),
            ((0, None, None), (a, b[0], tol[1])),
            ((None, 0, None), (a[0], b, tol[1])),
            ((None, None, 0), (a[0], b[0], tol)),
            ((1, 0, None), (jnp.swapaxes(a, 0, 1), b, tol[1])),
        ]
        for axes, operands in cases[-1:] if implementation == "pallas" else cases:
            got = jax.jit(jax.vmap(one, in_axes=axes))(*operands)
            for i in range(3):
                member = [o if x is None else jnp.take(o, i, axis=x) for o, x in zip(operands, axes, strict=True)]
                want = jitted(*member)
                assert np.all(abs(got.iterations[i] - want.iterations) <= 1)
                np.testing.assert_allclose(got.value[i], want.value, rtol=1e-4, atol=1e-4)
        twice = jax.jit(jax.vmap(jax.vmap(one, (None, 0, None)), (0, None, None)))(a[:, 0], b[0], tol[1])
        np.testing.assert_allclose(twice.value, exact(np.asarray(a)[:, None, 0], np.asarray(b)[0]), rtol=0, atol=1e-2)

    def test_shard_map(self, implementation: Implementation) -> None:
        a, b = array(positive((4,), 9, 10.0), jnp.float32), array(vectors(4, 9), jnp.float32)
        chosen = supported(implementation, a, b)
        mesh, along = Mesh(np.array(jax.devices()[:1]), ("x",)), PartitionSpec("x")

        def own(a: jax.Array, b: jax.Array) -> BatchedSolution:
            return batched_cg(a, b, x0=jnp.zeros(9), diagonal=jnp.ones(9), implementation=chosen)

        specs = ((PartitionSpec(), along), (along, along), (along, PartitionSpec()))
        for in_specs in specs[: 1 if implementation == "pallas" else 3]:
            sharded = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=in_specs, out_specs=along))
            got, want = sharded(a, b), jax.jit(own)(a, b)
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)

    def test_bfloat16_matrices_are_widened(self, implementation: Implementation) -> None:
        a, b = array(positive((3,), 20, 10.0), jnp.bfloat16), array(vectors(3, 20), jnp.float32)
        chosen = supported(implementation, a, b)
        found = batched_cg(a, b, implementation=chosen)
        assert found.value.dtype == jnp.float32
        np.testing.assert_allclose(found.value, exact(np.asarray(a, np.float64), np.asarray(b)), rtol=0, atol=1e-2)
        both = batched_cg(a, b.astype(jnp.bfloat16), implementation=chosen)
        assert both.value.dtype == jnp.float32

    def test_the_widest_dtype_wins(self, implementation: Implementation, x64: None) -> None:
        a, b = jnp.asarray(positive((2,), 8), jnp.float32), jnp.asarray(vectors(2, 8))
        found = batched_cg(a, b, tol=1e-10, implementation=supported(implementation, a, b))
        assert found.value.dtype == jnp.float64
        np.testing.assert_allclose(found.value, exact(np.asarray(a), np.asarray(b)), rtol=1e-6)


class TestProduct:
    def test_matrix_free(self) -> None:
        a, b = array(positive((3,), 12), jnp.float32), array(vectors(3, 12), jnp.float32)

        def product(v: jax.Array) -> jax.Array:
            return jnp.einsum("bij,bj->bi", a, v, precision="highest")

        found = batched_cg(product, b)
        dense = batched_cg(a, b, implementation="reference")
        np.testing.assert_array_equal(found.iterations, dense.iterations)
        np.testing.assert_allclose(found.value, exact(np.asarray(a), np.asarray(b)), rtol=0, atol=1e-2)
        with pytest.raises(Unsupported, match="batched_cg_product has no native implementation"):
            batched_cg(product, b, implementation="native")

    def test_larger_systems(self) -> None:
        n = 3000
        b = array(vectors(2, n), jnp.float32)
        weights = jnp.linspace(1, 5, n, dtype=jnp.float32)
        found = batched_cg(lambda v: weights * v, b, tol=1e-6)
        np.testing.assert_allclose(found.value, b / weights, rtol=1e-3, atol=1e-5)

    def test_the_product_keeps_the_shape(self) -> None:
        with pytest.raises(TypeError, match=r"product of \(2, 3\) has shape \(2,\): it must be the same"):
            batched_cg(lambda v: v[:, 0], jnp.ones((2, 3)))


@pytest.mark.parametrize("n", [7, 16, 64, 130])
def test_native_does_not_depend_on_threads(n: int) -> None:
    skip_unless_supported("native")
    a, b = array(positive((37,), n), jnp.float32), array(vectors(37, n), jnp.float32)
    tol, maxiter = jnp.full((1,), 1e-5), jnp.full((1,), 100)
    want = native.solve(a, b, None, tol, maxiter, None, (37,), threads=1)
    for threads in (0, 2, 3, 8):
        got = native.solve(a, b, None, tol, maxiter, None, (37,), threads=threads)
        jax.tree.map(np.testing.assert_array_equal, got, want)


def test_cross_lowering_takes_the_reference() -> None:
    skip_unless_supported("native")
    traced = jax.jit(partial(batched_cg, implementation="native")).trace(jnp.ones((2, 3, 3)), jnp.ones((2, 3)))
    assert "curvax_batched_cg" in traced.lower(lowering_platforms=("cpu",)).as_text()
    assert "curvax_batched_cg" not in traced.lower(lowering_platforms=("tpu",)).as_text()


def test_native_refuses_several_devices_and_other_dtypes() -> None:
    variant = BATCHED_CG.variant("native")
    assert variant is not None
    f32, f16 = np.dtype(np.float32), np.dtype(np.float16)
    assert "not partitioned" in (variant.cannot(Request("cpu", 2, (f32,), ((2, 3, 3),))) or "")
    assert "take float32, float64" in (variant.cannot(Request("cpu", 1, (f16,), ((2, 3, 3),))) or "")


def test_lists_and_numpy_arrays_are_arrays() -> None:
    matrices, rhs = np.diag([2.0, 4.0]), np.ones(2)
    conversions: tuple[Any, ...] = (np.asarray, np.ndarray.tolist)
    for of in conversions:
        found = batched_cg(of(matrices), of(rhs), x0=of(0 * rhs), diagonal=of(rhs), tol=1e-6)
        np.testing.assert_allclose(found.value, [0.5, 0.25], rtol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    a, b = jnp.ones((2, 3, 3)), jnp.ones((2, 3))
    with pytest.raises(TypeError, match=r"matrices must be \(\.\.\., n, n\) and rhs \(\.\.\., n\), got \(2, 3, 3\)"):
        batched_cg(a, jnp.ones((2, 4)))
    with pytest.raises(TypeError, match=r"leading axes do not broadcast: .*\(5,\) of rhs"):
        batched_cg(a, jnp.ones((5, 3)))
    with pytest.raises(TypeError, match=r"end in one axis of the systems' size, got \(2, 3\) of rhs, \(4,\) of x0"):
        batched_cg(a, b, jnp.ones(4))
    with pytest.raises(TypeError, match="rhs has dtype int32: convert it to a floating dtype"):
        batched_cg(a, b.astype(jnp.int32))
    with pytest.raises(TypeError, match="rhs has dtype complex64"):
        batched_cg(a, b.astype(jnp.complex64))


class TestMosaic:
    def cannot(self, **changes: Any) -> str | None:
        plain = Request("gpu", 1, (np.dtype(np.float32),), ((64, 20, 20),), (9, 0))
        return pallas.cannot(dataclasses.replace(plain, **changes))

    def test_runs_on_hopper_where_jax_can(self) -> None:
        assert self.cannot() == _mosaic.absent()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"platform": "cpu"}, "run on NVIDIA GPUs, and this is cpu"),
            ({"capability": (8, 9)}, "this GPU's is 8.9"),
            ({"devices": 2}, "there are 2 devices"),
            ({"dtypes": (np.dtype(np.float64),)}, "takes float32, or bfloat16 .* and this is float64"),
            ({"shapes": ((3, 233, 233),)}, "up to 232 unknowns, and these have 233"),
            ({"shapes": ((0, 3, 3),)}, "no elements"),
            ({"shapes": ((2**16, 200, 200),)}, "32-bit"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], reason: str) -> None:
        if _mosaic.absent() is not None and not changes.keys() & {"platform", "capability", "devices"}:
            pytest.skip(str(_mosaic.absent()))
        assert re.search(reason, self.cannot(**changes) or "")

    @pytest.mark.parametrize("name", ["pallas", "native"])
    def test_auto_takes_it_on_gpus_that_ran_it(self, name: Implementation) -> None:
        variant = BATCHED_CG.variant(name)
        assert variant is not None
        request = Request("gpu", 1, (np.dtype(np.float32),), ((64, 20, 20),), (9, 0))
        assert variant.better_not(request) is None
        other = dataclasses.replace(request, capability=(8, 0))
        assert "on Hopper GPUs alone" in (variant.better_not(other) or "")

    def test_users_are_not_given_the_interpreter(self) -> None:
        with pytest.raises(Unsupported, match=r"pallas cannot run batched_cg: .* this is cpu"):
            batched_cg(jnp.ones((2, 3, 3)), jnp.ones((2, 3)), implementation="pallas")

    def test_no_system_of_some_size(self) -> None:
        a, b = jnp.ones((3, 3)), jnp.ones((0, 3))
        found = batched_cg(a, b, implementation=supported("pallas", a, b))
        assert found.value.shape == (0, 3)
        assert found.result.shape == found.iterations.shape == found.residual.shape == (0,)

    def test_one_matrix_is_not_copied_for_its_right_hand_sides(self) -> None:
        a, b = array(positive((1, 2), 8), jnp.float32), array(vectors(5, 2, 8), jnp.float32)
        chosen = supported("pallas", a, b)
        jaxpr = jax.make_jaxpr(partial(batched_cg, implementation=chosen))(a, b)
        assert "f32[2,8,8]" in str(jaxpr)
        assert "f32[5,2,8,8]" not in str(jaxpr) and "f32[10,8,8]" not in str(jaxpr)

    @pytest.mark.parametrize("largest", [1e-37, 3e-19, 0.5, 1.0, 3.0, 1e38])
    def test_powers(self, largest: float) -> None:
        """Two powers of two that bring a product near the direction."""
        first, second = (float(x) for x in on_chip._powers(jnp.float32(largest), jnp.float32(0.7)))
        assert 0.25 <= largest * first * second <= 4 and np.log2(first) % 1 == np.log2(second) % 1 == 0

    @pytest.mark.parametrize("bad", [0.0, np.nan, np.inf])
    def test_no_power_for_what_has_no_size(self, bad: float) -> None:
        assert [float(x) for x in on_chip._powers(jnp.float32(bad), jnp.float32(0.7))] == [1, 1]
