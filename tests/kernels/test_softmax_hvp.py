"""One table of cases over every implementation of softmax_hvp, against float64 NumPy.

The Mosaic kernels run in Pallas' interpreter on the CPU, with race detection, where this JAX has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Choice, Request, Unsupported, _mosaic
from curvax.kernels.softmax_hvp import OPS, SOFTMAX_HVP, pallas, softmax_hvp, tiling
from curvax.kernels.softmax_hvp.tiling import Tiling
from curvax.losses import SoftmaxCrossEntropy
from tests.oracle.compiling import array
from tests.oracle.mosaic import interpret

Run = Callable[..., jax.Array]


def reference(logits: jax.Array, tangents: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    return softmax_hvp(logits, tangents, weights, implementation="reference")


def interpreted(logits: jax.Array, tangents: jax.Array, weights: jax.Array | None = None) -> jax.Array:
    """The Mosaic kernels as `api` calls them, in the interpreter."""
    rows, columns = logits.shape[:-1], logits.shape[-1]
    weight = jnp.broadcast_to(jnp.ones(()) if weights is None else weights, rows).astype(jnp.float32)
    count = weight.size
    flat = tangents.reshape(-1, count, columns)
    found = pallas.softmax_hvp(logits.reshape(count, columns), flat, weight.reshape(count), interpret=interpret())
    return found.reshape(tangents.shape)


RUNS: dict[str, Run] = {"reference": reference, "pallas": interpreted}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Any:
    if request.param == "pallas":
        reason = _mosaic.absent()
        if reason is not None:
            pytest.skip(reason)
    return RUNS[request.param]


@dataclasses.dataclass(frozen=True)
class Case:
    rows: tuple[int, ...]
    columns: int
    tangents: int | None = None
    dtype: Any = jnp.float32
    tangent_dtype: Any = None
    reference_only: bool = False


CASES = {
    "one_column": Case((3,), 1, reference_only=True),
    "ten_columns": Case((7,), 10, reference_only=True),
    "least": Case((2,), 128),
    "a_thousand": Case((2, 2), 1000),
    "odd": Case((3,), 1001),
    "one_row_no_axis": Case((), 640),
    "two_blocks": Case((2,), 8192),
    "four_blocks_odd": Case((1,), 14_337 + 2),
    "eight_blocks": Case((1,), 50_257),
    "longer_than_a_cluster": Case((1,), 262_144),
    "bfloat16": Case((2,), 1000, dtype=jnp.bfloat16),
    "bfloat16_odd": Case((2,), 1003, dtype=jnp.bfloat16),
    "float16": Case((2,), 512, dtype=jnp.float16),
    "mixed": Case((2,), 1000, dtype=jnp.bfloat16, tangent_dtype=jnp.float32),
    "several_tangents": Case((2,), 600, tangents=3),
    "groups_of_tangents": Case((2,), 777, tangents=7),
    "tangents_in_a_cluster": Case((1,), 8192, tangents=2),
}


def operands(case: Case, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (*case.rows, case.columns)
    several = shape if case.tangents is None else (case.tangents, *shape)
    logits = array(3 * rng.standard_normal(shape), case.dtype)
    tangents = array(rng.standard_normal(several), case.tangent_dtype or case.dtype)
    return logits, tangents, array(rng.uniform(0.1, 2, case.rows), jnp.float32)


def exact(logits: Any, tangents: Any, weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """The product by its definition, and w p (|v| + p.|v|), the scale that rounding is relative to."""
    z, v, w = (np.asarray(x, np.float64) for x in (logits, tangents, weights))
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    p = e / e.sum(axis=-1, keepdims=True)
    mean, size = (p * v).sum(axis=-1, keepdims=True), (p * abs(v)).sum(axis=-1, keepdims=True)
    return w[..., None] * p * (v - mean), w[..., None] * p * (abs(v) + size)


def close(got: jax.Array, logits: Any, tangents: Any, weights: Any) -> None:
    """Rounding: of z - max (relative to the largest exponent that counts, 90), of the sums (by blocks) and the rest."""
    want, scale = exact(logits, tangents, weights)
    eps = float(jnp.finfo(got.dtype).eps)
    tiny = float(jnp.finfo(got.dtype).tiny) * np.max(np.abs(np.asarray(tangents, np.float64)), initial=1)
    assert got.shape == want.shape
    error = np.abs(np.asarray(got, np.float64) - want)
    assert np.all(error <= 100 * eps * scale + tiny), np.max(error / (eps * scale + tiny))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case: Case, run: Run) -> None:
    if case.reference_only and run is interpreted:
        pytest.skip("the kernels refuse such rows")
    logits, tangents, weights = operands(case)
    got = run(logits, tangents, weights)
    assert got.dtype == jnp.float32
    close(got, logits, tangents, weights)
    assert run is reference or not _mosaic.races_found()


def test_without_weights_and_with_a_scalar(run: Run) -> None:
    logits, tangents, _ = operands(CASES["odd"])
    close(run(logits, tangents), logits, tangents, np.ones(3))
    close(run(logits, tangents, jnp.float32(0.5)), logits, tangents, np.full(3, 0.5))


def test_float64_is_the_references(x64: None) -> None:
    case = Case((3,), 700, dtype=jnp.float64)
    logits, tangents, weights = operands(case)
    got = reference(logits, tangents, weights)
    assert got.dtype == jnp.float64
    close(got, logits, tangents, weights)


class TestHardRows:
    """All in one call, since none may touch another."""

    columns = 1001

    @pytest.fixture
    def rows(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1)
        plain = rng.standard_normal(self.columns).astype(np.float32)
        masked, almost = plain.copy(), np.full(self.columns, -np.inf, np.float32)
        masked[::3] = -np.inf
        almost[-1] = 2.0
        nan, inf = plain.copy(), plain.copy()
        nan[500], inf[1000] = np.nan, np.inf
        return {
            "plain": plain,
            "masked": masked,
            "one_class": almost,
            "no_class": np.full(self.columns, -np.inf, np.float32),
            "huge": (plain * 1e37).astype(np.float32),
            "large_offset": plain + np.float32(1e4),
            "equal": np.full(self.columns, -3e38, np.float32),
            "nan": nan,
            "inf": inf,
            "weightless_nan": nan,
            "weightless": plain,
        }

    @pytest.fixture
    def found(self, rows: dict[str, np.ndarray], run: Run) -> dict[str, np.ndarray]:
        logits = jnp.asarray(np.stack(list(rows.values())))
        got = run(logits, self.tangents(), jnp.asarray([not name.startswith("weightless") for name in rows]))
        return dict(zip(rows, np.asarray(got), strict=True))

    def tangents(self) -> jax.Array:
        return array(np.random.default_rng(2).standard_normal((11, self.columns)), jnp.float32)

    def test_rows(self, rows: dict[str, np.ndarray], found: dict[str, np.ndarray]) -> None:
        tangents = np.asarray(self.tangents())
        for i, (name, z) in enumerate(rows.items()):
            if name in ("nan", "inf"):
                assert np.all(np.isnan(found[name])), name
            elif name in ("no_class", "one_class", "weightless", "weightless_nan"):
                assert np.all(found[name] == 0), name
            else:
                close(jnp.asarray(found[name]), z, tangents[i], 1.0)
        assert np.all(found["masked"][::3] == 0)

    def test_a_tangent_that_is_not_finite_stays_in_its_row(self, run: Run) -> None:
        logits, tangents, weights = operands(CASES["odd"])
        got = run(logits, tangents.at[1, 7].set(jnp.nan), weights)
        assert np.all(np.isnan(got[1]))
        close(got[jnp.array([0, 2])], logits[::2], tangents[::2], weights[::2])


def test_symmetric_and_semidefinite(run: Run) -> None:
    """a.Hb = b.Ha, a.Ha >= 0 and H1 = 0, up to rounding."""
    logits, tangents, weights = operands(Case((2,), 900, tangents=2))
    product = run(logits, tangents, weights)
    ab, ba = (jnp.einsum("rk,rk->r", tangents[i], product[1 - i]) for i in (0, 1))
    np.testing.assert_allclose(ab, ba, rtol=1e-4, atol=1e-5)
    assert np.all(np.asarray(jnp.einsum("trk,trk->tr", tangents, product)) >= 0)
    ones = run(logits, jnp.ones_like(logits), weights)
    assert np.max(np.abs(np.asarray(ones))) <= 10 * float(jnp.finfo(jnp.float32).eps) * 2


class TestTransformations:
    @pytest.mark.parametrize("axes", [(None, 0, None), (0, 0, 0), (0, None, None), (None, None, 0), (None, 1, 0)])
    def test_vmap(self, axes: tuple[int | None, ...], run: Run) -> None:
        rng = np.random.default_rng(3)
        shapes = ((2, 300), (2, 300), (2,))
        arrays = []
        for shape, axis in zip(shapes, axes, strict=True):
            full = shape if axis is None else (*shape[:axis], 3, *shape[axis:])
            arrays.append(array(rng.uniform(0.1, 2, full), jnp.float32))
        got = jax.vmap(run, axes)(*arrays)
        for i in range(3):
            z, v, w = (x if axis is None else jnp.take(x, i, axis=axis) for x, axis in zip(arrays, axes, strict=True))
            close(got[i], z, v, w)

    def test_nested_vmap_of_several_tangents(self, run: Run) -> None:
        logits, _, weights = operands(Case((2,), 300))
        tangents = array(np.random.default_rng(4).standard_normal((2, 3, 2, 2, 300)), jnp.float32)
        got = jax.vmap(jax.vmap(lambda v: run(logits, v, weights)))(tangents)
        close(got.reshape(-1, 2, 300), logits, tangents.reshape(-1, 2, 300), weights)

    def test_jit_in_a_loop(self, run: Run) -> None:
        logits, tangents, weights = operands(Case((2,), 256))

        def body(_: Any, v: jax.Array) -> jax.Array:
            return run(logits, v, weights) + tangents

        got = jax.jit(lambda v: jax.lax.fori_loop(0, 3, body, v))(tangents)
        want = tangents
        for _ in range(3):
            want = body(0, want)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)

    def test_shard_map(self, run: Run) -> None:
        logits, tangents, weights = operands(Case((4,), 256))
        spec = jax.sharding.PartitionSpec("rows")
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
        sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec)
        got = jax.jit(sharded)(logits, tangents, weights)
        close(got, logits, tangents, weights)


def test_reference_differentiates_as_its_own_transpose() -> None:
    logits, tangents, weights = operands(Case((3,), 40))
    weights = weights.at[1].set(0.0)
    logits = logits.at[2].set(-jnp.inf)
    v, vjp = jax.vjp(lambda v: reference(logits, v, weights), tangents)
    np.testing.assert_allclose(vjp(tangents)[0], v, rtol=1e-5, atol=1e-6)
    gradient = jax.grad(lambda z: jnp.sum(reference(z, tangents, weights) ** 2))(logits)
    assert np.all(np.isfinite(gradient))
    assert np.all(np.asarray(gradient[1:]) == 0)


class TestTiling:
    @pytest.mark.parametrize("columns", [128, 129, 255, 1000, 2048, 14_337, 50_257, 131_072, 262_144, 10**6 + 1])
    @pytest.mark.parametrize("sizes", [(4, 4), (2, 2), (2, 4), (4, 4, 4, 4, 4)])
    def test_chunks_cover_each_column_once(self, columns: int, sizes: tuple[int, ...]) -> None:
        tiled = Tiling.of(columns, sizes)
        total = -(-columns // tiled.chunk)
        seen = np.zeros(columns, np.int32)
        for part in range(tiled.parts):
            begin = part * total // tiled.parts * tiled.chunk
            end = min((part + 1) * total // tiled.parts * tiled.chunk, columns)
            assert end - begin >= tiled.chunk, "a run reaches back into another block's"
            for j in range(tiled.chunks):
                start = min(begin + j * tiled.chunk, end - tiled.chunk)
                assert begin <= start <= end - tiled.chunk
                assert start % tiled.vector == 0
                seen[begin + j * tiled.chunk : start + tiled.chunk] += 1
        assert np.all(seen == 1)
        assert tiled.kept * tiled.chunk * sum(sizes) <= 222 * 2**10
        if tiled.copied:
            assert all(columns * size % 16 == 0 for size in sizes)

    def test_rows_are_read_once(self) -> None:
        assert Tiling.of(212_992, (4, 4)).reads == 1
        assert Tiling.of(442_368, (2, 2)).reads == 1
        assert Tiling.of(262_144, (4, 4)).reads == 1 + 3 / 16


class TestChoice:
    def request(self, **changes: Any) -> Request:
        plain = Request("gpu", 1, (np.dtype(np.float32),), ((64, 1000),), (9, 0))
        return dataclasses.replace(plain, **changes)

    def cannot(self, **changes: Any) -> str | None:
        variant = SOFTMAX_HVP.variant("pallas")
        assert variant is not None
        return variant.cannot(self.request(**changes))

    def test_runs_on_hopper_where_jax_can(self) -> None:
        assert self.cannot() == _mosaic.absent()

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"platform": "cpu"}, "run on NVIDIA GPUs, and this is cpu"),
            ({"capability": (8, 0)}, "9.0 .* or newer, and this GPU's is 8.0"),
            ({"capability": None}, "this GPU's is unknown"),
            ({"devices": 2}, "there are 2 devices"),
        ],
    )
    def test_refuses_other_machines(self, changes: dict[str, Any], reason: str) -> None:
        with pytest.raises(Unsupported, match=reason):
            raise Unsupported(self.cannot(**changes) or "")

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"dtypes": (np.dtype(np.float64),)}, "and these have float64"),
            ({"shapes": ((64, 100),)}, "at least 128 columns, and these have 100"),
            ({"shapes": ((0, 1000),)}, "no elements"),
            ({"shapes": ((2**20, 2**12),)}, "32-bit"),
        ],
    )
    def test_refuses_other_operands(self, changes: dict[str, Any], reason: str) -> None:
        if _mosaic.absent() is not None:
            pytest.skip(str(_mosaic.absent()))
        with pytest.raises(Unsupported, match=reason):
            raise Unsupported(self.cannot(**changes) or "")

    def test_auto_keeps_the_reference_where_it_is_as_fast(self) -> None:
        variant = SOFTMAX_HVP.variant("pallas")
        assert variant is not None
        assert "ran the reference as fast" in (variant.better_not(self.request()) or "")

    def test_weights_must_fit_the_rows(self) -> None:
        ones = jnp.ones((2, 5))
        for wrong in (jnp.ones(3), jnp.ones((1, 2))):
            with pytest.raises(ValueError, match="give one per row"):
                softmax_hvp(ones, ones, wrong)
        np.testing.assert_array_equal(softmax_hvp(ones, ones, jnp.ones(1)), softmax_hvp(ones, ones))

    def test_lists_are_arrays(self) -> None:
        np.testing.assert_array_equal(
            softmax_hvp([[1.0, 2.0]], [[3.0, 4.0]]),  # pyright: ignore[reportArgumentType]
            softmax_hvp(jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 4.0]])),
        )

    def test_users_are_not_given_the_interpreter(self) -> None:
        with pytest.raises(Unsupported, match=r"pallas cannot run softmax_hvp: .* this is cpu"):
            softmax_hvp(jnp.ones((2, 200)), jnp.ones((2, 200)), implementation="pallas")

    def test_another_platform_takes_the_reference(self) -> None:
        """A call traced for the kernels lowers for a CPU too: by the reference."""
        if _mosaic.absent() is not None:
            pytest.skip(str(_mosaic.absent()))
        logits, tangents, weights = operands(CASES["odd"])
        chosen = Choice("softmax_hvp", "pallas", "test")
        close(softmax_hvp(logits, tangents, weights, implementation=chosen), logits, tangents, weights)


class TestErrors:
    def test_shapes(self) -> None:
        with pytest.raises(ValueError, match=r"tangents have shape \(3, 5\) with logits of shape \(2, 5\): pass"):
            softmax_hvp(jnp.ones((2, 5)), jnp.ones((3, 5)))
        with pytest.raises(ValueError, match=r"logits have shape \(2, 0\): give them a last axis"):
            softmax_hvp(jnp.ones((2, 0)), jnp.ones((2, 0)))

    def test_dtypes(self) -> None:
        with pytest.raises(TypeError, match="tangents are of dtype int32: pass real"):
            softmax_hvp(jnp.ones((2, 5)), jnp.ones((2, 5), jnp.int32))

    def test_rows_too_short_for_the_kernels(self) -> None:
        with pytest.raises(ValueError, match="at least 128 columns"):
            Tiling.of(127, (4, 4))
        assert tiling.cannot(128) is None


class TestLoss:
    def test_the_loss_multiplies_by_the_op(self) -> None:
        loss = SoftmaxCrossEntropy(implementation="pallas")
        outputs = jnp.ones((2, 200))
        with pytest.raises(Unsupported, match="pallas cannot run softmax_hvp"):
            loss.hessian_product(outputs, jnp.zeros(2, jnp.int32), jnp.ones(2), outputs)

    def test_a_plan_chooses_unless_the_user_did(self) -> None:
        outputs = jax.ShapeDtypeStruct((4, 10), jnp.bfloat16)
        ((op, request),) = SoftmaxCrossEntropy().kernels(outputs)
        assert op in OPS
        assert request.shapes == ((4, 10),)
        assert {str(dtype) for dtype in request.dtypes} == {"bfloat16", "float32"}
        choice = Choice("softmax_hvp", "reference", "test")
        assert SoftmaxCrossEntropy(label_smoothing=0.1).with_kernels({choice.op: choice}) == SoftmaxCrossEntropy(
            label_smoothing=0.1, implementation=choice
        )
        assert SoftmaxCrossEntropy().with_kernels({}) == SoftmaxCrossEntropy()
        assert SoftmaxCrossEntropy(implementation="reference").kernels(outputs) == ()


def test_no_array_of_logits_beside_the_result() -> None:
    """The reference, compiled: at most one array of the logits' size lives beside operands and result."""
    logits, tangents, weights = operands(Case((64,), 4096))
    memory = jax.jit(reference).lower(logits, tangents, weights).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 1.1 * logits.nbytes
