"""One table of cases over every implementation of linear_softmax_hvp, against float64 NumPy.

The Mosaic kernel inside runs in Pallas' interpreter on the CPU, where this JAX has one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Choice, Unsupported, _mosaic
from curvax.kernels.linear_softmax_hvp import LINEAR_SOFTMAX_HVP, Cotangents, linear_softmax_hvp, pallas, reference
from curvax.kernels.linear_softmax_hvp.blocks import BYTES_PER_LOGIT, Head, LogitBlocks, Tangent
from tests.oracle.compiling import array, quick_jit
from tests.oracle.mosaic import interpret

HIGHEST = jax.lax.Precision.HIGHEST
Run = Callable[[Head, Tangent, jax.Array, LogitBlocks], Any]


def plain(at: Head, tangent: Tangent, weights: jax.Array, blocks: LogitBlocks) -> Any:
    return reference.linear_softmax_hvp(at, tangent, weights, blocks, HIGHEST)


def interpreted(at: Head, tangent: Tangent, weights: jax.Array, blocks: LogitBlocks) -> Any:
    return pallas.linear_softmax_hvp(at, tangent, weights, blocks, HIGHEST, interpret=interpret())


RUNS: dict[str, Run] = {"reference": plain, "pallas": interpreted}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Any:
    if request.param == "pallas":
        reason = _mosaic.absent()
        if reason is not None:
            pytest.skip(reason)
    return RUNS[request.param]


@dataclasses.dataclass(frozen=True)
class Case:
    rows: int
    features: int
    columns: int
    blocks: LogitBlocks
    bias: bool = True
    dtype: Any = jnp.float32


CASES = {
    "one_block": Case(6, 5, 300, LogitBlocks(6, 300)),
    "rows_divide": Case(8, 5, 300, LogitBlocks(4, 300)),
    "rows_do_not": Case(7, 5, 300, LogitBlocks(3, 300)),
    "row_by_row": Case(3, 4, 129, LogitBlocks(1, 129)),
    "one_row": Case(1, 3, 200, LogitBlocks(1, 200)),
    "one_feature": Case(4, 1, 200, LogitBlocks(3, 200)),
    "no_bias": Case(7, 5, 300, LogitBlocks(4, 300), bias=False),
    "columns_divide": Case(7, 5, 512, LogitBlocks(4, 128)),
    "columns_do_not": Case(7, 5, 300, LogitBlocks(7, 128)),
    "bfloat16": Case(7, 16, 300, LogitBlocks(4, 300), dtype=jnp.bfloat16),
    "bfloat16_columns": Case(7, 16, 300, LogitBlocks(4, 128), dtype=jnp.bfloat16),
    "float16": Case(7, 16, 300, LogitBlocks(4, 300), dtype=jnp.float16),
}


def operands(case: Case, seed: int = 0) -> tuple[Head, Tangent, jax.Array]:
    rng = np.random.default_rng(seed)

    def head() -> Head:
        shapes = ((case.rows, case.features), (case.features, case.columns), (case.columns,))
        hidden, matrix, bias = (array(rng.standard_normal(shape), case.dtype) for shape in shapes)
        return Head(hidden, matrix, bias if case.bias else None)

    return head(), Tangent(*head()), array(rng.uniform(0.1, 2, case.rows), jnp.float32)


def exact(at: Head, tangent: Tangent, weights: Any) -> Cotangents:
    """By explicit float64 matrices."""
    hidden, head, d_hidden, d_head, w = (
        np.asarray(x, np.float64) for x in (at.hidden, at.head, tangent.hidden, tangent.head, weights)
    )
    bias, d_bias = (0.0 if x is None else np.asarray(x, np.float64) for x in (at.bias, tangent.bias))
    z, v = hidden @ head + bias, d_hidden @ head + hidden @ d_head + d_bias
    e = np.exp(z - z.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    u = np.stack([w[i] * (np.diag(p[i]) - np.outer(p[i], p[i])) @ v[i] for i in range(len(w))])
    found: Any = (u @ head.T, hidden.T @ u, None if at.bias is None else u.sum(axis=0))
    return Cotangents(*found)


def close(got: Cotangents, want: Cotangents, dtype: Any) -> None:
    """To a few hundred roundings of the operands' dtype (cotangents pass through it), against the largest entry."""
    eps = float(jnp.finfo(dtype).eps)
    for name, g, x in zip(Cotangents._fields, got, want, strict=True):
        if x is None:
            assert g is None
            continue
        assert g is not None
        assert g.shape == x.shape
        error = np.max(np.abs(np.asarray(g, np.float64) - x))
        factor = 4 if jnp.finfo(dtype).bits < 32 else 100
        assert error <= factor * eps * np.max(np.abs(x)), f"{name}: {error / (eps * np.max(np.abs(x)))}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_values(case: Case, run: Run) -> None:
    at, tangent, weights = operands(case)
    got = quick_jit(lambda at, tangent, w: run(at, tangent, w, case.blocks))(at, tangent, weights)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(jnp.float32)}
    close(got, exact(at, tangent, weights), case.dtype)


