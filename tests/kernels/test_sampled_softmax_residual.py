"""One table of cases over every implementation of sampled_softmax_residual, against float64 NumPy.

The Mosaic kernel runs in Pallas' interpreter on the CPU, with race detection, where this JAX has one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Choice, Unsupported, _mosaic
from curvax.kernels.sampled_softmax_residual import pallas, reference, sampled_softmax_residual
from tests.oracle.compiling import array
from tests.oracle.mosaic import interpret

Run = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def interpreted(logits: jax.Array, uniforms: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    return pallas.sampled_softmax_residual(logits, uniforms, weights, interpret=interpret())


RUNS: dict[str, Run] = {"reference": reference.sampled_softmax_residual, "pallas": interpreted}


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Any:
    if request.param == "pallas":
        reason = _mosaic.absent()
        if reason is not None:
            pytest.skip(reason)
    return RUNS[request.param]


def probabilities(logits: Any) -> np.ndarray:
    z = np.asarray(logits, np.float64)
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def check(got: tuple[Any, Any], logits: Any, uniforms: Any, weights: Any) -> None:
    """The label holds the drawn share between its bounds, to rounding; the residual is exactly that label's."""
    residual, label = np.asarray(got[0], np.float64), np.asarray(got[1])
    p, u, w = probabilities(logits), np.asarray(uniforms, np.float64), np.asarray(weights, np.float64)
    rows = np.arange(len(p))
    assert label.dtype == np.int32
    upper = np.cumsum(p, axis=-1)[rows, label]
    slack = 64 * float(jnp.finfo(got[0].dtype).eps)
    assert np.all(u <= upper + slack)
    assert np.all(u >= upper - p[rows, label] - slack)
    assert np.all(p[rows, label] > 0)
    p[rows, label] -= 1
    np.testing.assert_allclose(residual, w[:, None] * p, rtol=100 * slack, atol=slack)


def operands(rows: int, columns: int, dtype: Any, seed: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    uniforms = array(rng.uniform(size=rows), jnp.float32)
    logits = array(3 * rng.standard_normal((rows, columns)), dtype)
    return logits, uniforms, array(rng.uniform(0.1, 2, rows), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("rows", "columns"), [(5, 128), (4, 1001), (2, 4096), (2, 50_257)])
def test_values(rows: int, columns: int, dtype: Any, run: Run) -> None:
    logits, uniforms, weights = operands(rows, columns, dtype)
    got = run(logits, uniforms, weights)
    assert got[0].dtype == jnp.float32
    check(got, logits, uniforms, weights)
    assert run is RUNS["reference"] or not _mosaic.races_found()


@pytest.mark.parametrize("columns", [1, 2, 10])
def test_few_columns(columns: int) -> None:
    logits, uniforms, weights = operands(6, columns, jnp.float32)
    check(sampled_softmax_residual(logits, uniforms, weights), logits, uniforms, weights)


def test_float64(x64: None) -> None:
    logits, uniforms, weights = operands(6, 300, jnp.float64)
    got = sampled_softmax_residual(logits, uniforms, weights)
    assert got[0].dtype == jnp.float64
    check(got, logits, uniforms, weights)


@pytest.mark.parametrize("columns", [700, 8192])
def test_ends_of_the_distribution(columns: int, run: Run) -> None:
    """The least and the largest uniform number draw the first and the last class that the logits allow."""
    z = np.full((2, columns), -np.inf, np.float32)
    z[:, 100:600] = 0.0
    u = jnp.asarray([0.0, 1 - 2.0**-24], jnp.float32)
    residual, label = run(jnp.asarray(z), u, jnp.ones(2))
    assert label.tolist() == [100, 599]
    assert np.all(np.asarray(residual)[:, :100] == 0)
    assert np.all(np.asarray(residual)[:, 600:] == 0)


@pytest.mark.parametrize("columns", [701, 8192])
def test_hard_rows(columns: int, run: Run) -> None:
    rng = np.random.default_rng(1)
    plain = rng.standard_normal(columns).astype(np.float32)
    nan, inf, one = plain.copy(), plain.copy(), np.full(columns, -np.inf, np.float32)
    nan[300], inf[5], one[-1] = np.nan, np.inf, 3.0
    none = np.full(columns, -np.inf, np.float32)
    z = jnp.asarray(np.stack([plain, nan, inf, one, none, nan, plain * 1e37]))
    u = jnp.full(7, 0.5, jnp.float32)
    got = run(z, u, jnp.asarray([1.0, 1, 1, 1, 1, 0, 2]))
    check((got[0][:1], got[1][:1]), z[:1], u[:1], np.ones(1))
    residual, label = map(np.asarray, got)
    assert np.all(np.isnan(residual[1:3]))
    assert np.all(residual[3:6] == 0)
    assert label.tolist()[1:6] == [0, 0, columns - 1, 0, 0]
    assert label[6] == np.argmax(plain)
    assert np.all(residual[6] == 0)


def test_labels_follow_the_probabilities() -> None:
    """Equally spaced uniforms draw each class as often as its probability says, to one draw."""
    logits = jnp.asarray([0.0, 1.0, -jnp.inf, 2.0, -1.0], jnp.float32)
    draws = 10_000
    uniforms = (jnp.arange(draws, dtype=jnp.float32) + 0.5) / draws
    _, labels = sampled_softmax_residual(jnp.broadcast_to(logits, (draws, 5)), uniforms)
    counts = np.bincount(np.asarray(labels), minlength=5)
    np.testing.assert_allclose(counts, draws * probabilities(logits), atol=1.01)


def test_outer_products_average_to_the_hessian() -> None:
    logits = array(np.random.default_rng(2).standard_normal(4), jnp.float32)
    draws = 10_000
    uniforms = (jnp.arange(draws, dtype=jnp.float32) + 0.5) / draws
    residual, _ = sampled_softmax_residual(jnp.broadcast_to(logits, (draws, 4)), uniforms)
    p = probabilities(logits)
    np.testing.assert_allclose(residual.T @ residual / draws, np.diag(p) - np.outer(p, p), atol=1e-3)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, None), (None, 1, 0)])
