"""Hard cases of models with data: scales, singular curvature, bad starts, poisoned batches, narrow dtypes, odd data."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.robustness.case import Batch, Case, Params, Task
from curvax.losses import SoftmaxCrossEntropy, SquaredError

_FEATURES, _WIDTH, _EXAMPLES, _CLASSES = 5, 16, 64, 3
_SOAK = 20_000


def _tanh_network(params: Params, x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def _relu_network(params: Params, x: jax.Array) -> jax.Array:
    return jax.nn.relu(x @ params[0]["w"] + params[0]["b"]) @ params[1]["w"] + params[1]["b"]


def _linear(params: Params, x: jax.Array) -> jax.Array:
    return x @ params["w"]


_outputs = jax.jit(_tanh_network)


def _unit(params: Params, x: jax.Array) -> jax.Array:
    """Outputs in the unit that stands before the features."""
    return x[:, :1] * _tanh_network(params, x[:, 1:])


def _start(outputs: int, scale: float = 1.0, dtype: Any = np.float32, seed: int = 0) -> Params:
    rng = np.random.default_rng(seed)
    widths = (_FEATURES, _WIDTH, outputs)
    return [
        {
            "w": (scale * rng.normal(size=(a, b)) / math.sqrt(a)).astype(dtype),
            "b": np.zeros(b, dtype),
        }
        for a, b in itertools.pairwise(widths)
    ]


def _inputs(examples: int = _EXAMPLES) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(examples, _FEATURES)).astype(np.float32)


def _taught(x: np.ndarray) -> np.ndarray:
    """Targets that a network of the same shape has made."""
    return np.asarray(_outputs(_start(1, seed=2), x))


def _in_units(unit: float, x: np.ndarray | None = None, y: np.ndarray | None = None) -> Batch:
    x = _inputs() if x is None else x
    y = _taught(x) if y is None else y
    return {"x": np.concatenate([np.full((len(x), 1), unit, np.float32), x], axis=1), "y": np.float32(unit) * y}


def _labels(x: np.ndarray) -> np.ndarray:
    outputs = _outputs(_start(_CLASSES, seed=2), x)
    return np.argmax(np.asarray(outputs), axis=1).astype(np.int32)


_REGRESSION = Task("regression", _unit, SquaredError(), somax="sgn_mse")
_STILL = Task("regression, rate 0", _unit, SquaredError(), somax="sgn_mse", learning_rate=0.0)
_MASKED = Task("masked regression", _unit, SquaredError(), weight_key="w")
_RELU = Task("relu regression", _relu_network, SquaredError(), somax="sgn_mse")
_CLASSES_TASK = Task("classification", _tanh_network, SoftmaxCrossEntropy(), somax="sgn_ce")
_WEIGHED = Task("weighed classification", _tanh_network, SoftmaxCrossEntropy(reduction="sum"), weight_key="w")
_LINEAR = Task("linear", _linear, SquaredError(), somax="sgn_mse", float64=True)


@functools.cache
def _objective(task: Task) -> Callable[[Params, Batch], jax.Array]:
    return jax.jit(task.objective)


def _loss(task: Task, params: Params, batch: Batch) -> float:
    with jax.enable_x64(task.float64):
        return float(_objective(task)(params, dict(batch)))


def _case(name: str, task: Task, start: Params, batch: Batch, share: float, **rest: Any) -> Case:
    """A case whose minimum is a share of the loss at the start."""
    return Case(name, task, start, batch, share * _loss(task, start, batch), **rest)


def scales() -> Iterator[Case]:
    """The same loss in units from 1e-12 to 1e12: squared errors by the model's unit, cross entropy by weights."""
    for power in (-12, -9, -6, -3, 0, 3, 6, 9, 12):
        batch = _in_units(10.0 ** (power / 2))
        yield _case(f"regression, loss times 1e{power}", _REGRESSION, _start(1), batch, 1e-2)
    x = _inputs()
    for power in (-12, -6, 6, 12):
        batch = {"x": x, "y": _labels(x), "w": np.full(len(x), 10.0**power / len(x), np.float32)}
        yield _case(f"cross entropy, loss times 1e{power}", _WEIGHED, _start(_CLASSES), batch, 1e-1)


