"""A Flax NNX model with BatchNorm and dropout, trained by curvax.

    python examples/flax_nnx.py

`nnx.split` separates the parameters, which curvax trains, from the running statistics, which travel as model state, and
the dropout streams, for which curvax passes one key per step: every product of a step sees the same dropout mask.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvax
from curvax.training import Evaluate, Minibatches


class Network(nnx.Module):
    """64 pixels -> 10 logits."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(64, 64, rngs=rngs)
        self.norm = nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.2)
        self.last = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array, rngs: nnx.Rngs | None = None) -> jax.Array:
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x))), rngs=rngs))


def data() -> list[jax.Array]:
    """Training and test images, training and test labels."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.float32) / 16, np.asarray(classes, np.int32)
    parts = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    return [jnp.asarray(part) for part in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description="BatchNorm and dropout in Flax NNX, trained by curvax.")
    parser.add_argument("--steps", type=int, default=200, help="steps on batches of 64 (200)")
    steps = parser.parse_args().steps
    train_x, test_x, train_y, test_y = data()
    graph, params, statistics = nnx.split(Network(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)

    def predict(params: Any, x: jax.Array, statistics: Any, *, rng: jax.Array) -> tuple[jax.Array, Any]:
        # A copy, since the running statistics change inside this call and NNX guards variables from outside of it.
        network = nnx.merge(graph, params, statistics, copy=True)
        logits = network(x, rngs=nnx.Rngs(dropout=rng))
        return logits, nnx.state(network, nnx.BatchStat)

    def accuracy(params: Any, statistics: Any) -> jax.Array:
        network = nnx.merge(graph, params, statistics)
        network.eval()
        return jnp.mean((jnp.argmax(network(test_x), axis=-1) == test_y).astype(jnp.float32))

    method = curvax.sgn_ce(predict_fn=predict, has_state=True, has_rng=True, lam0=0.3, learning_rate=0.5)
    result = curvax.fit(
        method, params, Minibatches({"x": train_x, "y": train_y}, size=64), steps, rng=jax.random.key(0),
        state=method.init(params, model_state=statistics),
        evaluate=Evaluate(accuracy, every=max(steps // 8, 1), largest=True, name="accuracy"),
    )  # fmt: skip
    for step, seconds, value in zip(*result.history.evaluations.values(), strict=True):
        print(f"step {step:>4} {seconds:6.2f} s  test accuracy {value:.2%}")


if __name__ == "__main__":
    main()
