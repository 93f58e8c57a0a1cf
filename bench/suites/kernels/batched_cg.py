"""Many systems by conjugate gradients, beside the vmapped `jax.scipy` solver."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations
from curvax.kernels import batched_cg
from curvax.kernels.batched_cg.workloads import WORKLOADS, Workload

JAX_CG = "vmapped jax.scipy CG"
_RTOL = 1e-5
_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """Every workload."""
    for work in WORKLOADS[:1] if quick else WORKLOADS:
        yield Case(
            f"batched_cg, {work.name}",
            f"{work.systems} systems",
            lambda work=work: _candidates(work),
            1,
            work.systems * (work.n + 2) * work.n * _FLOAT,
        )


def systems(work: Workload) -> tuple[jax.Array, jax.Array]:
    """Matrices with the workload's condition and right-hand sides; at most 64 matrices are distinct."""
    rng = np.random.default_rng(0)
    distinct = min(work.systems, 64)
    q, _ = np.linalg.qr(rng.standard_normal((distinct, work.n, work.n)))
    a = np.einsum("bij,j,bkj->bik", q, np.geomspace(1, 1 / work.condition, work.n), q)
    matrices = np.tile(a, (-(-work.systems // distinct), 1, 1))[: work.systems]
    rhs = rng.standard_normal((work.systems, work.n))
    return jnp.asarray(matrices, jnp.float32), jnp.asarray(rhs, jnp.float32)


def _candidates(work: Workload) -> list[run.Candidate]:
    matrices, rhs = systems(work)
    maxiter = 10 * work.n

    def peer(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.scipy.sparse.linalg.cg(lambda v: a @ v, b, tol=_RTOL, maxiter=maxiter)[0]

    results = [_candidate(JAX_CG, jax.jit(jax.vmap(peer)), matrices, rhs)]
    for name in implementations((batched_cg.BATCHED_CG,), matrices, rhs):
        solve = partial(batched_cg.batched_cg, tol=_RTOL, maxiter=maxiter, implementation=name)
        goal = None if name == REFERENCE else (1 / 5 if work == WORKLOADS[0] else 1.0)
        results.append(_candidate(name, jax.jit(lambda a, b, solve=solve: solve(a, b).value), matrices, rhs, goal))
    return results


def _candidate(
    name: str, solve: jax.stages.Wrapped, matrices: jax.Array, rhs: jax.Array, goal: float | None = None
) -> run.Candidate:
    """Solves the same systems at every call; the carry is the last solution."""
    baseline = None if name == JAX_CG else JAX_CG
    return run.Candidate(name, lambda _: solve(matrices, rhs), lambda: rhs, baseline=baseline, goal=goal)
