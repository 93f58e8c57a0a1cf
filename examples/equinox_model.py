"""An Equinox model trained by curvax, two ways of keeping things out of the parameters.

    python examples/equinox_model.py

`eqx.partition` separates the arrays from functions and sizes, and `frozen` tells curvax which arrays to leave alone:
here a random Fourier layer in front of a network that learns a wiggly curve. The planner chooses how to solve.
"""

from __future__ import annotations

import argparse
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

import curvax
from curvax.training import Evaluate, Sampler


class Regressor(eqx.Module):
    """One number in, one number out, through fixed random frequencies."""

    frequencies: jax.Array
    network: eqx.nn.MLP

    def __init__(self, key: jax.Array) -> None:
        first, second = jax.random.split(key)
        self.frequencies = 3 * jax.random.normal(first, (16,))
        self.network = eqx.nn.MLP(32, 1, width_size=32, depth=2, activation=jnp.tanh, key=second)

    def __call__(self, x: jax.Array) -> jax.Array:
        phases = self.frequencies * x
        return self.network(jnp.concatenate([jnp.sin(phases), jnp.cos(phases)]))


def target(x: jax.Array) -> jax.Array:
    return jnp.sin(3 * x) + 0.3 * jnp.cos(7 * x)


def main() -> None:
    parser = argparse.ArgumentParser(description="An Equinox model with a frozen layer, trained by curvax.")
    parser.add_argument("--steps", type=int, default=200, help="steps on batches of 128 (200)")
    steps = parser.parse_args().steps
    params, static = eqx.partition(Regressor(jax.random.key(0)), eqx.is_inexact_array)

    def predict(params: Any, x: jax.Array) -> jax.Array:
        return jax.vmap(eqx.combine(params, static))(x)

    def frozen(params: Any) -> Any:
        return eqx.tree_at(lambda model: model.frequencies, jax.tree.map(lambda _: False, params), True)

    method = curvax.gauss_newton(
        predict_fn=predict, loss=curvax.losses.SquaredError(), frozen=frozen, lam0=0.1, lam_kwargs={"min_lam": 1e-5}
    )
    test_x = jnp.linspace(-2, 2, 1001)[:, None]

    def error(params: Any) -> jax.Array:
        return jnp.sqrt(jnp.mean((predict(params, test_x) - target(test_x)) ** 2))

    def draw(key: jax.Array, params: Any, carried: Any) -> tuple[dict[str, jax.Array], Any]:
        x = jax.random.uniform(key, (128, 1), minval=-2, maxval=2)
        return {"x": x, "y": target(x)}, carried

    batch, _ = draw(jax.random.key(0), params, ())
    print(method.plan_for(params, batch).explain())
    evaluate = Evaluate(error, every=max(steps // 8, 1), name="error")
    result = curvax.fit(method, params, Sampler(draw), steps, rng=jax.random.key(1), evaluate=evaluate)
    for step, seconds, value in zip(*result.history.evaluations.values(), strict=True):
        print(f"step {step:>4} {seconds:6.2f} s   root mean square error {value:.4f}")
    assert (result.params.frequencies == params.frequencies).all()
    print("the frozen frequencies are what they were")


if __name__ == "__main__":
    main()