def starts() -> Iterator[Case]:
    """Zero and huge parameters, solved problems, dead units, a rate of zero."""
    batch, x = _in_units(1.0), _inputs()
    zero = jax.tree.map(np.zeros_like, _start(1))
    solved = _in_units(1.0, y=np.zeros((_EXAMPLES, 1), np.float32))
    plain = {"x": x, "y": _taught(x)}
    spread = 0.5 * float(np.var(plain["y"]))
    # There nothing but the output's bias has a slope, and that can fit the mean.
    yield Case("zero parameters: a saddle", _REGRESSION, zero, batch, 1.01 * spread)
    yield _case("solved at the start, residuals of zero", _REGRESSION, zero, solved, 1.0)
    yield _case("weights times 100: saturated", _REGRESSION, _start(1, 100.0), batch, 1e-3)
    yield _case("learning rate 0", _STILL, _start(1), batch, 1.0, steps=20)
    dead, half = _start(1), _start(1)
    dead[0]["b"] = np.full(_WIDTH, -100.0, np.float32)
    half[0]["b"] = np.where(np.arange(_WIDTH) % 2 == 0, -100.0, 0.0).astype(np.float32)
    yield Case("all ReLUs dead", _RELU, dead, plain, 1.01 * spread)
    yield _case("half of the ReLUs dead", _RELU, half, plain, 0.1)
    classes = {"x": x, "y": _labels(x)}
    yield _case("classification, logits times 50", _CLASSES_TASK, _start(_CLASSES, 50.0), classes, 1e-2)


