"""Every loss against dense float64 derivatives of an independently written scalar loss."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.losses import CustomLoss, Loss, Poisson, SigmoidBinaryCrossEntropy, SoftmaxCrossEntropy, SquaredError
from tests.oracle.compiling import quick_jit


@pytest.fixture(autouse=True)
def _double(x64: None) -> Iterator[None]:
    yield


# The scalar loss of one position, in the textbook's form.


def cross_entropy(f, y):
    return jnp.sum(y) * jnp.log(jnp.sum(jnp.exp(f))) - jnp.sum(y * f)


def squared(f, y):
    return jnp.sum((f - y) ** 2) / 2


def logistic(f, y):
    return -jnp.sum(y * jnp.log(1 / (1 + jnp.exp(-f))) + (1 - y) * jnp.log(1 / (1 + jnp.exp(f))))


def counts(f, y):
    return jnp.sum(jnp.exp(f) - y * f)


def quartic(f, y):
    """Convex, with a dense Hessian and a pytree target."""
    return jnp.sum((f - y["at"]) ** 4) + y["pull"] * jnp.sum(f) ** 2


def draw(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
    positions, classes = shape[:-1] if len(shape) > 1 else shape, shape[len(shape) - 1]
    match kind:
        case "integer":
            return rng.integers(0, classes, positions, dtype=np.int32)
        case "one-hot":
            return np.eye(classes)[rng.integers(0, classes, positions)]
        case "soft":
            return rng.random(shape)
        case "real":
            return rng.standard_normal(shape)
        case "bit":
            return rng.integers(0, 2, shape).astype(bool)
        case "count":
            return rng.integers(0, 5, shape)
        case "tree":
            return {"at": rng.standard_normal(shape), "pull": rng.random(positions)}
    raise AssertionError(kind)


@dataclasses.dataclass(frozen=True)
class Case:
    loss: Loss
    row: Callable[[Any, Any], jax.Array]
    kind: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        smooth = "-smooth" if getattr(self.loss, "label_smoothing", 0.0) else ""
        return f"{type(self.loss).__name__}-{self.kind}-{'x'.join(map(str, self.shape))}{smooth}"

    @property
    def positions(self) -> tuple[int, ...]:
        return self.shape[:-1] if len(self.shape) > 1 else self.shape

    @property
    def elementwise(self) -> bool:
        return isinstance(self.loss, SquaredError | SigmoidBinaryCrossEntropy | Poisson)

    def outputs(self, dtype: Any = np.float64) -> np.ndarray:
        return np.random.default_rng(1).standard_normal(self.shape).astype(dtype)

    def targets(self) -> Any:
        return draw(self.kind, self.shape, np.random.default_rng(2))

    def label_rows(self) -> Any:
        """The targets as the textbook's form has them: dense, smoothed, float64."""
        y = self.targets()
        if not isinstance(self.loss, SoftmaxCrossEntropy):
            return y
        y = np.eye(self.shape[-1])[y] if self.kind == "integer" else y
        e = self.loss.label_smoothing
        return (1 - e) * y + e * y.sum(-1, keepdims=True) / self.shape[-1]


def smooth(kind: str, shape: tuple[int, ...]) -> Case:
    return Case(SoftmaxCrossEntropy(0.2), cross_entropy, kind, shape)


