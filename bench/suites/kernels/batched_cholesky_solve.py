"""Many systems by Cholesky factorization, beside `jax.scipy.linalg` on the batch."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.batched_cg import systems
from bench.suites.kernels.case import REFERENCE, Case, implementations
from curvax.kernels import batched_cholesky_solve as op
from curvax.kernels.batched_cg.workloads import WORKLOADS, Workload

CHO_SOLVE = "jax.scipy cho_solve"
_FLOAT = 4
# Single systems as the row lane has them: rows of a Gauss-Newton step.
LARGE = (640, 1152, 1280, 2560)


def cases(quick: bool) -> Iterator[Case]:
    """The sizes of the CG workloads and single large ones; the condition does not matter here."""
    large = tuple(Workload(1, n, 100, "a row system") for n in LARGE)
    works = {(work.systems, work.n): work for work in reversed(WORKLOADS + large)}
    for work in list(reversed(works.values()))[: 1 if quick else None]:
        yield Case(
            f"batched_cholesky_solve, {work.systems} x {work.n}",
            f"{work.systems} systems",
            lambda work=work: _candidates(work),
            1,
            work.systems * (work.n + 2) * work.n * _FLOAT,
            work.systems * work.n**2 * (work.n / 3 + 8),
        )


def _candidates(work: Workload) -> list[run.Candidate]:
    matrices, rhs = _row_system(work.n) if work.n in LARGE else systems(work)

    @jax.jit
    def peer(a: jax.Array, b: jax.Array) -> jax.Array:
        # Factor and solve alone: no refinement, no residual, no outcome.
        return jax.scipy.linalg.cho_solve((jax.scipy.linalg.cholesky(a, lower=True), True), b[..., None])[..., 0]

    results = [run.Candidate(CHO_SOLVE, lambda _: peer(matrices, rhs), lambda: rhs)]
    for name in implementations((op.BATCHED_CHOLESKY_SOLVE,), matrices, rhs):
        solve = jax.jit(partial(op.batched_cholesky_solve, implementation=name))
        goal = None if name == REFERENCE else 1.0
        step = lambda _, solve=solve: solve(matrices, rhs).value  # noqa: E731
        results.append(run.Candidate(name, step, lambda: rhs, baseline=CHO_SOLVE, goal=goal))
    return results


def _row_system(n: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    half = jnp.asarray(rng.standard_normal((1, n, n)) / np.sqrt(n), jnp.float32)
    return half @ half.swapaxes(-1, -2) + jnp.eye(n, dtype=jnp.float32), jnp.asarray(
        rng.standard_normal((1, n)), jnp.float32
    )
