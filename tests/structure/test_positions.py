"""Weights of positions: each counts in Kronecker factors as in the loss, and what weighs nothing is not there."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from curvax.curvature import MonteCarloFisher, ObservedFisher
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from curvax.structure import (
    empirical_fisher_diagonal,
    ggn_diagonal,
    per_example_gradient_norms,
)
from curvax.structure.capture import capture
from curvax.structure.kronecker import FactorSums, WeightSharing, factor_sums, projected_squares
from curvax.structure.positions import LossWeights, Spans, fill_idle_inputs
from tests.oracle import dense
from tests.oracle.compiling import quick_jit
from tests.structure.kronecker_models import Problem, block_diagonal, kronecker_matrix, normal

EXPAND, REDUCE = WeightSharing.EXPAND, WeightSharing.REDUCE
B, T, N, M = 3, 6, 4, 2
x64 = pytest.mark.usefixtures("x64")


def uneven(*shape: int) -> jax.Array:
    """Weights that are all different; one in three is zero."""
    weights = np.random.default_rng(11).uniform(0.2, 3.0, shape)
    weights.ravel()[1::3] = 0.0
    return jnp.asarray(weights)


def ragged(*lengths: int) -> jax.Array:
    """A mask of so many positions at the front of each example."""
    return jnp.asarray((np.arange(T)[None] < np.asarray(lengths)[:, None]).astype(float))


@dataclasses.dataclass(frozen=True)
class Linear:
    """A model with one linear layer, of which squared error has an exact Kronecker product per position."""

    name: str
    predict: Callable[[Any, Any], jax.Array]
    shapes: dict[str, tuple[int, ...]]
    inputs: tuple[int, ...] = (T, N)
    weights: tuple[int, ...] = (T,)
    high: int = 0

    def __str__(self) -> str:
        return self.name

    def problem(self, weights: jax.Array | None = None) -> Problem:
        params = {name: normal(i, *shape) for i, (name, shape) in enumerate(self.shapes.items())}
        if self.high:
            x = jnp.asarray(np.random.default_rng(3).integers(0, self.high, (B, *self.inputs)), jnp.int32)
        else:
            x = normal(7, B, *self.inputs)
        y = normal(8, *jax.eval_shape(self.predict, params, x).shape)
        w = uneven(B, *self.weights) if weights is None else weights
        return Problem(self.predict, params, {"x": x, "y": y, "w": w})


def _affine(p: Any, x: jax.Array) -> jax.Array:
    return x @ p["w"] + p["b"]


def _convolved(strides: tuple[int, int], padding: Any, **options: Any) -> Callable[[Any, jax.Array], jax.Array]:
    def predict(p: Any, x: jax.Array) -> jax.Array:
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, p["k"], strides, padding, dimension_numbers=numbers, **options) + p["b"]

    return predict


def _scanned(p: Any, x: jax.Array) -> jax.Array:
    """Position after position."""
    return lax.map(lambda row: row @ p["w"] + p["b"], x.transpose(1, 0, 2)).transpose(1, 0, 2)


def _derivative_of_its_own() -> Callable[[jax.Array], jax.Array]:
    same = jax.custom_jvp(lambda x: x * 1.0)
    same.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    return same


def _upsampled(p: Any, x: jax.Array) -> jax.Array:
    return jnp.repeat(x[:, ::2] @ p["w"] + p["b"], 2, axis=1)


AFFINE = {"w": (N, M), "b": (M,)}
KERNEL = {"k": (3, 3, N, M), "b": (M,)}


def _joined(p: Any, x: jax.Array) -> jax.Array:
    h = x @ p["w"]
    return jnp.concatenate([h[:, 2:], h[:, :2]], axis=1)


def _time_first(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("tbn,nm->tbm", x.transpose(1, 0, 2), p["w"]).transpose(1, 0, 2)


def _in_heads(p: Any, x: jax.Array) -> jax.Array:
    return jnp.einsum("btn,nhm->bthm", x, p["w"]).reshape(*x.shape[:2], -1)


BY_POSITION = (
    "dense", "flattened", "two axes of positions", "weights per row of them", "positions flattened in the outputs",
    "time first", "reversed", "vmapped", "inside remat and jit", "behind a custom derivative", "padded and cut",
    "one number per token", "heads", "a scan over tokens",
)  # fmt: skip
IMAGE, PIXELS, GROUPED = (3, 2, N), (3, 2), {"k": (3, 3, 2, 4), "b": (4,)}
LINEAR = (
    Linear("dense", _affine, AFFINE),
    Linear("flattened", lambda p, x: _affine(p, x.reshape(-1, N)).reshape(*x.shape[:2], M), AFFINE),
    Linear("two axes of positions", _affine, AFFINE, (2, 3, N), (2, 3)),
    Linear("weights per row of them", _affine, AFFINE, (2, 3, N), (2,)),
    Linear("positions flattened in the outputs", lambda p, x: _affine(p, x).reshape(-1, 6, M), AFFINE, (2, 3, N)),
    Linear("time first", _time_first, {"w": (N, M)}),
    Linear("reversed", lambda p, x: jnp.flip(_affine(p, jnp.flip(x, 1)), 1) * 2.0, AFFINE),
    Linear("reversed at the end", lambda p, x: _affine(p, x)[:, ::-1], AFFINE),
    Linear("cut and joined", _joined, {"w": (N, M)}),
    Linear("vmapped", jax.vmap(jax.vmap(_affine, (None, 0)), (None, 0)), AFFINE),
    Linear("inside remat and jit", jax.jit(jax.checkpoint(_affine)), AFFINE),
    Linear("behind a custom derivative", lambda p, x: _derivative_of_its_own()(_affine(p, x)), AFFINE),
    Linear("padded and cut", lambda p, x: _affine(p, jnp.pad(x, ((0, 0), (2, 1), (0, 0))))[:, 2:-1], AFFINE),
    Linear("one number per token", lambda p, x: x @ p["w"], {"w": (N,)}),
    Linear("heads", _in_heads, {"w": (N, 3, M)}),
    Linear("a scan over tokens", _scanned, AFFINE),
    Linear("repeated", _upsampled, AFFINE),
    Linear("convolution", _convolved((1, 1), "SAME"), KERNEL, IMAGE, PIXELS),
    Linear("strided convolution", _convolved((2, 2), "VALID"), KERNEL, (5, 7, N), (2, 3)),
    Linear("dilated convolution", _convolved((1, 1), "SAME", rhs_dilation=(2, 1)), KERNEL, IMAGE, PIXELS),
    Linear("grouped convolution", _convolved((1, 1), "SAME", feature_group_count=2), GROUPED, IMAGE, PIXELS),
    Linear("transposed convolution", _convolved((1, 1), [(2, 2)] * 2, lhs_dilation=(2, 2)), KERNEL, (2, 2, N), (5, 5)),
    Linear("pixels flattened", lambda p, x: _convolved((1, 1), "SAME")(p, x).reshape(-1, 6, M), KERNEL, IMAGE),
    Linear("embedding", lambda p, x: p["e"][x] * 3.0, {"e": (5, M)}, (T,), high=5),
    Linear("embedding and its shift", lambda p, x: jnp.flip(p["e"][x], 1), {"e": (5, M)}, (T,), high=5),
)


def gauss_newton(problem: Problem) -> np.ndarray:
    """J^T diag(weights) J of squared error; weights like positions, a prefix of them, or like outputs."""
    outputs, jacobian = dense.outputs_and_jacobian(problem.predict, problem.params, problem.batch["x"])
    w = np.asarray(problem.batch["w"], float)
    wide = np.broadcast_to(w.reshape(w.shape + (1,) * (outputs.ndim - w.ndim)), outputs.shape).ravel()
    return (jacobian.T * (wide * outputs.shape[-1] / wide.sum())) @ jacobian


def assert_exact(problem: Problem, tolerance: float = 1e-10, sums: FactorSums | None = None) -> None:
    """All A kron B are the blocks of the dense Gauss-Newton matrix, and nothing is outside of blocks."""
    blocks, sums = problem.blocks, sums or problem.sums()
    found = kronecker_matrix(blocks, sums.means(), sums.outputs, problem.params)
    expected = gauss_newton(problem)
    assert not blocks.diagonal
    bound = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(found, block_diagonal(expected, blocks, problem.params), rtol=tolerance, atol=bound)


@x64
@pytest.mark.parametrize("linear", LINEAR, ids=str)
def test_a_linear_layer_is_exact_whatever_positions_weigh(linear: Linear) -> None:
    problem, sums = _measured(linear.name)
    assert_exact(problem, sums=sums(problem.batch))


@functools.cache
def _measured(name: str) -> tuple[Problem, Callable[[Any], FactorSums]]:
    """A problem and batch -> its sums; two tests share the program."""
    (linear,) = (one for one in LINEAR if one.name == name)
    problem = linear.problem()
    return problem, summing(problem)


def summing(problem: Problem, sharing: WeightSharing = EXPAND, metric: Any = None) -> Callable[[Any], FactorSums]:
    """batch -> its sums, compiled once."""

    blocks = problem.blocks
    compiled = problem.measuring(lambda examples: factor_sums(blocks, examples, sharing), metric)
    return lambda batch: compiled(problem.params, batch)


@x64
@pytest.mark.parametrize("linear", [one for one in LINEAR if one.name in BY_POSITION], ids=str)
def test_what_a_masked_position_holds_changes_nothing(linear: Linear) -> None:
    """NaN included, in every metric; a mask is a weight."""
    problem, exact = _measured(linear.name)
    spoilt = spoiled(problem)
    others = [summing(problem, metric=metric) for metric in (MonteCarloFisher(), ObservedFisher())]
    for sums in (exact, *others) if linear.name == "dense" else (exact,):
        for mine, theirs in zip(jax.tree.leaves(sums(spoilt)), jax.tree.leaves(sums(problem.batch)), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def spoiled(problem: Problem) -> dict[str, jax.Array]:
    """The same batch with NaN in inputs and targets of zero weight."""
    x, y, w = (np.array(problem.batch[key]) for key in ("x", "y", "w"))
    x.reshape(*w.shape, -1)[w == 0], y[w == 0] = np.nan, np.nan
    assert np.array_equal(np.isnan(problem.predict(problem.params, jnp.asarray(x))), np.isnan(y))
    return {**problem.batch, "x": jnp.asarray(x), "y": jnp.asarray(y)}


@pytest.mark.parametrize("linear", LINEAR[:3], ids=str)
def test_float32_is_as_exact_as_it_can_be(linear: Linear) -> None:
    with jax.enable_x64(True):
        double = linear.problem()
        truth = double.truth().ggn
        narrow = jax.tree.map(lambda x: np.asarray(x, np.float32), (double.params, double.batch))
    problem = dataclasses.replace(double, params=narrow[0], batch=narrow[1])
    blocks, sums = problem.blocks, problem.sums()
    found = kronecker_matrix(blocks, sums.means(), sums.outputs, problem.params)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5 * np.abs(truth).max())


def test_bfloat16_counts_in_float32() -> None:
    problem = LINEAR[0].problem()
    cast = {key: value.astype(jnp.bfloat16) for key, value in problem.batch.items()}
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem.params)
    sums = dataclasses.replace(problem, params=params, batch=cast).sums()
    assert {leaf.dtype for leaf in jax.tree.leaves(sums)} == {np.dtype(np.float32)}
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, cast))
    expected = dataclasses.replace(problem, params=wide[0], batch=wide[1]).sums()
    np.testing.assert_allclose(sums.means()[0], expected.means()[0], rtol=0.02, atol=0.02)


@x64
@pytest.mark.parametrize("name", ["dense", "convolution", "embedding"])
def test_reduced_positions_are_weighted_means(name: str) -> None:
    linear = next(one for one in LINEAR if one.name == name)
    problem = linear.problem()
    (a,), (b,) = problem.factors(REDUCE)
    w = np.asarray(problem.batch["w"]).reshape(B, -1)
    w = w / w.sum()
    if name == "embedding":
        activations = np.eye(5)[np.asarray(problem.batch["x"])]
    else:
        (use,) = capture(problem.predict, problem.params, problem.batch["x"]).structure.uses
        rows = [np.asarray(use.activations(x[None]))[:, 0] for x in problem.batch["x"]]
        activations = np.concatenate([np.stack(rows), np.ones((*np.shape(rows)[:2], 1))], axis=2)
    means = np.einsum("bt,btn->bn", w, activations) / w.sum(1, keepdims=True)
    expected = np.einsum("b,bi,bj->ij", w.sum(1), means, means)
    np.testing.assert_allclose(a[0], np.diag(expected) if name == "embedding" else expected, rtol=1e-10, atol=1e-13)
    # The embedding is multiplied by 3 behind its lookup.
    np.testing.assert_allclose(b[0], np.eye(M) * (9 if name == "embedding" else 1), atol=1e-12)


def tokens(p: Any, x: jax.Array) -> jax.Array:
    """A network on each token by itself, with leaves of every kind: a table used again, a gain, a shared bias."""
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["gain"]
    h = h + jnp.tanh(h @ p["u"] + p["b"])
    return (h @ p["u"]) @ p["v"] * jnp.sum(jnp.sin(p["odd"]) * h, axis=-1, keepdims=True)


TOKENS = {"w": (N, 5), "b": (5,), "gain": (5,), "u": (5, 5), "v": (5, 3), "odd": (5,)}


def classified(weights: Any, *, labels: bool = True, predict: Any = tokens) -> Problem:
    params = {name: 0.5 * normal(i, *shape) for i, (name, shape) in enumerate(TOKENS.items())}
    y = np.random.default_rng(5).integers(0, 3, (B, T))
    batch = {"x": normal(7, B, T, N), "y": jnp.asarray(y, jnp.int32) if labels else normal(9, B, T, 3)}
    batch = batch if weights is None else {**batch, "w": jnp.asarray(weights)}
    return Problem(predict, params, batch, SoftmaxCrossEntropy() if labels else SquaredError())


@x64
@pytest.mark.parametrize("sharing", [EXPAND, REDUCE])
def test_weights_that_are_alike_change_nothing(sharing: WeightSharing) -> None:
    """Ones, any other number, one number per example spread over its tokens; also where tokens are cut off inside."""
    for predict in (tokens, lambda p, x: tokens(p, x)[:, :, ::-1] + jnp.mean(tokens(p, x), axis=1, keepdims=True)):
        plain = classified(None, predict=predict).sums(sharing)
        weighted = classified(jnp.ones((B, T)), predict=predict)
        sums = summing(weighted, sharing)
        for weight in (1.0, 7.0):
            found = sums({**weighted.batch, "w": jnp.full((B, T), weight)})
            for mine, theirs in zip(estimated(found), estimated(plain), strict=True):
                np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-13)
        each = jnp.asarray([0.5, 2.0, 1.0])
        narrow = classified(each, predict=predict).sums(sharing)
        wide = sums({**weighted.batch, "w": jnp.broadcast_to(each[:, None], (B, T))})
        for mine, theirs in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-13)


@x64
@pytest.mark.parametrize("labels", [True, False], ids=["ce", "mse"])
@pytest.mark.parametrize("sharing", [EXPAND, REDUCE])
def test_masked_tokens_are_dropped_tokens(labels: bool, sharing: WeightSharing) -> None:
    """Three of six valid in every example: the batch of those three; whatever the others hold."""
    whole = classified(ragged(3, 3, 3), labels=labels)
    cut = {key: value[:, :3] for key, value in whole.batch.items()}
    expected, sums = dataclasses.replace(whole, batch=cut).sums(sharing), summing(whole, sharing)
    for value in (0.0, 1e3, np.nan):
        spoilt = {**whole.batch, "x": whole.batch["x"].at[:, 3:].set(value)}
        if labels:
            spoilt["y"] = whole.batch["y"].at[:, 3:].set(-100)
        for mine, theirs in zip(estimated(sums(spoilt)), estimated(expected), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-13)


def estimated(sums: FactorSums) -> list[jax.Array]:
    """All factors and diagonals."""
    return [*sums.means(), *sums.outputs, *sums.diagonal]


def attention(p: Any, x: Any) -> jax.Array:
    """Two layers that attend to what is no padding, with a gate in between."""
    h = p["e"][x["ids"]] + p["at"][: x["ids"].shape[1]]
    for layer in "ab":
        scores = jnp.einsum("btd,bsd->bts", h @ p[layer + "q"], h @ p[layer + "k"])
        scores = jnp.where(x["valid"][:, None], scores, -jnp.inf)
        h = h + jax.nn.softmax(scores) @ (h @ p[layer + "v"]) @ p[layer + "o"]
        h = h + jax.nn.relu(h @ p[layer + "w"] + p[layer + "b"]) @ p[layer + "u"]
    return h @ p["out"]


def padded(lengths: tuple[int, ...]) -> Problem:
    square = {layer + name: (4, 4) for layer in "ab" for name in "qkvo"}
    gates = {layer + name: shape for layer in "ab" for name, shape in {"w": (4, 6), "b": (6,), "u": (6, 4)}.items()}
    shapes = {"e": (7, 4), "at": (T, 4), "out": (4, 3), **square, **gates}
    params = {name: 0.5 * normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    rng, valid = np.random.default_rng(0), ragged(*lengths)
    x = {"ids": jnp.asarray(rng.integers(0, 7, valid.shape), jnp.int32), "valid": valid > 0}
    y = jnp.asarray(rng.integers(0, 3, valid.shape), jnp.int32)
    batch: dict[str, Any] = {"x": x, "y": y, "w": valid}
    return Problem(attention, params, batch, SoftmaxCrossEntropy(reduction="sum"))


@x64
def test_a_ragged_batch_is_the_sum_of_its_examples() -> None:
    """Attention with padding: sums of the padded batch against every example by itself, cut to its length."""
    lengths = (6, 3, 1)
    whole, parts = padded(lengths), []
    for i, n in enumerate(lengths):
        one = jax.tree.map(lambda leaf, i=i, n=n: leaf[i : i + 1, :n], whole.batch)
        parts.append(dataclasses.replace(whole, batch=one).sums())
    expected = jax.tree.map(lambda *leaves: sum(leaves), *parts)
    for mine, theirs in zip(jax.tree.leaves(whole.sums()), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-12)


@x64
def test_tokens_that_only_help_others_count() -> None:
    """A prompt has no loss, but its cotangents are not zero, and so its activations count in A."""
    problem = padded((6, 6, 6))
    weights = jnp.concatenate([jnp.zeros((B, 4)), jnp.ones((B, 2))], axis=1)
    answered = dataclasses.replace(problem, batch={**problem.batch, "w": weights})
    names = sorted(problem.params)
    means = answered.sums().means()
    index = next(i for i, block in enumerate(answered.blocks.kronecker) if names[block.leaf] == "e")
    counts = np.bincount(np.asarray(problem.batch["x"]["ids"]).ravel(), minlength=7)
    np.testing.assert_allclose(means[index][0], counts / counts.sum(), rtol=1e-10)


@x64
def test_the_eigenbasis_sees_no_masked_position() -> None:
    """Squares of projected rows against rows written out, with NaN where nothing counts."""
    problem = classified(ragged(6, 2, 0))
    spoilt = dataclasses.replace(
        problem, batch={**problem.batch, "x": jnp.where(problem.batch["w"][..., None] > 0, problem.batch["x"], jnp.nan)}
    )
    blocks = spoilt.blocks
    bases = []
    for i, block in enumerate(blocks.kronecker):
        groups, n, m = block.shape
        bases.append(tuple(np.linalg.qr(normal(3 * i + k, groups, size, size))[0] for k, size in enumerate((n, m))))
    found = spoilt.measure(lambda examples: projected_squares(blocks, examples, bases))
    truth = block_diagonal(problem.truth("ce").ggn, blocks, problem.params)
    basis = kronecker_matrix(blocks, [u for u, _ in bases], [np.swapaxes(v, 1, 2) for _, v in bases], problem.params)
    inside = np.diag(np.diag(basis.T @ truth @ basis))
    taken = [block.take(list(_leaves(np.diag(inside), problem.params))) for block in blocks.kronecker]
    for mine, theirs in zip(found, taken, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-8, atol=1e-12)


def _leaves(vector: np.ndarray, like: Any) -> list[jax.Array]:
    leaves = jax.tree.leaves(like)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return [jnp.asarray(vector[e - leaf.size : e]).reshape(leaf.shape) for e, leaf in zip(ends, leaves, strict=True)]


SHARP: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "logarithm": lambda p, x: jnp.log(jnp.abs(x @ p["w"])) @ p["v"],
    "root": lambda p, x: jnp.sqrt(jnp.abs(x @ p["w"])) @ p["v"],
    "direction": lambda p, x: (lambda h: h / jnp.sqrt(jnp.sum(h**2, -1, keepdims=True)))(x @ p["w"]) @ p["v"],
    "norm": lambda p, x: jnp.linalg.norm(x @ p["w"], axis=-1, keepdims=True) * p["v"][0],
}


@x64
@pytest.mark.parametrize("predict", SHARP.values(), ids=SHARP.keys())
@pytest.mark.parametrize("positions", [(), (T,)], ids=["examples", "tokens"])
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_exact_quantities_see_nothing_that_is_masked(
    predict: Callable[[Any, jax.Array], jax.Array], positions: tuple[int, ...], value: float
) -> None:
    """Slopes that are infinite at zero weight: the numbers are those without these examples, or tokens."""
    params = {"w": normal(0, N, 5), "v": normal(1, 5, M)}
    w = np.array(uneven(4, *positions))
    w[1] = 0.0
    x, y = np.array(normal(7, *w.shape, N)), normal(8, *w.shape, M)
    x[w == 0] = value
    batch, loss = (jnp.asarray(x), y, jnp.asarray(w)), SquaredError()
    clean = jnp.where(batch[2][..., None] == 0, normal(9, *x.shape), batch[0])
    _, jacobian = dense.outputs_and_jacobian(predict, params, clean)
    slopes = jacobian.reshape(w.size, M, -1)
    share = w.ravel() / w.sum()
    residual = (np.asarray(predict(params, clean)) - np.asarray(y)).reshape(w.size, M)
    each = np.einsum("pk,pkn->pn", residual, slopes)

    def everything(p: Any, x: jax.Array, y: jax.Array, w: jax.Array) -> Any:
        many = ggn_diagonal(predict, loss, p, x, y, w, samples=2, key=jax.random.key(0))
        return (
            ggn_diagonal(predict, loss, p, x, y, w),
            empirical_fisher_diagonal(predict, loss, p, x, y, w),
            per_example_gradient_norms(predict, loss, p, x, y, w),
            many,
        )

    compiled = quick_jit(everything)
    diagonal, fisher, norms, many = compiled(params, *batch)
    close(dense.vector(diagonal), np.einsum("p,pkn->n", share, slopes**2))
    close(dense.vector(fisher), share @ each**2)
    own = (each * share[:, None]).reshape(len(w), -1, each.shape[1]).sum(axis=1)
    close(norms, np.linalg.norm(own, axis=1))
    assert norms[1] == 0
    close(dense.vector(many), dense.vector(compiled(params, clean, *batch[1:])[3]))
    for leaf in jax.tree.leaves(compiled(params, batch[0] * np.nan, y, jnp.zeros(w.shape))):
        np.testing.assert_array_equal(leaf, 0.0)


def close(got: Any, want: Any) -> None:
    np.testing.assert_allclose(np.ravel(got), np.ravel(want), rtol=1e-9, atol=1e-11 * np.abs(want).max())


def test_inputs_of_no_weight_are_those_of_others() -> None:
    """Whole examples from the first that counts, tokens from the first of their example; keys and labels as well."""

    def predict(p: Any, x: Any) -> jax.Array:
        scale = jax.vmap(lambda k: jax.random.uniform(k))(x["key"])[:, None, None] * x["one"][:, None, None]
        return (x["tokens"] + x["ids"][..., None].astype(jnp.float32)) @ p * scale

    inputs = {
        "ids": jnp.arange(8).reshape(2, 4),
        "key": jax.random.split(jax.random.key(0), 2),
        "one": jnp.asarray([jnp.nan, 2.0]),
        "tokens": jnp.arange(24.0).reshape(2, 4, 3),
    }
    p = jnp.ones((3, 2))
    weights = jnp.asarray([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 2.0]])
    sound = fill_idle_inputs(capture(predict, p, inputs), jax.tree.leaves(inputs), LossWeights(weights, 3, 2))
    np.testing.assert_array_equal(sound[0], [[5, 5, 5, 7]] * 2)
    np.testing.assert_array_equal(sound[2], [2.0, 2.0])
    np.testing.assert_array_equal(sound[3], inputs["tokens"][1][jnp.asarray([[1, 1, 1, 3]] * 2)])
    untouched = fill_idle_inputs(capture(predict, p, inputs), jax.tree.leaves(inputs), LossWeights(weights, 3, 0))
    assert all(mine is theirs for mine, theirs in zip(untouched, jax.tree.leaves(inputs), strict=True))


def test_spans_that_overlap_are_not_apart() -> None:
    def spans(*pairs: tuple[int, int]) -> Spans:
        return Spans(*np.asarray(pairs).T)

    assert spans((0, 0), (2, 2), (1, 1)).one_to_one
    assert spans((0, 1), (2, 3), (0, 1)).disjoint and not spans((0, 1), (2, 3), (0, 1)).one_to_one
    assert not spans((0, 1), (1, 2)).disjoint and not spans((0, 3), (0, 3)).disjoint
    flat = jnp.asarray([[1.0, 3.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    idle = spans((2, 3), (0, 1), (9, -1))
    np.testing.assert_array_equal(idle.means(flat), [[0.0, 2.0, 0.0], [2.0, 2.0, 2.0]])
    np.testing.assert_array_equal(idle.counted(flat), [[False, True, False], [True, True, False]])


def test_orders_of_axes_are_followed() -> None:
    """Every order of two axes of positions and one of features, through a product on each position."""
    for order in itertools.permutations(range(1, 4)):

        def predict(p: Any, x: jax.Array, order: tuple[int, ...] = order) -> jax.Array:
            moved = x.transpose(0, *order)
            h = jnp.tensordot(moved, p, ([1 + order.index(3)], [0]))
            # The axes of positions are left in the order of `order`, and the outputs behind them.
            return h.transpose(0, 1, 2, 3) if order.index(1) < order.index(2) else h.transpose(0, 2, 1, 3)

        captured = capture(predict, jnp.ones((5, 2)), jnp.ones((2, 3, 4, 5)))
        (use,) = captured.structure.uses
        reached = LossWeights(jnp.ones((2, 3, 4)), 4, 3).reach(captured, frozenset([use.path]))
        numbers = use.by_position(reached.steps[use.path].first, np.min)
        expected = np.arange(12).reshape(3, 4)
        np.testing.assert_array_equal(numbers, (expected if order.index(1) < order.index(2) else expected.T).ravel())