@pytest.mark.parametrize("columns", [300, 128])
@pytest.mark.parametrize("moving", [("hidden",), ("head",), ("bias",), ("hidden", "head"), ("hidden", "bias")])
def test_what_has_no_tangent_is_held_fixed(moving: tuple[str, ...], columns: int, x64: None) -> None:
    """The block of the matrix: no part in the tangent, none among the cotangents, the same numbers elsewhere."""
    at, tangent, weights = operands(dataclasses.replace(CASES["rows_do_not"], dtype=jnp.float64))
    still = {name: jnp.zeros_like(value) for name, value in tangent._asdict().items() if name not in moving}
    want = exact(at, tangent._replace(**still), weights)
    got = plain(at, tangent._replace(**dict.fromkeys(still)), weights, LogitBlocks(3, columns))
    assert [name for name, value in got._asdict().items() if value is not None] == list(moving)
    close(got, want._replace(**dict.fromkeys(still)), jnp.float64)


def test_float64(x64: None) -> None:
    at, tangent, weights = operands(dataclasses.replace(CASES["rows_do_not"], dtype=jnp.float64))
    for blocks in (LogitBlocks(3, 300), LogitBlocks(3, 128)):
        got = plain(at, tangent, weights, blocks)
        assert got.head.dtype == jnp.float64
        close(got, exact(at, tangent, weights), jnp.float64)


@pytest.mark.parametrize("blocks", [LogitBlocks(3, 300), LogitBlocks(3, 128)])
class TestHardRows:
    case = CASES["rows_do_not"]

    def test_rows_without_weight_may_hold_anything(self, blocks: LogitBlocks, run: Run) -> None:
        at, tangent, weights = operands(self.case)
        dead = jnp.array([0, 5])
        want = exact(at, tangent, weights.at[dead].set(0))
        spoilt = at._replace(hidden=at.hidden.at[dead].set(jnp.array([[jnp.nan], [jnp.inf]])))
        got = run(spoilt, tangent, weights.at[dead].set(0), blocks)
        close(got, want, jnp.float32)
        assert np.all(np.asarray(got.hidden[dead]) == 0)

    def test_masked_classes(self, blocks: LogitBlocks, run: Run) -> None:
        at, tangent, weights = operands(self.case)
        assert at.bias is not None
        mask = np.arange(300) % 3 == 0
        got = run(at._replace(bias=jnp.where(mask, -jnp.inf, at.bias)), tangent, weights, blocks)
        low = at._replace(bias=jnp.where(mask, -1e4, at.bias))
        close(got, exact(low, tangent, weights), jnp.float32)
        assert np.all(np.asarray(got.head)[:, mask] == 0)

    def test_nan_is_seen(self, blocks: LogitBlocks, run: Run) -> None:
        at, tangent, weights = operands(self.case)
        got = run(at._replace(hidden=at.hidden.at[4, 0].set(jnp.nan)), tangent, weights, blocks)
        assert np.all(np.isnan(got.hidden[4]))
        assert np.all(np.isfinite(np.delete(np.asarray(got.hidden), 4, axis=0)))
        assert np.all(np.isnan(got.head))