CASES = [
    Case(SoftmaxCrossEntropy(), cross_entropy, "integer", (5, 4)),
    Case(SoftmaxCrossEntropy(), cross_entropy, "integer", (2, 2, 2, 3)),
    Case(SoftmaxCrossEntropy(), cross_entropy, "one-hot", (2, 3, 4)),
    Case(SoftmaxCrossEntropy(), cross_entropy, "soft", (5, 4)),
    smooth("integer", (2, 3, 4)),
    smooth("soft", (5, 4)),
    Case(SquaredError(), squared, "real", (6,)),
    Case(SquaredError(), squared, "real", (2, 3, 2)),
    Case(SigmoidBinaryCrossEntropy(), logistic, "bit", (6,)),
    Case(SigmoidBinaryCrossEntropy(), logistic, "soft", (2, 2, 2, 2)),
    Case(Poisson(), counts, "count", (6,)),
    Case(Poisson(), counts, "count", (2, 3, 2)),
    Case(CustomLoss(quartic), quartic, "tree", (2, 3, 3)),
    Case(CustomLoss(quartic), quartic, "tree", (6,)),
]
# Where every case means a compilation of its own: one of each kind of formula, scalar outputs and several axes.
NAMES = {str(case): case for case in CASES}
FEW = [
    NAMES["SoftmaxCrossEntropy-integer-2x2x2x3"],
    NAMES["SoftmaxCrossEntropy-soft-5x4-smooth"],
    NAMES["SquaredError-real-6"],
    NAMES["SigmoidBinaryCrossEntropy-soft-2x2x2x2"],
    NAMES["CustomLoss-tree-6"],
    NAMES["CustomLoss-tree-2x3x3"],
]
SAMPLED = [
    NAMES["SoftmaxCrossEntropy-integer-5x4"],
    NAMES["SoftmaxCrossEntropy-soft-5x4"],
    NAMES["SoftmaxCrossEntropy-integer-2x3x4-smooth"],
    NAMES["SoftmaxCrossEntropy-soft-5x4-smooth"],
    NAMES["SquaredError-real-2x3x2"],
    NAMES["SigmoidBinaryCrossEntropy-bit-6"],
    NAMES["Poisson-count-2x3x2"],
]
NARROW = [(case, "bfloat16") for case in CASES if case.shape[0] > 2]
NARROW += [(NAMES["SoftmaxCrossEntropy-soft-5x4-smooth"], "float32"), (NAMES["Poisson-count-6"], "float32")]


def weights_of(case: Case, kind: str) -> np.ndarray | None:
    shape = {"none": None, "scalar": (), "prefix": case.positions[:1], "position": case.positions, "output": case.shape}
    if shape[kind] is None:
        return None
    w = np.asarray(np.random.default_rng(3).random(shape[kind]))
    if w.ndim:
        w[0] = 0.0
    return w


def dense_weights(case: Case, reduction: str, w: np.ndarray | None) -> np.ndarray:
    """Outputs-shaped weights, normalized by the definition: a sum over positions, an output being 1/K of one."""
    w = np.ones(()) if w is None else w
    full = np.broadcast_to(w.reshape(w.shape + (1,) * (len(case.shape) - w.ndim)), case.shape)
    if reduction == "sum":
        return full
    return full / (full.sum() / (1 if len(case.shape) == 1 else case.shape[-1]))


@functools.cache
def dense(case: Case) -> Callable[..., tuple[jax.Array, jax.Array, jax.Array]]:
    """(f, y, weights) -> value, gradient and (n, n) Hessian of the total loss; compiled once for all weights."""

    def total(flat: jax.Array, y: Any, weights: jax.Array) -> jax.Array:
        f = flat.reshape(case.shape)
        if case.elementwise:  # sums of scalar losses: the weights may differ between outputs
            return jnp.sum(weights.ravel() * jax.vmap(case.row)(flat, y.astype(f.dtype).ravel()))
        row = case.row
        for _ in case.positions:
            row = jax.vmap(row)
        return jnp.sum((weights[..., 0] if len(case.shape) > 1 else weights) * row(f, y))

    return quick_jit(lambda f, *rest: tuple(d(total)(f.ravel(), *rest) for d in (lambda x: x, jax.grad, jax.hessian)))


@functools.cache
def everything(loss: Loss) -> Callable[..., dict[str, jax.Array]]:
    """(f, y, weights) -> everything that the loss says, as dense arrays; compiled once for all weights."""

    def pieces(f: jax.Array, y: Any, weights: jax.Array) -> dict[str, jax.Array]:
        def matrix(name: str, shape: tuple[int, ...]) -> jax.Array:
            size = math.prod(shape)
            basis = jnp.eye(size, dtype=weights.dtype).reshape(size, *shape)
            return jax.vmap(lambda v: getattr(loss, name)(f, y, weights, v).ravel())(basis).T

        shapes = {"hessian_product": f.shape, "factor": loss.row_shape(f), "factor_transpose": f.shape}
        columns = {name: matrix(name, shape) for name, shape in shapes.items()}
        t = loss.gradient_in_rows(f, y, weights)
        rows = {} if t is None else {"t": t.ravel(), "S t": loss.factor(f, y, weights, t).ravel()}
        return {"value": loss.value(f, y, weights), "gradient": loss.gradient(f, y, weights).ravel(), **columns, **rows}

    return quick_jit(pieces)


def pieces(loss: Loss, f: Any, y: Any, weights: Any) -> dict[str, Any]:
    """Everything that a loss says. The reduction is in weights, so both reductions share one compilation."""
    f, y, weights = jax.tree.map(jnp.asarray, (f, y, weights))
    return jax.tree.map(np.asarray, everything(dataclasses.replace(loss, reduction="mean"))(f, y, weights))


