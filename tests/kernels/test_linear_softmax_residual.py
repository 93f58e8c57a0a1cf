"""linear_softmax_residual against float64 NumPy: losses, gradients, both inner problems, hard rows, memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.kernels import Unsupported
from curvax.kernels.linear_softmax_hvp.blocks import BYTES_PER_LOGIT
from curvax.kernels.linear_softmax_residual import Tangent, linear_softmax_loss, linear_softmax_residual
from curvax.losses import SoftmaxCrossEntropy
from tests.oracle.compiling import array, quick_jit

ROWS, FEATURES, COLUMNS = 37, 3, 300
# Three blocks of 13 rows, of which the last has two again; and each in three blocks of columns.
BYTES = {"rows_cut": 16 * COLUMNS * BYTES_PER_LOGIT, "columns_cut": 1}

STATIC = ("label_smoothing", "max_bytes", "precision")
_residual = quick_jit(linear_softmax_residual, static_argnames=(*STATIC, "quadratic"))
_loss = quick_jit(linear_softmax_loss, static_argnames=STATIC)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Data:
    """A head, a tangent, labels and weights; some weights are zero."""

    hidden: Any
    head: Any
    bias: Any
    tangent: Any
    labels: Any
    weights: Any

    @staticmethod
    def of(dtype: Any = jnp.float64, rows: int = ROWS, seed: int = 0) -> Data:
        rng = np.random.default_rng(seed)
        shapes = ((rows, FEATURES), (FEATURES, COLUMNS), (COLUMNS,))
        at = [array(rng.standard_normal(shape), dtype) for shape in shapes]
        moved = [array(rng.standard_normal(shape), dtype) for shape in shapes]
        weights = rng.uniform(0.1, 2, rows)
        weights[rows // 2] = 0.0
        labels = array(rng.integers(0, COLUMNS, rows), jnp.int32)
        hidden, head, bias = at
        return Data(hidden, head, bias, Tangent(*moved), labels, array(weights, jnp.float32))

    def call(self, **options: Any) -> Any:
        options = {"bias": self.bias, "weights": self.weights, "precision": "highest", **options}
        return _residual(self.hidden, self.head, self.labels, **options)

    def loss(self, **options: Any) -> jax.Array:
        options = {"bias": self.bias, "weights": self.weights, "precision": "highest", **options}
        return _loss(self.hidden, self.head, self.labels, **options)


def exact(data: Data, tangent: Any, quadratic: bool, smoothing: float) -> tuple[float, list[np.ndarray]]:
    """By whole float64 arrays of logits, probabilities and label rows."""
    hidden, head, bias, weights = (np.asarray(x, np.float64) for x in (data.hidden, data.head, data.bias, data.weights))
    z = hidden @ head + bias
    v = np.zeros_like(z)
    if tangent is not None:
        d_hidden, d_head, d_bias = (np.zeros(()) if x is None else np.asarray(x, np.float64) for x in tangent)
        v = (d_hidden @ head if np.ndim(d_hidden) else 0.0) + (hidden @ d_head if np.ndim(d_head) else 0.0) + d_bias
    if not quadratic:
        z, v = z + v, np.zeros_like(z)
    y = (1 - smoothing) * np.eye(COLUMNS)[np.asarray(data.labels)] + smoothing / COLUMNS
    log_p = z - z.max(axis=1, keepdims=True)
    log_p = log_p - np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    curved = np.stack([(np.diag(p[i]) - np.outer(p[i], p[i])) @ v[i] for i in range(len(p))])
    u = weights[:, None] * (p - y + curved)
    return float(-np.sum(weights * np.sum(y * log_p, axis=1))), [u @ head.T, hidden.T @ u, u.sum(axis=0)]


def close(got: Any, want: Any, tolerance: float) -> None:
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.max(np.abs(np.asarray(g, np.float64) - w)) <= tolerance * max(np.max(np.abs(w)), 1e-300)


@pytest.mark.parametrize("max_bytes", BYTES.values(), ids=BYTES)
class TestValues:
    @pytest.mark.parametrize(("quadratic", "smoothing"), [(True, 0.0), (False, 0.1)])
    def test_float64(self, max_bytes: int, quadratic: bool, smoothing: float, x64: None) -> None:
        data = Data.of()
        options: dict[str, Any] = {"label_smoothing": smoothing, "max_bytes": max_bytes}
        loss, still = data.loss(**options), data.call(**options)
        moved = data.call(tangent=data.tangent, quadratic=quadratic, **options)
        assert still[0].dtype == loss.dtype == moved[1].head.dtype == jnp.float64
        want = exact(data, None, False, smoothing)
        close(loss, want[0], 1e-13)
        close(still, want, 1e-13)
        close(moved, exact(data, data.tangent, quadratic, smoothing), 1e-13)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_narrow(self, max_bytes: int, dtype: Any) -> None:
        data = Data.of(dtype)
        moved = data.call(tangent=data.tangent, quadratic=True, max_bytes=max_bytes)
        assert {x.dtype for x in jax.tree.leaves(moved)} == {jnp.dtype(jnp.float32)}
        tolerance = 100 * float(jnp.finfo(dtype).eps) if dtype == jnp.float32 else 4 * float(jnp.finfo(dtype).eps)
        close(moved, exact(data, data.tangent, True, 0.0), tolerance)

    def test_what_has_no_tangent_is_held_fixed(self, max_bytes: int, x64: None) -> None:
        data = Data.of()
        for quadratic, moving in ((True, {"hidden"}), (False, {"head", "bias"})):
            part = Tangent(**{name: x for name, x in data.tangent._asdict().items() if name in moving})
            loss, got = data.call(tangent=part, quadratic=quadratic, max_bytes=max_bytes)
            assert {name for name, x in got._asdict().items() if x is not None} == moving
            value, want = exact(data, part, quadratic, 0.0)
            kept = [w for w, x in zip(want, got, strict=True) if x is not None]
            close((loss, got), (value, kept), 1e-13)

    def test_rows_without_weight_may_hold_anything(self, max_bytes: int, x64: None) -> None:
        data, dead = Data.of(), ROWS // 2
        hidden = data.hidden.at[dead].set(jnp.nan)
        moved = data.tangent._replace(hidden=data.tangent.hidden.at[dead].set(jnp.inf))
        spoilt = dataclasses.replace(data, hidden=hidden, labels=data.labels.at[dead].set(-100))
        for quadratic in (False, True):
            loss, got = spoilt.call(tangent=moved, quadratic=quadratic, max_bytes=max_bytes)
            close((loss, got), exact(data, data.tangent, quadratic, 0.0), 1e-13)
            assert np.all(np.asarray(got.hidden[dead]) == 0)
        close(spoilt.loss(max_bytes=max_bytes), exact(data, None, False, 0.0)[0], 1e-13)

    def test_a_label_that_is_no_column_is_seen(self, max_bytes: int) -> None:
        data = Data.of(jnp.float32)
        for label in (-1, COLUMNS):
            wrong = dataclasses.replace(data, labels=data.labels.at[1].set(label))
            loss, got = wrong.call(max_bytes=max_bytes)
            assert np.isnan(loss) and np.isnan(wrong.loss(max_bytes=max_bytes))
            assert np.all(np.isnan(got.hidden[1])) and np.all(np.isnan(got.head))
            assert np.all(np.isfinite(np.delete(np.asarray(got.hidden), 1, axis=0)))

    def test_masked_classes_are_those_of_the_loss(self, max_bytes: int, x64: None) -> None:
        data, smoothing = Data.of(), 0.1
        mask = (np.arange(COLUMNS) % 3 == 0) & ~np.isin(np.arange(COLUMNS), data.labels)
        masked = dataclasses.replace(data, bias=jnp.where(mask, -jnp.inf, data.bias))
        whole = SoftmaxCrossEntropy(label_smoothing=smoothing, reduction="sum")
        z, weights = masked.hidden @ masked.head + masked.bias, data.weights.astype(jnp.float64)
        loss, got = masked.call(max_bytes=max_bytes, label_smoothing=smoothing)
        np.testing.assert_allclose(loss, whole.value(z, data.labels, weights), rtol=1e-13)
        u = whole.gradient(z, data.labels, weights)
        close(got, [u @ data.head.T, data.hidden.T @ u, u.sum(axis=0)], 1e-12)
        assert np.all(np.asarray(got.head)[:, mask] == 0)


def test_a_row_far_from_zero_keeps_its_digits() -> None:
    data = Data.of(jnp.float32)
    far = dataclasses.replace(data, bias=data.bias + 1000)
    rounded = dataclasses.replace(data, bias=(far.bias - 1000))
    for max_bytes in BYTES.values():
        close(far.loss(max_bytes=max_bytes), exact(rounded, None, False, 0.0)[0], 3e-5)


def test_vmap_over_tangents_is_one_by_one(x64: None) -> None:
    data = Data.of()
    many = jax.tree.map(lambda *x: jnp.stack(x), *[Data.of(seed=s).tangent for s in range(3)])
    for max_bytes in BYTES.values():
        for quadratic in (False, True):

            def run(tangent: Tangent, quadratic: bool = quadratic, max_bytes: int = max_bytes) -> Any:
                options: dict[str, Any] = {"bias": data.bias, "weights": data.weights, "quadratic": quadratic}
                at = (data.hidden, data.head, data.labels)
                return linear_softmax_residual(*at, tangent=tangent, max_bytes=max_bytes, **options)

            # The quadratic model's loss is at the logits themselves: one for all tangents.
            loss, got = quick_jit(jax.vmap(run, out_axes=(None if quadratic else 0, 0)))(many)
            for i in range(3):
                one = data.call(
                    tangent=jax.tree.map(lambda x, i=i: x[i], many), quadratic=quadratic, max_bytes=max_bytes
                )
                mine = loss if quadratic else loss[i]
                close((mine, jax.tree.map(lambda x, i=i: x[i], got)), jax.tree.map(np.asarray, one), 1e-13)


def test_leading_axes_default_weights_and_no_rows() -> None:
    data = Data.of(jnp.float32, rows=6)
    flat = linear_softmax_residual(data.hidden, data.head, data.labels)
    shaped = linear_softmax_residual(
        data.hidden.reshape(2, 3, FEATURES), data.head, data.labels.reshape(2, 3), weights=jnp.ones((2, 1))
    )
    assert shaped[1].hidden is not None and shaped[1].hidden.shape == (2, 3, FEATURES) and shaped[1].bias is None
    close(jax.tree.map(jnp.ravel, shaped), jax.tree.map(lambda x: np.ravel(x), flat), 1e-6)
    loss, none = linear_softmax_residual(data.hidden[:0], data.head, data.labels[:0])
    assert float(loss) == 0 and none.head is not None and np.all(np.asarray(none.head) == 0)
    assert float(linear_softmax_loss(data.hidden[:0], data.head, data.labels[:0])) == 0


def test_shard_map() -> None:
    data = Data.of(jnp.float32)
    rows, whole = jax.sharding.PartitionSpec("rows"), jax.sharding.PartitionSpec()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))

    def local(hidden: Any, head: Any, labels: Any, weights: Any) -> Any:
        loss, u = linear_softmax_residual(hidden, head, labels, weights=weights, max_bytes=BYTES["columns_cut"])
        return jax.lax.psum((loss, u.head), "rows"), u.hidden

    specs = (rows, whole, rows, rows)
    sharded = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=((whole, whole), rows)))
    loss, want = data.call(bias=None)
    found = sharded(data.hidden, data.head, data.labels, data.weights)
    close(found, jax.tree.map(np.asarray, ((loss, want.head), want.hidden)), 1e-5)


def test_errors() -> None:
    data = Data.of(jnp.float32)
    with pytest.raises(TypeError, match="the labels are of dtype float32: pass integers"):
        linear_softmax_residual(data.hidden, data.head, data.weights)
    with pytest.raises(ValueError, match=r"the labels have shape \(36,\): pass one per row, \(37,\)"):
        linear_softmax_loss(data.hidden, data.head, data.labels[1:])
    with pytest.raises(ValueError, match="a quadratic model is one of a tangent"):
        data.call(quadratic=True)
    with pytest.raises(ValueError, match="the tangent holds everything fixed"):
        data.call(tangent=Tangent())
    with pytest.raises(TypeError, match=r"d_head is float32\(3, 299\) and head float32\(3, 300\): pass them alike"):
        data.call(tangent=data.tangent._replace(head=data.head[:, 1:]))
    with pytest.raises(ValueError, match="there is a d_bias and no bias"):
        data.call(bias=None, tangent=data.tangent)
    with pytest.raises(ValueError, match="max_bytes is 0"):
        data.loss(max_bytes=0)
    with pytest.raises(Unsupported, match="linear_softmax_residual has no pallas implementation"):
        linear_softmax_loss(data.hidden, data.head, data.labels, implementation="pallas")


def test_the_array_of_all_logits_never_exists() -> None:
    rows, features, columns, max_bytes = 512, 8, 4096, 2**20
    hidden, head = jnp.ones((rows, features)), jnp.ones((features, columns))
    labels = jnp.zeros(rows, jnp.int32)

    def memory(f: Callable[..., Any]) -> int:
        found = jax.jit(f).lower(hidden, head).compile().memory_analysis()
        assert found is not None
        return found.temp_size_in_bytes

    def gradient(h: jax.Array, w: jax.Array) -> Any:
        return linear_softmax_residual(h, w, labels, tangent=Tangent(h, w), quadratic=True, max_bytes=max_bytes)

    def loss(h: jax.Array, w: jax.Array) -> Any:
        return linear_softmax_loss(h, w, labels, max_bytes=max_bytes)

    def written(h: jax.Array, w: jax.Array) -> Any:
        return linear_softmax_residual(h, w, labels, max_bytes=2**30)

    assert memory(gradient) <= max_bytes + 2 * features * columns * 4
    assert memory(loss) <= max_bytes
    assert memory(written) >= rows * columns * 4
