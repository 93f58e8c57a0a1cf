"""Many factorizations in flight, over and over; test_factorize_at_once runs it in a process that it can end.

    python tests/integration/factorize_at_once.py SEED UPDATES

Prints a line per method when all of its updates are done.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax.kernels.dense_linalg import cholesky, eigh, qr, triangular_solve
from curvax.losses import SoftmaxCrossEntropy
from curvax.optimizers import scale_by_shampoo, scale_by_soap
from tests.oracle.compiling import quick_jit

# Stacks of matrices of many sizes, as layers that are scanned over have them.
STACKS = {"a": (4, 48, 64), "b": (9, 32, 64), "c": (8, 64, 128), "d": (64, 4, 16)}
WIDTHS = (20, 24, 33, 24, 10)


def stacks(rng: np.random.Generator, *leading: int) -> dict[str, jax.Array]:
    return {k: jnp.asarray(rng.standard_normal((*leading, *s)), jnp.float32) for k, s in STACKS.items()}


def optimizer(tx: optax.GradientTransformation, rng: np.random.Generator, updates: int, *models: int) -> Any:
    """Updates of stacked layers; of several models at once where `models` says how many."""
    init, update = (jax.vmap(tx.init), jax.vmap(tx.update)) if models else (tx.init, tx.update)
    state, step = init(stacks(rng, *models)), quick_jit(update)
    found = None
    for _ in range(updates):
        found, state = step(stacks(rng, *models), state)
        jax.block_until_ready(found)
    return found


def predict(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def method(made: curvax.Method, rng: np.random.Generator, updates: int, *models: int) -> Any:
    """Steps of a network whose layers are of several sizes."""

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((*models, *shape)) / 4, jnp.float32)

    params = [(normal(m, n), normal(n)) for m, n in itertools.pairwise(WIDTHS)]
    batch = {"x": normal(16, WIDTHS[0]), "y": jnp.asarray(rng.integers(0, WIDTHS[-1], (*models, 16)))}
    key = jax.random.key(0)

    def step(params: Any, batch: Any, state: Any) -> Any:
        return made.step(params, batch, state, key)[:2]

    def init(params: Any, batch: Any) -> Any:
        return made.init(params, batch=batch)

    run, begin = (jax.vmap(step), jax.vmap(init)) if models else (step, init)
    state, compiled = begin(params, batch), quick_jit(run)
    for _ in range(updates):
        params, state = compiled(params, batch, state)
        jax.block_until_ready(params)
    return params


def references(rng: np.random.Generator, updates: int, *models: int) -> Any:
    """Plain JAX's factorizations, which are LAPACK's, all of them at once."""

    def one(stack: jax.Array) -> Any:
        square = stack @ stack.mT + jnp.eye(stack.shape[-2])
        lower = cholesky(square, implementation="reference").lower
        inverse = triangular_solve(lower, jnp.eye(stack.shape[-2]), implementation="reference")
        return inverse, qr(stack, implementation="reference"), eigh(square, implementation="reference")

    def every(tree: Any) -> Any:
        return jax.tree.map(one, tree)

    found, run = None, quick_jit(jax.vmap(every) if models else every)
    for _ in range(updates):
        found = jax.block_until_ready(run(stacks(rng, *models)))
    return found


def main() -> None:
    """Runs everything, alone and under `vmap`."""
    seed, updates = map(int, sys.argv[1:])
    rng = np.random.default_rng(seed)
    model = {"predict_fn": predict, "loss": SoftmaxCrossEntropy()}
    runs: dict[str, Callable[[], Any]] = {
        "shampoo": lambda: optimizer(scale_by_shampoo(), rng, updates),
        "soap": lambda: optimizer(scale_by_soap(every=1), rng, updates),
        "shampoo of two models": lambda: optimizer(scale_by_shampoo(), rng, updates, 2),
        "soap of two models": lambda: optimizer(scale_by_soap(every=1), rng, updates, 2),
        "kfac": lambda: method(curvax.kfac(**model, inverse_every=1), rng, updates),
        "ekfac of two models": lambda: method(curvax.ekfac(**model, inverse_every=1), rng, updates, 2),
        "exact Gauss-Newton of three models": lambda: method(
            curvax.egn_ce(predict_fn=predict, backend="reference"), rng, updates, 3
        ),
        "references": lambda: references(rng, updates),
        "references of two models": lambda: references(rng, updates, 2),
    }
    for name, run in runs.items():
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(run())), name
        print(name, flush=True)


if __name__ == "__main__":
    main()
