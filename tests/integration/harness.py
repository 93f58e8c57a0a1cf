"""What the integration tests share: precision, batches, directions read off a step, counters inside traced code."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import curvax
from tests.oracle import dense, losses
from tests.oracle.compiling import quick_jit
from tests.oracle.models import Model

PyTree = Any

LAMBDAS = (1.0, 1e-1, 1e-3)
TOLERANCE = {"float64": 1e-8, "float32": 1e-3}
KEY_SEED = 3

LOSSES = {"ce": losses.softmax_cross_entropy, "mse": losses.squared_error}


@contextlib.contextmanager
def precision(dtype: Any) -> Iterator[None]:
    """64-bit mode exactly when `dtype` needs it, whatever the session's default is."""
    with jax.enable_x64(jnp.dtype(dtype) == jnp.float64):
        yield


def key(seed: int = KEY_SEED) -> jax.Array:
    """The random key of a step."""
    return jax.random.key(seed)


def batch_of(model: Model, kind: str, dtype: Any, *, soft: bool = False, weighted: bool = False, seed: int = 0) -> dict:
    """Inputs "x", targets "y" for the loss `kind` ("ce", "mse") and, if wanted, weights "w"."""
    targets = model.targets(dtype, seed) if kind == "mse" else model.labels(seed)
    if soft:
        targets = model.soft_labels(dtype, seed)
    batch = {"x": model.inputs(dtype, seed), "y": targets}
    return {**batch, "w": model.weights(dtype, seed)} if weighted else batch


def truth_of(model: Any, kind: str, params: PyTree, batch: dict, reduction: str = "mean") -> dense.Truth:
    """The dense oracle at this point; of `model` only `predict` is used."""
    return dense.truth(model.predict, LOSSES[kind], params, batch["x"], batch["y"], batch.get("w"), reduction)


@functools.cache
def standard_truth(model: Model, kind: str, soft: bool = False, weighted: bool = False) -> dense.Truth:
    """The oracle at the model's own parameters and batch, the same in float32 and float64 (both start from float32)."""
    with precision(jnp.float64):
        batch = batch_of(model, kind, jnp.float64, soft=soft, weighted=weighted)
        return truth_of(model, kind, model.params(jnp.float64), batch)


def lam_sequence(values: tuple[float, ...] = LAMBDAS) -> dict[str, Any]:
    """Options of a preset whose step number i is damped by `values[i]`: one compiled step for several lam."""
    table = np.asarray(values)

    def lam(count: Any) -> jax.Array:
        dtype = jnp.result_type(float)
        return jnp.asarray(table, dtype)[jnp.minimum(count, len(values) - 1)]

    return {"lam_policy": curvax.damping.Scheduled(lam)}


def moved(params: PyTree, new_params: PyTree) -> np.ndarray:
    """params - new_params as a float64 vector: the direction, for learning rate 1 and nothing else in the transform."""
    return dense.vector(params) - dense.vector(new_params)


def directions(method: Any, params: PyTree, batch: dict, count: int = 1) -> tuple[list[np.ndarray], list[dict]]:
    """Directions and infos of `count` steps, each from the same `params` while the state goes on."""
    step = quick_jit(method.step)
    state = method.init(params)
    found, infos = [], []
    for _ in range(count):
        new_params, state, info = step(params, batch, state, key())
        found.append(moved(params, new_params))
        infos.append({name: np.asarray(value) for name, value in info.items()})
    return found, infos


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float, what: str = "") -> None:
    """Relative error in the Euclidean norm below `tolerance`."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    error = dense.relative_error(got, want)
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def all_finite(tree: PyTree) -> bool:
    """Whether every floating entry is finite."""
    return all(
        bool(jnp.all(jnp.isfinite(leaf)))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)
    )


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees are equal in structure, dtypes and every value."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(_plain(x), _plain(y)) for x, y in pairs)


def _plain(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)


class Counter:
    """Counts how often code really runs on the device: `tick` inside traced code, `take` outside."""

    def __init__(self) -> None:
        self.runs: collections.Counter[str] = collections.Counter()

    def tick(self, name: str = "run") -> None:
        """Adds one to `name` whenever the surrounding compiled code executes."""
        jax.debug.callback(functools.partial(self._add, name))

    def _add(self, name: str) -> None:
        self.runs[name] += 1

    def take(self) -> dict[str, int]:
        """Counts since the last `take`."""
        jax.effects_barrier()
        runs, self.runs = dict(self.runs), collections.Counter()
        return runs


def counted(function: Callable[..., Any], counter: Counter, name: str = "run") -> Callable[..., Any]:
    """`function` ticking `counter` at every execution."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        counter.tick(name)
        return function(*args, **kwargs)

    return wrapped


def steps_where_more_ran(counts: list[int]) -> list[int]:
    """Indices of the steps whose count exceeds the smallest one: where a cadence's work ran."""
    least = min(counts)
    return [i for i, count in enumerate(counts) if count > least]


@dataclasses.dataclass(frozen=True)
class CountingEstimator(curvax.estimators.DiagonalEstimator):
    """Counts the estimates it makes; the diagonal is one."""

    counter: Counter

    @property
    def needs_product(self):
        return True

    @property
    def needs_sampling(self):
        return False

    def diagonal(self, linearization, key):
        self.counter.tick("estimate")
        return jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), linearization.params_like)