def close(found: Any, wanted: Any, tolerance: float = 1e-12) -> None:
    scale = float(np.max(np.abs(wanted), initial=0.0))
    np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance * scale)


WEIGHTED = [
    (case, kind)
    for case in CASES
    for kind in ("none", "scalar", "prefix", "position", *(("output",) if case.elementwise else ()))
]


@pytest.mark.fast
@pytest.mark.parametrize(("case", "kind"), WEIGHTED, ids=str)
def test_all_pieces_match_the_dense_derivatives(case, kind):
    reduction = "sum" if kind == "prefix" else "mean"
    loss, w = dataclasses.replace(case.loss, reduction=reduction), weights_of(case, kind)
    f, y = case.outputs(), case.targets()
    loss.check(f, y, w)
    weights = loss.effective_weights(jax.ShapeDtypeStruct(f.shape, f.dtype), w)
    full = dense_weights(case, reduction, w)
    assert weights.shape == (case.shape if kind == "output" else case.positions)
    close(np.asarray(weights).reshape(weights.shape + (1,) * (f.ndim - weights.ndim)) + 0 * full, full)
    least = (*f.shape[:-1], f.shape[-1] - 1) if isinstance(loss, SoftmaxCrossEntropy) else f.shape
    assert loss.row_shape(f) == least and not loss.couples_examples

    value, gradient, hessian = dense(case)(*jax.tree.map(jnp.asarray, (f, case.label_rows(), full)))
    got = pieces(loss, f, y, weights)
    close(got["value"], value)
    close(got["gradient"], gradient)
    close(got["hessian_product"], hessian)
    close(got["factor"] @ got["factor"].T, hessian)
    close(got["factor_transpose"], got["factor"].T)
    if isinstance(loss, CustomLoss):
        assert "t" not in got
    else:
        close(got["S t"], gradient)
        dead = np.broadcast_to(full, f.shape)[..., : least[-1]].ravel() == 0
        assert np.all(got["t"][dead] == 0)


@pytest.mark.parametrize("shape", [(7,), (4, 2, 2)])
@pytest.mark.parametrize("weighed", ["alike", "masked", "each example", "each position", "none"])
def test_centered_squared_error_matches_the_dense_derivatives(weighed, shape):
    loss, rng = SquaredError(centered=True), np.random.default_rng(0)
    f, y = rng.standard_normal(shape), rng.standard_normal(shape)
    positions = shape[:-1] if len(shape) > 1 else shape
    given = {
        "alike": None,
        "masked": rng.permutation(np.arange(shape[0]) > 1),
        "each example": rng.random(shape[0]),
        "each position": rng.random(positions),
        "none": np.zeros(shape[0]),
    }[weighed]
    weights = np.ones(positions) if given is None else given.astype(float)
    weights = np.broadcast_to(weights.reshape(weights.shape + (1,) * (len(positions) - weights.ndim)), positions)
    full = np.broadcast_to(weights.reshape(positions + (1,) * (len(shape) - len(positions))), shape)

    def total(flat):
        residual = flat.reshape(shape) - y
        sums = jnp.maximum(jnp.sum(full, axis=0), 1e-300)
        mean = jnp.sum(full * residual, axis=0) / sums
        return jnp.sum(full * (residual - mean) ** 2) / 2 / max(np.sum(weights), 1e-300)

    derivatives = quick_jit(lambda x: (total(x), jax.grad(total)(x), jax.hessian(total)(x)))
    value, gradient, hessian = derivatives(jnp.asarray(f).ravel())
    # What stands where nothing weighs is not looked at.
    f, y = np.where(full == 0, np.nan, f), np.where(full == 0, np.inf, y)
    loss.check(f, y, given)
    effective = loss.effective_weights(jnp.asarray(f), given)
    got = pieces(loss, f, y, effective)
    close(got["value"], value)
    close(got["gradient"], gradient)
    close(got["hessian_product"], hessian)
    close(got["factor"] @ got["factor"].T, hessian)
    close(got["factor_transpose"], got["factor"].T)
    close(got["S t"], gradient)
    assert loss.couples_examples

    def outer(key):
        g = loss.sampled_gradient(jnp.asarray(f), jnp.asarray(y), effective, key).ravel()
        return g[:, None] * g

    drawn = np.mean(quick_jit(jax.vmap(outer))(jax.random.split(jax.random.key(0), 20_000)), axis=0)
    np.testing.assert_allclose(drawn, hessian, atol=0.05 * np.max(np.abs(hessian)))


