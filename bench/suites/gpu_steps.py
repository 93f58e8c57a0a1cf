"""Whole steps with each backend against the reference backend: what the kernels are worth inside a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import curvax
from bench import run
from bench.schema import Row
from bench.workloads import MLP, WIDE, Workload
from curvax.kernels import Backend

SUITE = "gpu_steps"
_REFERENCE = "backend=reference"
_BACKENDS: tuple[Backend, ...] = ("reference", "native", "pallas", "triton")


def _methods(preset: str, work: Workload, backend: Backend) -> Any:
    if preset == "sgn_ce":
        return curvax.sgn_ce(predict_fn=work.predict, lam0=0.1, tol=0.0, maxiter=20, backend=backend)
    if preset == "egn_ce":
        return curvax.egn_ce(predict_fn=work.predict, lam0=0.1, backend=backend)
    if preset == "sophia_g":
        return curvax.sophia_g(predict_fn=work.predict, learning_rate=1e-4, eval_every_k=10, backend=backend)
    loss = curvax.losses.SoftmaxCrossEntropy()
    return curvax.adahessian(predict_fn=work.predict, loss=loss, learning_rate=1e-4, backend=backend)


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case: backends whose kernels the plan really takes, beside the reference.

    Args:
      quick: one small case, few rounds.
      only: substring of the case names to run.
    """
    presets = ("sgn_ce", "egn_ce", "sophia_g", "adahessian")
    cases = [(p, w, 128) for w in (MLP, WIDE) for p in presets][: 1 if quick else None]
    for preset, work, batch in cases:
        case = f"{preset}, {work.name}"
        if only in case:
            candidates = list(_candidates(preset, work, batch))
            timings = run.time_all(candidates, 2 if quick else 20, budget=10)
            yield run.rows(SUITE, case, f"batch {batch}", timings)


def _candidates(preset: str, work: Workload, size: int) -> Iterator[run.Candidate]:
    batch = work.batch(size)
    for backend in _BACKENDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ops without this backend
            method = _methods(preset, work, backend)
            choices = method.plan_for(work.params(), batch).choices
        if backend != "reference" and all(c.implementation != backend for c in choices):
            continue
        baseline = None if backend == "reference" else _REFERENCE
        yield run.Candidate(f"backend={backend}", _step(method, batch), _carry(method, work), 10, baseline)


def _step(method: Any, batch: dict[str, jax.Array]) -> Any:
    key = jax.random.key(0)

    def step(carry: Any, data: Any) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            params, state, info = method.step(carry[0], data, carry[1], key)
        return params, state, info["loss"]

    jitted = jax.jit(step, donate_argnums=(0,))
    return lambda carry: jitted(carry, batch)


def _carry(method: Any, work: Workload) -> Any:
    def carry() -> Any:
        params = work.params()
        return params, method.init(params), jnp.zeros(())

    return carry