def test_vmap(run: Run) -> None:
    case = CASES["rows_do_not"]
    at, _, weights = operands(case)
    tangents = [operands(case, seed)[1] for seed in (1, 2, 3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *tangents)
    got = jax.vmap(lambda t: run(at, t, weights, case.blocks))(stacked)
    for i, tangent in enumerate(tangents):
        close(jax.tree.map(lambda x, i=i: x[i], got), exact(at, tangent, weights), jnp.float32)


def test_shard_map(run: Run) -> None:
    case = CASES["rows_do_not"]
    at, tangent, weights = operands(case)
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    head: Any = (rows, whole, whole)

    def local(at: Any, tangent: Any, weights: jax.Array) -> Any:
        found = run(Head(*at), Tangent(*tangent), weights, case.blocks)
        return (found.hidden, *jax.lax.psum((found.head, found.bias), "rows"))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(head, head, rows), out_specs=head)
    found = jax.jit(sharded)(tuple(at), tuple(tangent), weights)
    close(Cotangents(*found), exact(at, tangent, weights), jnp.float32)


class TestApi:
    def test_leading_axes_and_default_weights(self) -> None:
        at, tangent, _ = operands(Case(6, 5, 300, LogitBlocks(6, 300)))
        assert tangent.hidden is not None
        got: Any = linear_softmax_hvp(
            at.hidden.reshape(2, 3, 5),
            at.head,
            tangent.hidden.reshape(2, 3, 5),
            tangent.head,
            bias=at.bias,
            d_bias=tangent.bias,
            weights=jnp.array([[1.0], [2.0]]),
            precision=HIGHEST,
        )
        want = exact(at, tangent, np.repeat([1.0, 2.0], 3))
        close(got._replace(hidden=got.hidden.reshape(6, 5)), want, jnp.float32)
        ones = linear_softmax_hvp(at.hidden, at.head, tangent.hidden, tangent.head, precision=HIGHEST)
        close(ones, exact(at._replace(bias=None), tangent._replace(bias=None), np.ones(6)), jnp.float32)

    def test_no_rows(self) -> None:
        got: Any = linear_softmax_hvp(jnp.ones((2, 0, 3)), jnp.ones((3, 9)), jnp.ones((2, 0, 3)), jnp.ones((3, 9)))
        assert got.hidden.shape == (2, 0, 3)
        assert np.all(np.asarray(got.head) == np.zeros((3, 9)))

    def test_no_features(self) -> None:
        """Logits of the bias alone: nothing flows to hidden and head."""
        none, bias = jnp.ones((4, 0)), jnp.arange(3.0)
        got: Any = linear_softmax_hvp(none, none[:0].reshape(0, 3), none, jnp.ones((0, 3)), bias=bias, d_bias=bias)
        assert got.hidden.shape == (4, 0) and got.head.shape == (0, 3)
        p = np.exp(np.arange(3)) / np.exp(np.arange(3)).sum()
        np.testing.assert_allclose(np.asarray(got.bias), 4 * p * (np.arange(3) - p @ np.arange(3)), rtol=1e-5)

    def test_lists_and_numpy_arrays_are_arrays(self) -> None:
        """Of 64 bits too, where JAX has 32."""
        h, w = np.asarray([[1.0, 2.0]]), np.asarray([[1.0, 0.0, 2.0], [0.0, 1.0, 0.0]])
        want = linear_softmax_hvp(*map(jnp.asarray, (h, w, h, w)))
        conversions: tuple[Any, ...] = (np.asarray, np.ndarray.tolist)
        for of in conversions:
            got: Any = linear_softmax_hvp(of(h), of(w), of(h), of(w), weights=of(np.ones(1)))
            jax.tree.map(np.testing.assert_array_equal, got, want)

    def test_users_are_not_given_the_interpreter(self) -> None:
        with pytest.raises(Unsupported, match=r"pallas cannot run linear_softmax_hvp: .* this is cpu"):
            linear_softmax_hvp(*(jnp.ones((200, 200)),) * 4, implementation="pallas")

    def test_another_platform_takes_the_reference(self) -> None:
        if _mosaic.absent() is not None:
            pytest.skip(str(_mosaic.absent()))
        at, tangent, weights = operands(Case(6, 5, 300, LogitBlocks(6, 300), bias=False))
        chosen = Choice(LINEAR_SOFTMAX_HVP.name, "pallas", "test")
        got: Any = linear_softmax_hvp(
            *(at.hidden, at.head, tangent.hidden, tangent.head),
            weights=weights,
            precision=HIGHEST,
            implementation=chosen,
        )
        close(got, exact(at, tangent, weights), jnp.float32)

    def test_errors(self) -> None:
        h, w = jnp.ones((4, 3)), jnp.ones((3, 9))
        with pytest.raises(ValueError, match=r"hidden has shape \(4, 3\) and head \(9, 3\): pass"):
            linear_softmax_hvp(h, w.T, h, w.T)
        with pytest.raises(TypeError, match=r"d_head is float32\(3, 8\) and head float32\(3, 9\): pass them alike"):
            linear_softmax_hvp(h, w, h, w[:, :8])
        with pytest.raises(TypeError, match="head is of dtype bfloat16 and hidden of float32: cast"):
            linear_softmax_hvp(h, w.astype(jnp.bfloat16), h, w.astype(jnp.bfloat16))
        with pytest.raises(ValueError, match="there is a d_bias and no bias: pass both or neither"):
            linear_softmax_hvp(h, w, h, w, d_bias=jnp.ones(9))
        with pytest.raises(ValueError, match="everything is held fixed: pass d_hidden, d_head or d_bias"):
            linear_softmax_hvp(h, w, None, None)
        with pytest.raises(ValueError, match=r"bias has shape \(8,\): pass \(9,\)"):
            linear_softmax_hvp(h, w, h, w, bias=jnp.ones(8))
        with pytest.raises(ValueError, match="max_bytes is 0"):
            linear_softmax_hvp(h, w, h, w, max_bytes=0)
        with pytest.raises(TypeError, match="hidden is of dtype int32"):
            linear_softmax_hvp(h.astype(jnp.int32), w, h, w)
        with pytest.raises(ValueError, match=r"the weights have shape \(3,\) with rows \(4,\): give one per row"):
            linear_softmax_hvp(h, w, h, w, weights=jnp.ones(3))