def test_vmap(axes: tuple[int | None, ...], run: Run) -> None:
    rng = np.random.default_rng(3)
    arrays = []
    for shape, axis in zip(((2, 300), (2,), (2,)), axes, strict=True):
        full = shape if axis is None else (*shape[:axis], 3, *shape[axis:])
        arrays.append(array(rng.uniform(0.1, 0.9, full), jnp.float32))
    residual, label = jax.vmap(run, axes)(*arrays)
    for i in range(3):
        member = (x if axis is None else jnp.take(x, i, axis=axis) for x, axis in zip(arrays, axes, strict=True))
        check((residual[i], label[i]), *member)


def test_shard_map(run: Run) -> None:
    logits, uniforms, weights = operands(4, 256, jnp.float32)
    spec = jax.sharding.PartitionSpec("rows")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharded = jax.shard_map(run, mesh=mesh, in_specs=(spec, spec, spec), out_specs=(spec, spec))
    check(jax.jit(sharded)(logits, uniforms, weights), logits, uniforms, weights)


def test_api() -> None:
    logits, uniforms, _ = operands(6, 300, jnp.float32)
    residual, label = sampled_softmax_residual(
        logits.reshape(2, 3, 300), uniforms.reshape(2, 3), jnp.asarray([[1.0], [2.0]])
    )
    check((residual.reshape(6, 300), label.reshape(6)), logits, uniforms, np.repeat([1.0, 2.0], 3))
    with pytest.raises(ValueError, match=r"uniforms have shape \(5,\): pass one per row, \(6,\)"):
        sampled_softmax_residual(logits, uniforms[:5])
    with pytest.raises(TypeError, match="uniforms are of dtype int32"):
        sampled_softmax_residual(logits, uniforms.astype(jnp.int32))
    with pytest.raises(ValueError, match=r"the weights have shape \(5,\) with rows \(6,\): give one per row"):
        sampled_softmax_residual(logits, uniforms, jnp.ones(5))
    with pytest.raises(TypeError, match="the weights are of dtype complex64: pass real numbers"):
        sampled_softmax_residual(logits, uniforms, jnp.ones(6, jnp.complex64))
    conversions: tuple[Any, ...] = (np.asarray, np.ndarray.tolist)  # Also of 64 bits, where JAX has 32.
    for of in conversions:
        rows = np.asarray(logits, np.float64), np.asarray(uniforms, np.float64)
        check(sampled_softmax_residual(*map(of, rows)), logits, uniforms, np.ones(6))
    with pytest.raises(Unsupported, match=r"pallas cannot run sampled_softmax_residual: .* this is cpu"):
        sampled_softmax_residual(logits, uniforms, implementation="pallas")


def test_another_platform_takes_the_reference() -> None:
    if _mosaic.absent() is not None:
        pytest.skip(str(_mosaic.absent()))
    logits, uniforms, weights = operands(4, 300, jnp.float32)
    chosen = Choice("sampled_softmax_residual", "pallas", "test")
    check(sampled_softmax_residual(logits, uniforms, weights, implementation=chosen), logits, uniforms, weights)