@pytest.mark.parametrize("case", SAMPLED, ids=str)
def test_sampled_gradients_have_mean_zero_and_the_hessian_as_covariance(case):
    """Within 6 standard errors, each position by itself, for weights that are not all one."""
    loss, f, y = case.loss, jnp.asarray(case.outputs()), jnp.asarray(case.targets())
    weights = loss.effective_weights(f, weights_of(case, "position"))
    size, count = case.shape[-1] if f.ndim > 1 else 1, 20_000

    @quick_jit
    def moments(keys):
        def one(key):
            sampled = loss.sample_targets(f, y, key)
            g = loss.gradient(f, sampled, jnp.sqrt(weights)).reshape(-1, size)
            return g, g[:, :, None] * g[:, None, :]

        def stats(x):
            return jnp.mean(x, 0), jnp.std(x, 0) / np.sqrt(count)

        return jax.tree.map(stats, jax.vmap(one)(keys))

    (mean, mean_error), (outer, outer_error) = moments(jax.random.split(jax.random.key(0), count))
    blocks = pieces(loss, f, y, weights)["hessian_product"].reshape(-1, size, f.size // size, size)
    blocks = blocks[np.arange(len(blocks)), :, np.arange(len(blocks))]
    assert np.all(np.abs(mean) <= 6 * mean_error + 1e-12)
    assert np.all(np.abs(outer - blocks) <= 6 * outer_error + 1e-12)
    np.testing.assert_array_less(np.median(outer_error), 0.05 * np.max(np.abs(blocks)))


def test_samples_keep_the_kind_of_the_targets():
    key, f = jax.random.key(0), jnp.zeros((4, 1), jnp.bfloat16)
    for dtype in (jnp.int32, jnp.uint8):
        labels = SoftmaxCrossEntropy().sample_targets(f, jnp.zeros(4, dtype), key)
        assert labels.dtype == dtype and labels.shape == (4,)
    bits = SigmoidBinaryCrossEntropy().sample_targets(f, jnp.zeros(4, bool), key)
    assert bits.dtype == bool and bits.shape == (4,)
    for loss in (SquaredError(), Poisson()):
        drawn = loss.sample_targets(f, jnp.zeros(4, jnp.bfloat16), key)
        assert drawn.dtype == jnp.float32 and drawn.shape == (4,)
    sampler = CustomLoss(squared, lambda key, f: f + jax.random.normal(key, f.shape, f.dtype))
    drawn = sampler.sample_targets(jnp.zeros((2, 3, 4)), None, key)
    assert drawn.shape == (2, 3, 4) and len(np.unique(drawn)) == 24
    masked = CustomLoss(squared, lambda key, f, y: {**y, "box": f + jax.random.normal(key, f.shape, f.dtype)})
    observed = {"has": jnp.arange(6).reshape(2, 3), "box": jnp.zeros((2, 3, 4))}
    drawn = masked.sample_targets(jnp.zeros((2, 3, 4)), observed, key)
    assert np.array_equal(drawn["has"], observed["has"]) and len(np.unique(drawn["box"])) == 24
    with pytest.raises(ValueError, match="pass CustomLoss"):
        CustomLoss(squared).sample_targets(f, f, key)


def test_poisson_samples_large_and_extreme_rates():
    f = jnp.asarray([-jnp.inf, 5.0, 40.0, 1e4])
    sample = quick_jit(jax.vmap(lambda key: Poisson().sample_targets(f, f, key)))
    drawn = sample(jax.random.split(jax.random.key(0), 4000))
    assert np.all(np.isfinite(drawn)) and np.all(drawn[:, 0] == 0)
    for column, rate in ((1, np.exp(5.0)), (2, np.exp(40.0))):
        residual = (np.asarray(drawn[:, column], np.float64) - rate) / np.sqrt(rate)
        assert abs(residual.mean()) < 6 / np.sqrt(4000) and abs(residual.var() - 1) < 6 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_weights_act_as_counts(case, reduction):
    """All ones change nothing; a mask is the same as dropping, even with garbage in what it masks."""
    loss = dataclasses.replace(case.loss, reduction=reduction)
    f, y = case.outputs(), case.targets()
    plain = loss.effective_weights(f)
    for ones in (np.ones(case.positions, np.int32), np.ones(case.positions[0], bool), 1.0):
        np.testing.assert_array_equal(loss.effective_weights(f, ones), plain)
    if case.elementwise:
        close(loss.effective_weights(f, np.ones(case.shape)) + np.zeros(case.shape), np.max(plain))

    keep = np.arange(case.shape[0]) != 1
    short = pieces(loss, f[keep], jax.tree.map(lambda x: x[keep], y), loss.effective_weights(f[keep]))
    garbage, f = f.copy(), f.copy()
    garbage[1] = 1e30
    bad = jax.tree.map(lambda x: x.copy(), y)
    if case.kind == "integer":
        bad[1] = -100
    elif case.kind in ("real", "soft"):
        bad[1] = np.nan
    elif case.kind == "tree":
        bad["at"][1] = np.nan
    weights = loss.effective_weights(f, keep)
    for outputs, targets in ((f, y), (garbage, bad)):
        got = pieces(loss, outputs, targets, weights)
        column = keep.reshape((-1,) + (1,) * (f.ndim - 1))
        kept = {shape: np.broadcast_to(column, shape).ravel() for shape in (f.shape, loss.row_shape(f))}
        axes = {"factor": (f.shape, loss.row_shape(f)), "factor_transpose": (loss.row_shape(f), f.shape)}
        axes |= {"t": (loss.row_shape(f),)}
        for name, found in got.items():
            found = np.asarray(found)
            inside = [kept[shape] for shape in axes.get(name, (f.shape,) * found.ndim)]
            index = np.ix_(*inside) if inside else ()
            close(found[index], short[name])
            outside = np.zeros(found.shape)
            outside[index] = found[index]
            np.testing.assert_array_equal(found, outside)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_zero_weights_give_zero_and_no_nan_under_differentiation(case):
    f, y = jnp.asarray(case.outputs()), case.targets()
    f = f.at[0].set(jnp.nan)
    zeros = jnp.zeros(case.positions)
    for reduction in ("mean", "sum"):
        loss = dataclasses.replace(case.loss, reduction=reduction)
        assert all(np.all(x == 0) for x in pieces(loss, f, y, loss.effective_weights(f, zeros)).values())

    def value(f, w):
        return case.loss.value(f, y, case.loss.effective_weights(f, w))

    def rows(w):  # square roots of the weights, which have no finite derivative at zero
        t = case.loss.gradient_in_rows(f, y, w)
        return jnp.sum(case.loss.factor(f, y, w, jnp.ones(case.loss.row_shape(f), f.dtype))) + (
            0.0 if t is None else jnp.sum(t)
        )

    @jax.jit
    def slopes(f, w):
        return jax.grad(value, (0, 1))(f, w)

    assert np.all(np.isfinite(jax.jit(jax.grad(rows))(zeros.at[1].set(1.0))))

    assert all(np.all(g == 0) for g in slopes(f, zeros))
    some = zeros.at[1].set(1.0)
    by_f, by_w = slopes(f, some)
    close(by_f, case.loss.gradient(f, y, case.loss.effective_weights(f, some)))
    assert np.all(np.isfinite(by_w))


@pytest.mark.parametrize("case", FEW, ids=str)
def test_microbatches_and_vmapped_examples_add_up(case):
    """With weights made once, slices along axis 0 and single examples give the batch's own terms."""
    loss, f, y = case.loss, jnp.asarray(case.outputs()), jax.tree.map(jnp.asarray, case.targets())
    weights = loss.effective_weights(f, weights_of(case, "position"))

    def part(f, y, weights):
        terms = [getattr(loss, name)(f, y, weights, jnp.cos(f)) for name in ("hessian_product", "factor_transpose")]
        return loss.value(f, y, weights), (loss.gradient(f, y, weights), *terms)

    @quick_jit
    def three_ways(*batch):
        halves = [part(*jax.tree.map(lambda x, s=s: x[s], batch)) for s in (slice(0, 1), slice(1, None))]
        values, terms = zip(*halves, strict=True)
        return (
            part(*batch),
            (sum(values), jax.tree.map(lambda *x: jnp.concatenate(x), *terms)),
            jax.vmap(part)(*batch),
        )

    whole, halved, (values, terms) = three_ways(f, y, weights)
    for value, found in (halved, (jnp.sum(values), terms)):
        close(value, whole[0])
        jax.tree.map(close, found, whole[1])


@pytest.mark.parametrize(("case", "dtype"), NARROW, ids=str)
def test_narrow_outputs_give_wide_results(case, dtype):
    """bfloat16 outputs are computed with in float32: they agree with float64 at the same, rounded, outputs."""
    with jax.enable_x64(False):
        loss, f = case.loss, jnp.asarray(case.outputs(np.float32)).astype(dtype)
        y = jax.tree.map(lambda x: x.astype(dtype) if np.issubdtype(x.dtype, np.floating) else x, case.targets())
        loss.check(f, y, np.ones(f.shape[0]))
        weights = loss.effective_weights(f, jnp.linspace(0, 1, f.shape[0]).astype(dtype))
        got = pieces(loss, f, y, weights)
    exact_y = jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == dtype else x, y)
    wanted = pieces(loss, np.asarray(f, np.float64), exact_y, np.asarray(weights, np.float64))
    for name, found in got.items():
        assert found.dtype == np.float32
        close(found, wanted[name], 3e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_cross_entropy_with_extreme_and_forbidden_logits(dtype):
    loss = SoftmaxCrossEntropy()
    f = jnp.asarray([[1e4, 0.0, -1e4], [-np.inf, 1.0, 2.0], [1e4, 1e4, -np.inf], [0.0, -150.0, 0.0]], dtype)
    y = jnp.asarray([0, 2, 1, 1], jnp.int32)
    weights = jnp.full(4, 0.25, dtype)
    got = pieces(loss, f, y, weights)
    assert all(np.all(np.isfinite(x)) for x in got.values())
    a = np.e / (1 + np.e)
    p = np.array([[1, 0, 0], [0, 1 - a, a], [0.5, 0.5, 0], [0.5, np.exp(-150.0) / 2, 0.5]])
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    close(got["value"], (0 - np.log(a) + np.log(2) + 150 + np.log(2)) / 4, tolerance)
    close(got["gradient"].reshape(4, 3), (p - np.eye(3)[np.asarray(y)]) / 4, tolerance)
    close(got["S t"], got["gradient"], tolerance)  # also for the row that is confident and wrong
    hessian = got["hessian_product"]
    for i, row in enumerate(p):
        block = slice(3 * i, 3 * i + 3)
        close(hessian[block, block], (np.diag(row) - np.outer(row, row)) / 4, tolerance)
    for forbidden in (3, 8):
        assert not hessian[forbidden].any() and not hessian[:, forbidden].any() and got["gradient"][forbidden] == 0
    close(got["factor"] @ got["factor"].T, hessian, tolerance)

    def value(f):
        return loss.value(f, y, weights)

    if dtype == np.float32:  # the two differ by what they compile for, not by what they do
        gradient, second = quick_jit(lambda f: (jax.grad(value)(f), jax.hessian(value)(f)))(f)
        close(gradient.ravel(), got["gradient"], tolerance)
        close(second.reshape(12, 12), hessian, tolerance)
    # A label so wrong that sqrt(p) is zero, or forbidden: finite where there is a finite answer.
    for wrong, loss_value in ((-1e4, 1e4), (-np.inf, np.inf)):
        worst = pieces(loss, np.array([[0.0, wrong]], dtype), np.array([1], np.int32), np.ones(1, dtype))
        assert worst.pop("value") == loss_value and all(np.all(np.isfinite(x)) for x in worst.values())
        np.testing.assert_array_equal(worst["gradient"], [1, -1])
    # Smoothing spreads over the classes that are not forbidden, so the loss stays finite.
    smoothed = SoftmaxCrossEntropy(0.3)
    close(smoothed.value(f[1:2], y[1:2], weights[1:2]), (-0.85 * np.log(a) - 0.15 * np.log(1 - a)) / 4, tolerance)
    sampled = smoothed.sample_targets(f, y, jax.random.key(0))
    assert np.all(np.isfinite(smoothed.gradient(f, sampled, weights)))


@pytest.mark.parametrize("bad", [-1, 3, 200])
def test_unknown_label_is_legal_only_at_zero_weight(bad):
    loss, f = SoftmaxCrossEntropy(), jnp.zeros((2, 3))
    y = jnp.asarray([0, bad], jnp.int32)
    masked = loss.effective_weights(f, jnp.asarray([1.0, 0.0]))
    close(loss.value(f, y, masked), np.log(3.0))
    assert np.all(np.isfinite(loss.gradient(f, y, masked)))
    assert np.isnan(loss.value(f, y, jnp.ones(2))) and np.all(np.isnan(loss.gradient(f, y, jnp.ones(2))[1]))


def test_label_rows_without_mass_are_silent():
    f, y = jnp.asarray([[1.0, 2.0], [3.0, 1.0]]), jnp.asarray([[0.0, 0.0], [0.5, 1.0]])
    got = pieces(SoftmaxCrossEntropy(), f, y, jnp.ones(2))
    assert all(np.all(np.isfinite(x)) for x in got.values())
    assert (
        not got["t"][:1].any()
        and not got["gradient"][:2].any()
        and not got["factor"][:2].any()
        and got["factor"].shape == (4, 2)
    )


def test_binary_cross_entropy_keeps_its_digits_for_huge_logits():
    f = jnp.asarray([1e4, -1e4, 100.0, -100.0, 100.0, -np.inf, np.inf], jnp.float32)
    y = jnp.asarray([0, 1, 1, 0, 0, 0, 1], jnp.int32)
    loss, weights = SigmoidBinaryCrossEntropy(), jnp.ones(7, jnp.float32)
    got = pieces(loss, f, y, weights)
    assert all(np.all(np.isfinite(x)) for x in got.values())
    np.testing.assert_allclose(got["value"], 2e4 + 100, rtol=1e-6)
    np.testing.assert_allclose(got["gradient"], [1, -1, 0, 0, 1, 0, 0], atol=1e-30)
    np.testing.assert_allclose(np.diag(got["factor"])[2:5], np.exp(-50.0), rtol=1e-5)
    np.testing.assert_allclose(got["t"][2:5], [-np.exp(-50.0), np.exp(-50.0), np.exp(50.0)], rtol=1e-5)
    np.testing.assert_allclose(got["S t"][2:], got["gradient"][2:], rtol=1e-5, atol=1e-30)
    assert np.all(np.isfinite(jax.jit(jax.hessian(loss.value))(f, y, weights)))
    assert np.all(np.isfinite(jax.jit(jax.grad(loss.value))(f, y, weights)))


def test_poisson_with_extreme_log_rates():
    f, y = jnp.asarray([-np.inf, -300.0, 80.0], jnp.float32), jnp.asarray([0, 2, 1])
    got = pieces(Poisson(), f, y, jnp.ones(3, jnp.float32))
    assert all(np.all(np.isfinite(x)) for name, x in got.items())
    np.testing.assert_allclose(got["gradient"], [0, -2, np.exp(80.0)], rtol=1e-5)
    np.testing.assert_allclose(got["S t"][[0, 2]], got["gradient"][[0, 2]], rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaling_the_weights_only_scales_the_answer(case, factor):
    f, y = case.outputs(), case.targets()
    weights = case.loss.effective_weights(f)
    small, plain = pieces(case.loss, f, y, factor * weights), pieces(case.loss, f, y, weights)
    for name, power in (("value", 1), ("gradient", 1), ("hessian_product", 1), ("factor", 0.5)):
        close(small[name], factor**power * plain[name])
    tiny = case.loss.effective_weights(f, factor * np.ones(case.positions))
    close(tiny, weights)


def test_custom_loss_without_convexity_factors_the_non_negative_part():
    def saddle(f, y):
        return y * f[0] ** 2 - y * f[1] ** 2 + jnp.sin(f[0] * f[1])

    f, y = np.random.default_rng(0).standard_normal((4, 2)), np.arange(1.0, 5.0)
    got = pieces(CustomLoss(saddle, reduction="sum"), f, y, jnp.ones(4))
    hessian = np.asarray(quick_jit(jax.vmap(jax.hessian(saddle)))(jnp.asarray(f), jnp.asarray(y)))
    values, vectors = np.linalg.eigh(hessian)
    positive = np.einsum("pij,pj,pkj->pik", vectors, np.maximum(values, 0), vectors)
    for i in range(4):
        block = slice(2 * i, 2 * i + 2)
        close(got["hessian_product"][block, block], hessian[i])
        close(got["factor"][block] @ got["factor"][block].T, positive[i])


@pytest.mark.parametrize(
    "loss", [SquaredError(), SigmoidBinaryCrossEntropy(), Poisson()], ids=lambda x: type(x).__name__
)
def test_targets_may_lack_or_add_a_last_axis_of_one(loss):
    f, y = np.linspace(-1, 1, 4), np.array([0.0, 1.0, 1.0, 0.0])
    weights = loss.effective_weights(f)
    wanted = loss.value(f, y, weights), loss.gradient(f, y, weights)
    for outputs, targets in ((f[:, None], y), (f, y[:, None]), (f[:, None], y[:, None])):
        loss.check(outputs, targets)
        close(loss.value(outputs, targets, weights), wanted[0])
        gradient = loss.gradient(outputs, targets, weights)
        assert gradient.shape == outputs.shape
        close(gradient.ravel(), wanted[1])
        assert loss.sample_targets(outputs, targets, jax.random.key(0)).shape == targets.shape
    with pytest.raises(ValueError, match="reshape one to the other"):
        loss.value(f[:, None], y[None, :], weights)


LOGITS, LABELS = np.zeros((4, 3)), np.zeros(4, np.int32)
CHECKS = [
    (SoftmaxCrossEntropy(), LOGITS.astype(np.int32), LABELS, None, TypeError, "floating-point"),
    (SoftmaxCrossEntropy(), (LOGITS, LOGITS), LABELS, None, TypeError, "pass one array"),
    (SoftmaxCrossEntropy(), np.zeros(4), LABELS, None, ValueError, "last axis of classes"),
    (SoftmaxCrossEntropy(), LOGITS, LABELS[:, None], None, ValueError, "pass integer labels of shape"),
    (SoftmaxCrossEntropy(), LOGITS, np.zeros((4, 5)), None, ValueError, "or label rows of shape"),
    (SoftmaxCrossEntropy(), LOGITS, np.zeros(4), None, TypeError, "astype"),
    (SoftmaxCrossEntropy(), LOGITS, np.zeros(4, bool), None, TypeError, "astype"),
    (SoftmaxCrossEntropy(), LOGITS, np.zeros((4, 3), complex), None, TypeError, "integer or real"),
    (SoftmaxCrossEntropy(), LOGITS, {"y": LABELS}, None, TypeError, "pass one array"),
    (SoftmaxCrossEntropy(), LOGITS, LABELS, np.ones(3), ValueError, "a prefix of it"),
    (SoftmaxCrossEntropy(), LOGITS, LABELS, np.ones((4, 3)), ValueError, "a prefix of it"),
    (SoftmaxCrossEntropy(), LOGITS, LABELS, np.ones(4, complex), TypeError, "real or boolean"),
    (SquaredError(), LOGITS, np.zeros(4), None, ValueError, "reshape one to the other"),
    (SquaredError(), LOGITS, np.zeros((4, 3), complex), None, TypeError, "pass real ones"),
    (SquaredError(), np.zeros(()), np.zeros(()), None, ValueError, "leading batch axis"),
    (Poisson(), LOGITS, LOGITS, np.ones((4, 1)), ValueError, r"or \(4, 3\)"),
    (CustomLoss(squared), LOGITS, {"y": np.zeros((3, 4))}, None, ValueError, "leading axes"),
    (CustomLoss(lambda f, y: f), LOGITS, LABELS, None, ValueError, "return one real scalar"),
    (CustomLoss(lambda f, y: y), LOGITS, LABELS, None, ValueError, "return one real scalar"),
]


@pytest.mark.fast
@pytest.mark.parametrize("number", range(len(CHECKS)))
def test_check_names_the_mend(number):
    loss, outputs, targets, weights, error, words = CHECKS[number]
    with pytest.raises(error, match=words) as caught:
        loss.check(outputs, targets, weights)
    assert str(caught.value).count(". ") == 0


def test_check_accepts_shapes_without_data():
    struct = jax.ShapeDtypeStruct
    f = struct((4, 2, 3), jnp.bfloat16)
    SoftmaxCrossEntropy().check(f, struct((4, 2), jnp.uint8), struct((4,), jnp.bool_))
    SoftmaxCrossEntropy().check(f, struct((4, 2, 3), jnp.bool_))
    SquaredError().check(f, struct((4, 2, 3), jnp.bfloat16), struct((4, 2, 3), jnp.float32))
    CustomLoss(squared).check(f, struct((4, 2, 3), jnp.bfloat16), 1)


def test_configuration_is_validated():
    assert SoftmaxCrossEntropy(0.1, reduction="sum") == SoftmaxCrossEntropy(reduction="sum", label_smoothing=0.1)
    assert hash(SquaredError()) == hash(SquaredError())
    with pytest.raises(ValueError, match="pass 'mean' or 'sum'"):
        SquaredError(reduction="average")  # pyright: ignore[reportArgumentType]
    for e in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="pass a number in"):
            SoftmaxCrossEntropy(e)
