"""What the machine can do at most: copies and matrix products, through JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from bench import run
from bench.schema import Row
from bench.suites.kernels.case import accelerated, copy, repeats

SUITE = "limits"
_PRODUCTS = (
    ("float32, highest", jnp.float32, jax.lax.Precision.HIGHEST),
    ("float32, default", jnp.float32, jax.lax.Precision.DEFAULT),
    ("bfloat16", jnp.bfloat16, jax.lax.Precision.DEFAULT),
)


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """GB/s of copies (bytes read and written) at several sizes, GFLOP/s of square matrix products.

    Args:
      quick: small sizes.
      only: substring of the case names to run.
    """
    rounds = 3 if quick else 15
    for size in (2**18, 2**24) if quick else (2**18, 2**22, 2**24, 2**26, 2**28):
        if only in "copy":
            yield [_copied(size, rounds)]
    side = 512 if quick else 8192 if accelerated() else 1024
    for name, dtype, precision in _PRODUCTS:
        if only in "matrix product":
            yield [_multiplied(name, dtype, precision, side, rounds)]


def _copied(size: int, rounds: int) -> Row:
    count = repeats(max(1, min(200, 2**28 // size)))
    (timing,) = run.time_all([_several(copy(size, count))], rounds, budget=3)
    rates = run.percentiles(2 * 4 * size * count / timing.seconds / 1e9)
    return Row(SUITE, "copy", timing.candidate.name, "GB/s", f"{4 * size} bytes", *rates, rounds=len(timing.seconds))


def _several(candidate: run.Candidate) -> run.Candidate:
    """On a GPU ten calls in a row, so that none waits for Python."""
    return dataclasses.replace(candidate, calls=10) if accelerated() else candidate


def _multiplied(name: str, dtype: Any, precision: jax.lax.Precision, side: int, rounds: int) -> Row:
    count = 10
    (timing,) = run.time_all([_products(name, dtype, precision, side, count)], rounds, budget=3)
    rates = run.percentiles(count * 2.0 * side**3 / timing.seconds / 1e9)
    return Row(SUITE, "matrix product", name, "GFLOP/s", str(side), *rates, rounds=len(timing.seconds))


def _products(name: str, dtype: Any, precision: jax.lax.Precision, side: int, count: int) -> run.Candidate:
    """Each product takes the last one's result; entries stay of size one."""
    matrix = (jax.random.normal(jax.random.key(0), (side, side)) / side**0.5).astype(dtype)

    def once(_: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.matmul(x, matrix, precision=precision)

    step: Callable[[jax.Array], jax.Array] = jax.jit(
        lambda x: jax.lax.fori_loop(0, count, once, x), donate_argnums=(0,)
    )
    return run.Candidate(name, step, lambda: jnp.copy(matrix))