def data() -> Iterator[Case]:
    """One example, copies, constants, outliers, bad units, labels that contradict one another or separate."""
    x, start = _inputs(), _start(1)
    y = _taught(x)
    copies, few = np.repeat(x[:1], _EXAMPLES, axis=0), np.repeat(x[: _EXAMPLES // 8], 8, axis=0)
    outlier, spike = y.copy(), x.copy()
    outlier[0], spike[0] = 1e6, 1e6
    # The mean of the targets takes 1/64 off a loss that is one outlier's.
    yield _case("one example", _REGRESSION, start, _in_units(1.0, x[:1]), 1e-6)
    yield _case("64 copies of one example", _REGRESSION, start, _in_units(1.0, copies), 1e-6)
    yield _case("8 copies of 8 examples", _REGRESSION, start, _in_units(1.0, few), 1e-4)
    yield _case("constant targets", _REGRESSION, start, _in_units(1.0, y=np.full_like(y, 3.0)), 1e-4)
    nothing = _in_units(1.0, np.zeros_like(x), y)
    yield Case("inputs of zero: constant outputs", _REGRESSION, start, nothing, 0.505 * float(np.var(y)))
    yield _case("a target of 1e6", _REGRESSION, start, _in_units(1.0, y=outlier), 0.99)
    yield _case("inputs of 1e6 in one example", _REGRESSION, start, _in_units(1.0, spike), 1e-2)
    units = np.asarray([1e-6, 1e-3, 1.0, 1e3, 1e6], np.float32)
    yield _case("features in units of 1e-6 to 1e6", _REGRESSION, start, _in_units(1.0, x * units, y), 0.5)
    classes, first = _labels(x), _start(_CLASSES)
    yield _case("classification, taught", _CLASSES_TASK, first, {"x": x, "y": classes}, 1e-1)
    yield _case("one class alone", _CLASSES_TASK, first, {"x": x, "y": np.zeros_like(classes)}, 1e-3)
    contradictory = {"x": few, "y": (np.arange(_EXAMPLES) % _CLASSES).astype(np.int32)}
    yield _case("labels that contradict one another", _CLASSES_TASK, first, contradictory, _contradiction(first, few))
    apart = {"x": np.where(classes[:, None] == np.arange(_FEATURES), 5.0, 0.0).astype(np.float32), "y": classes}
    yield _case("classes far apart", _CLASSES_TASK, first, apart, 1e-3)


def _contradiction(start: Params, x: np.ndarray) -> float:
    """The entropy of three classes among eight copies, 3 : 3 : 2, in units of the loss at the start, and 1 %."""
    shares = np.asarray([3, 3, 2]) / 8
    batch = {"x": x, "y": (np.arange(_EXAMPLES) % _CLASSES).astype(np.int32)}
    return 1.01 * float(-np.sum(shares * np.log(shares))) / _loss(_CLASSES_TASK, start, batch)


def _spoilt(good: Batch, key: str, value: float, examples: int = 1) -> Batch:
    """A batch with one value in the last column of the first examples."""
    leaf = good[key].copy()
    leaf[:examples, -1] = value
    return {**good, key: leaf}


def soak() -> Iterator[Case]:
    """A long run in which one batch in twenty, at random, is one of six that no method can learn from."""
    good = _in_units(1.0)
    values = (("x", math.nan), ("y", math.inf), ("x", 1e30), ("y", math.nan), ("x", -math.inf), ("y", 1e15))
    poison = tuple(_spoilt(good, key, value) for key, value in values)
    bad = np.random.default_rng(3).random(_SOAK) < 0.05
    name = f"{_SOAK:,} steps, one batch in twenty poisoned"
    yield _case(name, _REGRESSION, _start(1), good, 1e-2, poison=poison, poisoned=lambda i: bool(bad[i]), steps=_SOAK)


def poisons() -> Iterator[Case]:
    """Batches that no method can learn from, between batches that it can."""
    good, start = _in_units(1.0), _start(1)
    spoilt = functools.partial(_spoilt, good)

    def third(step: int) -> bool:
        return step == 3

    def odd(step: int) -> bool:
        return step % 2 == 1

    def first_forty(step: int) -> bool:
        return step < 40

    bad_x = {name: spoilt("x", value) for name, value in (("NaN", math.nan), ("inf", math.inf), ("1e30", 1e30))}
    bad_y = {name: spoilt("y", value) for name, value in (("NaN", math.nan), ("inf", math.inf), ("1e15", 1e15))}
    for name, poison in bad_x.items():
        yield _case(f"an input of {name} in step 3", _REGRESSION, start, good, 1e-2, poison=poison, poisoned=third)
    for name, poison in bad_y.items():
        yield _case(f"a target of {name} in step 3", _REGRESSION, start, good, 1e-2, poison=poison, poisoned=third)
    yield _case("NaN in half of the batches", _REGRESSION, start, good, 1e-2, poison=bad_x["NaN"], poisoned=odd)
    yield _case("NaN in 40 batches first", _REGRESSION, start, good, 1e-2, poison=bad_x["NaN"], poisoned=first_forty)
    all_huge = spoilt("y", 1e6, _EXAMPLES)
    yield _case("all targets 1e6 in step 3", _REGRESSION, start, good, 1e-2, poison=all_huge, poisoned=third)
    ones = np.ones(_EXAMPLES, np.float32)
    masked, few = {**good, "w": ones}, np.where(np.arange(_EXAMPLES) < 1, 0, ones).astype(np.float32)
    empty = {**masked, "w": 0 * ones}
    yield _case("an empty mask in step 3", _MASKED, start, masked, 1e-2, poison=empty, poisoned=third)
    yield _case("an empty mask in half of the batches", _MASKED, start, masked, 1e-2, poison=empty, poisoned=odd)
    hidden = {**spoilt("x", math.nan), "w": few}
    yield _case("NaN behind the mask", _MASKED, start, {**masked, "w": few}, 1e-2, poison=hidden)
    x = _inputs()
    classes, broken = {"x": x, "y": _labels(x)}, x.copy()
    broken[0] = math.nan
    yield _case(
        "classification, NaN in step 3",
        _CLASSES_TASK,
        _start(_CLASSES),
        classes,
        1e-1,
        poison={**classes, "x": broken},
        poisoned=third,
    )


def dtypes() -> Iterator[Case]:
    """Parameters and data in bfloat16 and float16."""
    x = _inputs()
    for dtype in (jnp.bfloat16, jnp.float16):
        name = jnp.dtype(dtype).name
        batch = {"x": x.astype(dtype), "y": _taught(x).astype(dtype)}
        task = dataclasses.replace(_RELU, name=name, predict_fn=_tanh_network)
        yield _case(f"{name}, regression", task, _start(1, dtype=dtype), batch, 0.1)
        labeled = {"x": batch["x"], "y": _labels(x)}
        task = dataclasses.replace(_CLASSES_TASK, name=name)
        yield _case(f"{name}, classification", task, _start(_CLASSES, dtype=dtype), labeled, 0.2)


def singular() -> Iterator[Case]:
    """Linear least squares in float64 whose curvature is singular, badly conditioned, or nil."""
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(32, 10)), rng.normal(size=(32, 1))
    doubled, wide = np.concatenate([x[:, :5], x[:, :5]], axis=1), np.zeros((32, 10))
    wide[:, 0] = 1.0
    conditioned = x * 10.0 ** -np.arange(10)
    few = np.where(np.arange(32)[:, None] < 4, x, 0.0)
    designs = {
        "columns twice": doubled,
        "rank 1": wide,
        "rank 0": 0 * x,
        "fewer rows than unknowns": few,
        "columns of 1 to 1e-9": conditioned,
    }
    for name, design in designs.items():
        best = design @ np.linalg.lstsq(design, y, rcond=1e-14)[0]
        minimum = 0.5 * float(np.mean((best - y) ** 2))
        # The last digits of a badly conditioned fit are worth little: 0.1 % above the minimum will do.
        yield Case(f"linear, {name}", _LINEAR, {"w": np.zeros((10, 1))}, {"x": design, "y": y}, 1.001 * minimum)


def explosions() -> Iterator[Case]:
    """Models whose first full Gauss-Newton step goes where exponentials overflow."""
    x = np.linspace(0.0, 1.0, 32)[:, None]

    def exponential(p: Params, x: jax.Array) -> jax.Array:
        return jnp.exp(p["a"] + p["b"] * x)

    def sigmoid(p: Params, x: jax.Array) -> jax.Array:
        return jax.nn.sigmoid(p["a"] + p["b"] * x)

    def pole(p: Params, x: jax.Array) -> jax.Array:
        return p["a"] / (1 + p["b"] * x)

    def power(p: Params, x: jax.Array) -> jax.Array:
        return (p["a"] + p["b"] * x) ** 9

    models = {
        "exponential from its flat side": (exponential, {"a": -8.0, "b": 0.0}, {"a": 0.5, "b": 1.5}),
        "saturated sigmoid": (sigmoid, {"a": 12.0, "b": 3.0}, {"a": -2.0, "b": 4.0}),
        "a pole between start and minimum": (pole, {"a": 1.0, "b": -0.9}, {"a": 2.0, "b": 3.0}),
        "ninth power": (power, {"a": 0.1, "b": 0.1}, {"a": 1.2, "b": 0.3}),
    }
    for name, (model, start, truth) in models.items():
        task = Task(name, model, SquaredError(), somax="sgn_mse", float64=True)
        with jax.enable_x64(True):
            y = np.asarray(jax.jit(model)(truth, x))
        first = {key: np.float64(value) for key, value in start.items()}
        yield _case(name, task, first, {"x": x, "y": y}, 1e-6)


def cases() -> Iterator[Case]:
    """All of them."""
    for family in (scales, starts, data, poisons, dtypes, singular, explosions, soak):
        yield from family()
