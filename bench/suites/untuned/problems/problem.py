"""What a development problem is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax.losses import Loss

Params: TypeAlias = Any
Batch: TypeAlias = dict[str, Any]
_EPOCH_STEPS = 2048


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples along the leading axis of every leaf: inputs "x" and targets "y"."""

    train: Batch
    held_out: Batch

    @property
    def size(self) -> int:
        """Examples to train on."""
        return len(jax.tree.leaves(self.train["y"])[0])


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model, its loss and its data.

    Attributes:
      name: the rows' case.
      loss: in output space.
      init: key -> parameters.
      predict_fn: (params, inputs) -> outputs.
      data: makes the data, the same at every call.
      metric: what `evaluate` measures.
      evaluate: (params, held-out data) -> scalar.
      batch: examples of a minibatch; `None` for the full batch in every step.
      float64: whether it runs in float64, as physics does.
    """

    name: str
    loss: Loss
    init: Callable[[jax.Array], Params]
    predict_fn: Callable[[Params, Any], jax.Array]
    data: Callable[[], Data]
    metric: str
    evaluate: Callable[[Params, Batch], jax.Array]
    batch: int | None = None
    float64: bool = False

    @property
    def full_batch(self) -> bool:
        """Whether every step sees all examples."""
        return self.batch is None

    def objective(self, params: Params, batch: Batch) -> jax.Array:
        """The loss of a batch."""
        outputs = self.predict_fn(params, batch["x"])
        return self.loss.value(outputs, batch["y"], self.loss.effective_weights(outputs))

    def order(self, size: int, seed: int) -> np.ndarray | None:
        """Indices (steps, batch) of the examples of each step, epoch by epoch; `None` for the full batch."""
        if self.batch is None:
            return None
        rng, per_epoch = np.random.default_rng(seed), size // self.batch
        epochs = [rng.permutation(size)[: per_epoch * self.batch] for _ in range(-(-_EPOCH_STEPS // per_epoch))]
        return np.concatenate(epochs).reshape(-1, self.batch).astype(np.int32)


def dense_init(*widths: int, scale: float = 1.0) -> Callable[[jax.Array], list[dict[str, jax.Array]]]:
    """Layers {"w", "b"} with normal weights of variance scale^2 / fan-in, in the default float dtype."""

    def init(key: jax.Array) -> list[dict[str, jax.Array]]:
        keys = jax.random.split(key, len(widths) - 1)
        return [
            {"w": scale * jax.random.normal(k, (a, b)) / a**0.5, "b": jnp.zeros(b)}
            for k, a, b in zip(keys, widths[:-1], widths[1:], strict=True)
        ]

    return init


def dense(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    """A tanh network with linear outputs."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def accuracy(predict_fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
    """Share of examples whose label is the largest output's."""
    return lambda params, batch: jnp.mean(jnp.argmax(predict_fn(params, batch["x"]), axis=-1) == batch["y"])


def root_mean_square(predict_fn: Callable[[Params, Any], jax.Array]) -> Callable[[Params, Batch], jax.Array]:
    """Root of the mean squared error."""
    return lambda params, batch: jnp.sqrt(jnp.mean(jnp.square(predict_fn(params, batch["x"]) - batch["y"])))


def once(make: Callable[[], Data]) -> Callable[[], Data]:
    """The same data at every call, made at the first."""
    return functools.cache(make)