@pytest.mark.parametrize(("rows", "columns", "max_bytes"), [(7, 300, 1), (1000, 50_257, 2**26), (64, 1000, 2**30)])
def test_blocks_stay_within_the_bytes(rows: int, columns: int, max_bytes: int) -> None:
    blocks = LogitBlocks.of(rows, columns, max_bytes)
    least = min(rows, 16) * 128
    assert blocks.rows <= rows
    assert blocks.columns <= columns
    assert blocks.rows * blocks.columns * BYTES_PER_LOGIT <= max(max_bytes, least * BYTES_PER_LOGIT)
    count = -(-rows // blocks.rows)
    assert count * blocks.rows - rows < count


def test_the_array_of_all_logits_never_exists() -> None:
    rows, features, columns, max_bytes = 512, 8, 4096, 2**20
    like = Head(jnp.ones((rows, features)), jnp.ones((features, columns)), None)
    whole = rows * columns * 4

    def memory(f: Callable[..., Any]) -> int:
        found = jax.jit(f).lower(like, like).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    def blocked(at: Head, t: Head) -> Cotangents:
        return linear_softmax_hvp(at.hidden, at.head, t.hidden, t.head, max_bytes=max_bytes)

    def as_written(at: Head, t: Head) -> Cotangents:
        return linear_softmax_hvp(at.hidden, at.head, t.hidden, t.head, max_bytes=rows * columns * BYTES_PER_LOGIT)

    head = features * columns * 4
    assert memory(blocked) <= max_bytes + 2 * head
    assert memory(as_written) >= 2 * whole
