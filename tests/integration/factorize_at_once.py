"""Many factorizations in flight, over and over; test_factorize_at_once runs it in a process that it can end.

    python tests/integration/factorize_at_once.py UPDATES SEED...

Prints a line per method and seed when all of its updates are done. The seeds share their compiled programs.
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


Run = Callable[[np.random.Generator], Any]


def optimizer(tx: optax.GradientTransformation, updates: int, *models: int) -> Run:
    """Updates of stacked layers; of several models at once where `models` says how many."""
    init, step = map(quick_jit, (jax.vmap(tx.init), jax.vmap(tx.update)) if models else (tx.init, tx.update))

    def run(rng: np.random.Generator) -> Any:
        state, solution = init(stacks(rng, *models)), None
        for _ in range(updates):
            solution, state = jax.block_until_ready(step(stacks(rng, *models), state))
        return solution

    return run


def predict(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for w, b in params[:-1]:
        x = jnp.tanh(x @ w + b)
    return x @ params[-1][0] + params[-1][1]


def method(made: curvax.Method, updates: int, *models: int) -> Run:
    """Steps of a network whose layers are of several sizes."""
    key = jax.random.key(0)

    def step(params: Any, batch: Any, state: Any) -> Any:
        return made.step(params, batch, state, key)[:2]

    def init(params: Any, batch: Any) -> Any:
        return made.init(params, batch=batch)

    begin, compiled = map(quick_jit, (jax.vmap(init), jax.vmap(step)) if models else (init, step))

    def run(rng: np.random.Generator) -> Any:
        def normal(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal((*models, *shape)) / 4, jnp.float32)

        params: Any = [(normal(m, n), normal(n)) for m, n in itertools.pairwise(WIDTHS)]
        batch = {"x": normal(16, WIDTHS[0]), "y": jnp.asarray(rng.integers(0, WIDTHS[-1], (*models, 16)))}
        state = begin(params, batch)
        for _ in range(updates):
            params, state = jax.block_until_ready(compiled(params, batch, state))
        return params

    return run


def references(updates: int, *models: int) -> Run:
    """Plain JAX's factorizations, which are LAPACK's, all of them at once."""

    def one(stack: jax.Array) -> Any:
        square = stack @ stack.mT + jnp.eye(stack.shape[-2])
        lower = cholesky(square, implementation="reference").lower
        inverse = triangular_solve(lower, jnp.eye(stack.shape[-2]), implementation="reference")
        return inverse, qr(stack, implementation="reference"), eigh(square, implementation="reference")

    def every(tree: Any) -> Any:
        return jax.tree.map(one, tree)

    compiled = quick_jit(jax.vmap(every) if models else every)

    def run(rng: np.random.Generator) -> Any:
        factors = None
        for _ in range(updates):
            factors = jax.block_until_ready(compiled(stacks(rng, *models)))
        return factors

    return run


def main() -> None:
    """Runs everything, alone and under `vmap`, once per seed."""
    updates, *seeds = map(int, sys.argv[1:])
    model = {"predict_fn": predict, "loss": SoftmaxCrossEntropy()}
    exact = curvax.egn_ce(predict_fn=predict, backend="reference")
    runs: dict[str, Run] = {
        "shampoo": optimizer(scale_by_shampoo(), updates),
        "soap": optimizer(scale_by_soap(every=1), updates),
        "shampoo of two models": optimizer(scale_by_shampoo(), updates, 2),
        "soap of two models": optimizer(scale_by_soap(every=1), updates, 2),
        "kfac": method(curvax.kfac(**model, inverse_every=1), updates),
        "ekfac of two models": method(curvax.ekfac(**model, inverse_every=1), updates, 2),
        "exact Gauss-Newton of three models": method(exact, updates, 3),
        "references": references(updates),
        "references of two models": references(updates, 2),
    }
    for seed in seeds:
        rng = np.random.default_rng(seed)
        for name, run in runs.items():
            assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(run(rng))), name
            print(seed, name, flush=True)


if __name__ == "__main__":
    main()
