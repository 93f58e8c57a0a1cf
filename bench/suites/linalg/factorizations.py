"""Cholesky, solves, eigenvectors and QR of one matrix and of stacks, beside JAX's own on LAPACK."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import threadpoolctl

from bench import floors, run
from bench.schema import Row
from curvax.kernels import dense_linalg
from curvax.kernels.batched_cholesky_solve import batched_cholesky_solve

OURS = "curvax"
ALONE, FREE = "jax, LAPACK on one thread", "jax, LAPACK as it comes"
PRODUCT = "1024^3 matrix product"
# Matrices and their size. Beyond 1024 one is a second or more.
SIZES = (
    (1, 64), (16, 64), (256, 64), (4096, 64), (4096, 16), (1, 256), (64, 256), (1, 512), (8, 512), (1, 785), (1, 1024),
    (4, 1024), (1, 2048), (1, 4096),
)  # fmt: skip
_SIDE = 1024
# Rows from which LAPACK's eigenvectors and QR run on one thread alone: with more a call took 8 to 10 seconds from 785.
_LARGE = 2048
# Seconds of the timed rounds of a case.
_BUDGET = 5.0
# Operations of a call that is too short to be timed by itself.
_SHORT = 1e7


@dataclasses.dataclass(frozen=True)
class Operation:
    """What is done to a stack of matrices.

    Attributes:
      name: as rows print it.
      ours, lapack: on (matrices, right-hand sides).
      flops: of one matrix of a size, as LAPACK counts them.
    """

    name: str
    ours: Callable[[jax.Array, jax.Array], Any]
    lapack: Callable[[jax.Array, jax.Array], Any]
    flops: Callable[[int], float]


def _cho_solve(a: jax.Array, b: jax.Array) -> jax.Array:
    lower = jax.lax.linalg.cholesky(a, symmetrize_input=False)
    return jax.scipy.linalg.cho_solve((lower, True), b[..., None])[..., 0]


OPERATIONS = (
    Operation(
        "cholesky",
        lambda a, _: dense_linalg.cholesky(a),
        lambda a, _: jax.lax.linalg.cholesky(a, symmetrize_input=False),
        lambda n: n**3 / 3,
    ),
    # Ours refines once, and says how well: two more substitutions and two products with the matrix.
    Operation("solve", batched_cholesky_solve, _cho_solve, lambda n: n**3 / 3 + 2 * n**2),
    Operation(
        "eigh",
        lambda a, _: dense_linalg.eigh(a),
        lambda a, _: jax.lax.linalg.eigh(a, symmetrize_input=False),
        lambda n: 4 / 3 * n**3 + 8 / 3 * n**3 + 2 * n**3,
    ),
    Operation("qr", lambda a, _: dense_linalg.qr(a), lambda a, _: jnp.linalg.qr(a), lambda n: 8 / 3 * n**3),
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation on one stack."""

    operation: Operation
    count: int
    n: int
    dtype: str

    @property
    def name(self) -> str:
        """The row's case."""
        return f"{self.operation.name}, {self.dtype}"

    @property
    def title(self) -> str:
        """What `--only` searches."""
        return f"{self.name} [{self.count} x {self.n}]"

    def rows(self, suite: str, rounds: int) -> list[Row]:
        """Milliseconds of a call, and its rate beside that of a matrix product."""
        with jax.enable_x64(self.dtype == "float64"):
            timings = run.time_all(self._candidates(), rounds, budget=_BUDGET)
        x = f"{self.count} x {self.n}"
        results = run.rows(suite, self.name, x, timings[1:], metric="ms")
        peak = 2 * _SIDE**3 / 1e9 / timings[0].seconds
        for timing in timings[1:]:
            rate = self.count * self.operation.flops(self.n) / 1e9 / timing.seconds
            values, share = run.percentiles(rate), float(np.median(rate / peak))
            row = Row(suite, self.name, timing.candidate.name, "GFLOP/s", x, *values, rounds=len(rate))
            results.append(dataclasses.replace(row, ratio=share, baseline=PRODUCT))
        return results

    def _candidates(self) -> list[run.Candidate]:
        a, b = _operands(self.count, self.n, self.dtype)
        side, product = floors.square_matmul(_SIDE, self.dtype)
        ours, lapack = jax.jit(self.operation.ours), jax.jit(self.operation.lapack)
        jax.block_until_ready(lapack(a, b))  # loads LAPACK: before, there are no threads to hold
        threads = threadpoolctl.ThreadpoolController().select(user_api="blas")

        def limited(count: int) -> Callable[[Any], Any]:
            def step(_: Any) -> Any:
                for library in threads.lib_controllers:
                    library.set_num_threads(count)
                return jax.block_until_ready(lapack(a, b))

            return step

        results = [
            run.Candidate(PRODUCT, side, product),
            run.Candidate(ALONE, limited(1), lambda: None),
            run.Candidate(OURS, lambda _: jax.block_until_ready(ours(a, b)), lambda: None, baseline=ALONE, goal=1.0),
        ]
        if self.n < _LARGE or self.operation.name not in ("eigh", "qr"):
            free = run.Candidate(FREE, limited(len(os.sched_getaffinity(0))), lambda: None, baseline=ALONE)
            results.insert(2, free)
        calls = 20 if self.count * self.operation.flops(self.n) < _SHORT else 1
        return [results[0], *(dataclasses.replace(c, calls=calls) for c in results[1:])]


def cases(quick: bool) -> Iterator[Case]:
    """Every operation on every stack in float32, and single matrices in float64."""
    for operation in OPERATIONS:
        for count, n in SIZES[:1] if quick else SIZES:
            yield Case(operation, count, n, "float32")
        for n in () if quick else (256, 1024):
            yield Case(operation, 1, n, "float64")


def _operands(count: int, n: int, dtype: str) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    half = jnp.asarray(rng.standard_normal((count, n, n)) / np.sqrt(n), dtype)
    return half @ half.mT + jnp.eye(n, dtype=dtype), jnp.asarray(rng.standard_normal((count, n)), dtype)
