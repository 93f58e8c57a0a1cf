"""curvax inside Optax: one link of a chain, with clipping around it and gradients accumulated over several batches.

    python examples/optax_chain.py

1. `scale_by_ggn` turns a gradient g into (C + lam I)^-1 g; clipping, momentum and the learning rate are Optax's own.
2. `as_gradient_transformation` makes a whole method, trust region and all, into a transformation; here
   `optax.MultiSteps` feeds it the mean gradient of four batches, and the curvature is that of the last of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import GradientTransformationExtraArgs, MultiSteps

import curvax

Params = dict[str, jax.Array]
Batch = dict[str, jax.Array]
EXAMPLES, FEATURES, CLASSES, BATCH = 2048, 20, 4, 64


def data(key: jax.Array) -> Batch:
    """Classes drawn from a random teacher network, on inputs whose features differ in scale by a factor of 100."""
    x_key, teacher_key, y_key = jax.random.split(key, 3)
    x = jax.random.normal(x_key, (EXAMPLES, FEATURES)) * jnp.logspace(-1, 1, FEATURES)
    teacher = 4 * predict(init(teacher_key), x / jnp.logspace(-1, 1, FEATURES))
    return {"x": x, "y": jax.random.categorical(y_key, teacher)}


def init(key: jax.Array) -> Params:
    first, second = jax.random.split(key)
    return {
        "w1": jax.random.normal(first, (FEATURES, 32)) / FEATURES**0.5,
        "b1": jnp.zeros(32),
        "w2": jax.random.normal(second, (32, CLASSES)) / 32**0.5,
        "b2": jnp.zeros(CLASSES),
    }


def predict(params: Params, x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def mean_loss(params: Params, batch: Batch) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(predict(params, batch["x"]), batch["y"]))


def chain() -> GradientTransformationExtraArgs:
    return optax.chain(
        optax.clip_by_global_norm(10.0),
        curvax.transforms.scale_by_ggn(predict, curvax.losses.SoftmaxCrossEntropy(), lam=0.1),
        optax.trace(decay=0.5),
        optax.clip_by_global_norm(1.0),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.5, 200)),
    )


def accumulated() -> MultiSteps:
    method = curvax.sgn_ce(predict_fn=predict, lam_policy="trust_region", lam0=0.3, lam_kwargs={"min_lam": 0.03})
    return MultiSteps(curvax.as_gradient_transformation(method), every_k_schedule=4)


def adam() -> GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optax.adam(optax.cosine_decay_schedule(0.03, 200)))


def train(tx: Any, params: Params, everything: Batch, steps: int, report: Callable[[int, Params], None]) -> None:
    """An ordinary Optax loop; the only addition is `batch=`, which transformations without curvature pass over."""

    @jax.jit
    def step(params: Params, state: Any, i: jax.Array) -> tuple[Any, Any]:
        rows = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (BATCH,), 0, EXAMPLES)
        batch = jax.tree.map(lambda a: a[rows], everything)
        gradient = jax.grad(mean_loss)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for i in range(steps):
        params, state = step(params, state, jnp.asarray(i))
        if (i + 1) * 4 // steps > i * 4 // steps:
            report(i + 1, params)


def main() -> None:
    parser = argparse.ArgumentParser(description="curvax as one link of Optax chains.")
    parser.add_argument("--steps", type=int, default=200, help="batches of each run (200)")
    steps = parser.parse_args().steps
    everything, params = data(jax.random.key(0)), init(jax.random.key(2))
    full = jax.jit(lambda p: mean_loss(p, everything))
    print(f"start: loss {full(params):.4f} over all examples")
    for name, tx in {"scale_by_ggn": chain(), "MultiSteps(sgn_ce)": accumulated(), "adam": adam()}.items():
        train(tx, params, everything, steps, lambda i, p, n=name: print(f"{n:<19} batch {i:>4}  loss {full(p):.4f}"))


if __name__ == "__main__":
    main()
