"""Whether the loss of a batch is the sum or the mean of those of its pieces, read from the function."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from curvax.structure.additive import additive_axes
from curvax.structure.batch_axes import BatchAxes, ExampleAxes

pytestmark = pytest.mark.fast

PyTree = Any
LossFn = Callable[[PyTree, PyTree], Any]

W = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
BATCH = {
    "m": jnp.asarray([[1.0, 1.0, 0.0]] * 2 + [[1.0, 0.0, 0.0]] * 3 + [[0.0, 0.0, 0.0]]),
    "x": jnp.asarray(np.random.default_rng(1).standard_normal((6, 3, 3)), jnp.float32),
    "y": jnp.asarray(np.arange(6) % 4),
}


def _found(loss: LossFn, batch: PyTree = BATCH, *, mean: bool = True, given: BatchAxes | None = None) -> ExampleAxes:
    def parts(params: PyTree, data: PyTree) -> list[jax.Array]:
        returned = loss(params, data)
        return list(returned) if isinstance(returned, tuple) else [returned]

    return additive_axes(parts, W, batch, given, lambda count: (2, 1), mean)


def _logits(w: jax.Array, b: PyTree) -> jax.Array:
    return jnp.tanh(b["x"] @ w).mean(1)


def _scanned(w: jax.Array, b: PyTree) -> jax.Array:
    """Positions one after another, the loss added up on the way."""

    def position(total: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
        return total + jnp.sum(jnp.square(jnp.tanh(x @ w))), None

    return jax.lax.scan(position, jnp.zeros((), jnp.float32), jnp.swapaxes(b["x"], 0, 1))[0]


MEANS: dict[str, LossFn] = {
    "mean over the batch": lambda w, b: jnp.mean(jnp.square(b["x"] @ w)),
    "mean of a mean over positions": lambda w, b: jnp.square(b["x"] @ w).sum(-1).mean(1).mean(),
    "sum over the number of examples": lambda w, b: jnp.sum(jnp.square(b["x"] @ w)) / b["x"].shape[0],
    "sum times a fraction": lambda w, b: (1.0 / b["y"].shape[0]) * jnp.sum(jnp.square(b["x"] @ w)),
    "and weight decay": lambda w, b: jnp.mean(jnp.square(b["x"] @ w)) + 1e-3 * jnp.sum(w * w),
    "integer labels of Optax": lambda w, b: optax.softmax_cross_entropy_with_integer_labels(
        _logits(w, b), b["y"]
    ).mean(),
    "labels taken along an axis": lambda w, b: (
        -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(_logits(w, b)), b["y"][:, None], -1))
    ),
    "labels indexed by example": lambda w, b: (
        -jnp.mean(jax.nn.log_softmax(_logits(w, b))[jnp.arange(b["y"].shape[0]), b["y"]])
    ),
    "labels one-hot": lambda w, b: -(jax.nn.one_hot(b["y"], 4) * jax.nn.log_softmax(_logits(w, b))).sum(-1).mean(),
    "inner jit, remat and vmap": lambda w, b: jax.jit(
        jax.checkpoint(lambda x: jax.vmap(lambda row: jnp.square(row @ w).sum())(x).mean())
    )(b["x"]),
    "an inner product of vectors": lambda w, b: (
        jnp.vdot(jnp.square(b["x"] @ w).sum((1, 2)), jnp.ones(b["x"].shape[0])) / b["x"].shape[0]
    ),
    "a number per example": lambda w, b: jnp.mean(jnp.square(b["x"] @ w).sum((1, 2)) * b["m"].mean(1)),
    "a constant": lambda w, b: jnp.sum(w * w),
    "several terms": lambda w, b: (
        jnp.mean(jnp.square(b["x"] @ w)) + 0.1 * jnp.abs(b["x"] @ w).mean() - jnp.where(True, jnp.mean(b["x"] @ w), 0.0)
    ),
    "aux that mixes": lambda w, b: jnp.mean(jnp.square(b["x"] @ w)) + 0.0 * jnp.sum(w),
}
SUMS: dict[str, LossFn] = {
    "sum over the batch": lambda w, b: jnp.sum(jnp.square(b["x"] @ w)),
    "weighted sum": lambda w, b: jnp.sum(jnp.square(b["x"] @ w).sum(-1) * b["m"]),
    "mean over positions alone": lambda w, b: jnp.square(b["x"] @ w).sum(-1).mean(1).sum(),
    "scan over positions": _scanned,
    "weight decay per example": lambda w, b: jnp.sum(jnp.square(b["x"] @ w)) + b["x"].shape[0] * 1e-3 * jnp.sum(w * w),
    "integer labels": lambda w, b: optax.softmax_cross_entropy_with_integer_labels(_logits(w, b), b["y"]).sum(),
}
PAIRS: dict[str, LossFn] = {
    "masked": lambda w, b: (jnp.sum(jnp.square(b["x"] @ w).sum(-1) * b["m"]), jnp.sum(b["m"])),
    "number of examples": lambda w, b: (jnp.sum(jnp.square(b["x"] @ w)), b["x"].shape[0] * jnp.ones(())),
    "counted labels": lambda w, b: (
        jnp.sum(jnp.where(b["y"] > 0, jnp.square(b["x"] @ w).sum((1, 2)), 0.0)),
        jnp.sum(b["y"] > 0),
    ),
}
# Per case: the function, whether a mean is asked for, and words of the sentence.
WRONG: dict[str, tuple[LossFn, bool, str]] = {
    "own normalizer": (
        lambda w, b: jnp.sum(jnp.square(b["x"] @ w).sum(-1) * b["m"]) / jnp.sum(b["m"]),
        True,
        r"divides by a number that it makes of its batch: let loss_fn return the tuple \(total, weight\)",
    ),
    "own normalizer, at least one": (
        lambda w, b: jnp.sum(jnp.square(b["x"] @ w).sum(-1) * b["m"]) / jnp.maximum(jnp.sum(b["m"]), 1.0),
        True,
        r"\(total, weight\)",
    ),
    "masked mean of NumPy": (
        lambda w, b: jnp.mean(jnp.square(b["x"] @ w).sum(-1), where=b["m"] > 0),
        True,
        r"\(total, weight\)",
    ),
    "root of a mean": (lambda w, b: jnp.sqrt(jnp.mean(jnp.square(b["x"] @ w))), True, "not linear .* by sqrt"),
    "log of a mean": (lambda w, b: jnp.log(jnp.mean(jnp.exp(b["x"] @ w))), True, "not linear .* by log"),
    "square of a mean": (lambda w, b: jnp.mean(b["x"] @ w) ** 2, True, r"\(total, weight\)"),
    "a sum for a mean": (SUMS["sum over the batch"], True, "is a sum over the examples.*set reduction='sum'"),
    "a mean for a sum": (MEANS["mean over the batch"], False, "is a mean over the examples.*set reduction='mean'"),
    "a mean and a sum": (
        lambda w, b: jnp.mean(jnp.square(b["x"] @ w)) + jnp.sum(jnp.square(b["x"] @ w)),
        True,
        "adds a mean and a sum",
    ),
    "weight decay beside a sum": (
        lambda w, b: jnp.sum(jnp.square(b["x"] @ w)) + jnp.sum(w * w),
        False,
        "adds a mean and a sum",
    ),
    "centered": (
        lambda w, b: jnp.mean(jnp.square(b["x"] @ w - jnp.mean(b["x"] @ w, 0))),
        True,
        "repeats a sum over all examples|pairs single examples.*batch_axes",
    ),
    "variance": (lambda w, b: jnp.var(b["x"] @ w), True, "batch_axes"),
    "all pairs": (lambda w, b: jnp.mean(jnp.square(b["x"][:, 0] @ w @ (b["x"][:, 0] @ w).T)), True, "batch_axes"),
    "largest": (lambda w, b: jnp.max(jnp.square(b["x"] @ w)), True, "reduce_max.*batch_axes"),
    "neighbors": (lambda w, b: jnp.mean((b["x"] @ w) * jnp.roll(b["x"] @ w, 1, 0)), True, "batch_axes"),
    "place in the batch": (
        lambda w, b: jnp.mean(jnp.square(b["x"] @ w).sum((1, 2)) * jnp.arange(b["x"].shape[0], dtype=jnp.float32)),
        True,
        "iota.*batch_axes",
    ),
    "power of the batch size": (
        lambda w, b: jnp.sum(jnp.square(b["x"] @ w)) / b["x"].shape[0] ** 0.5,
        True,
        "batch size enters",
    ),
    "pair of means": (
        lambda w, b: (jnp.mean(jnp.square(b["x"] @ w).sum(-1) * b["m"]), jnp.mean(b["m"])),
        True,
        "no sums over the examples: return sums",
    ),
}


@pytest.mark.parametrize("name", MEANS)
def test_means(name: str) -> None:
    found = _found(MEANS[name])
    assert not found.refused, found.refused
    assert "constant" in name or found.axes.count(BATCH) == 6


@pytest.mark.parametrize("name", SUMS)
def test_sums(name: str) -> None:
    found = _found(SUMS[name], mean=False)
    assert not found.refused, found.refused


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("mean", [True, False])
def test_totals_and_weights(name: str, mean: bool) -> None:
    found = _found(PAIRS[name], mean=mean)
    assert not found.refused, found.refused


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_add_up_says_why(name: str) -> None:
    loss, mean, words = WRONG[name]
    found = _found(loss, mean=mean)
    assert re.search(words, found.refused), found.refused


def test_a_leaf_that_is_shared_stays_whole() -> None:
    """Position ids as long as the batch; a grid, on which a sum over pairs of example and point runs."""

    places = {"places": jnp.ones(4), "tokens": jnp.ones((4, 4))}

    def loss(w: jax.Array, b: PyTree) -> jax.Array:
        hidden = (b["tokens"] + b["places"])[..., None] * w[0]
        return jnp.mean(jnp.square(hidden.sum(1)))

    found = _found(loss, places)
    assert not found.refused and found.axes.axes == (None, 0)

    def operator(w: jax.Array, b: PyTree) -> jax.Array:
        return jnp.mean(jnp.square(b["sensors"] @ w @ (b["grid"] @ w).T - b["y"]))

    for points in (5, 6):
        batch = {"grid": jnp.ones((points, 3)), "sensors": jnp.ones((6, 3)), "y": jnp.ones((6, points))}
        found = _found(operator, batch)
        assert not found.refused and found.axes.count(batch) == 6 and found.axes.axes[0] is None


def test_the_user_is_believed_where_nothing_can_be_shown() -> None:
    given = BatchAxes((0, 0, 0))
    assert not _found(WRONG["centered"][0], given=given).refused
    assert "total, weight" in _found(WRONG["own normalizer"][0], given=given).refused
