"""diagonal_update's CUDA handlers in programs for an H200: one call for any number of leaves, no copy of a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from curvax import ffi
from curvax.kernels import Implementation
from curvax.kernels.diagonal_update import (
    AccumulateRule,
    DenominatorRule,
    DiagonalEstimate,
    UpdateRule,
    UpdateScalars,
    diagonal_accumulate,
    diagonal_update,
)
from tests.lowering.h200 import busiest_loop, compile_for_h200

LEAVES = 50
PARAMS = [jax.ShapeDtypeStruct((1000 + i, 3), jnp.bfloat16 if i % 2 else jnp.float32) for i in range(LEAVES)]
VECTOR = [jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for leaf in PARAMS]


@pytest.fixture(autouse=True)
def module() -> None:
    status = ffi.native_status("cuda")
    if not status.available:
        pytest.skip(status.reason)


def train(implementation: Implementation) -> Callable[..., Any]:
    """Twenty refreshes and steps with a gradient and a product that stay the same."""
    rule, mix = UpdateRule(DenominatorRule("floor", slope=0.05), beta1=0.9, clip=1.0), AccumulateRule(0.99)
    scalars = UpdateScalars(1.0, 1.0, 1e-8, 1.0, 0.1, -1e-3)

    def steps(params: Any, mean: Any, average: Any, gradient: Any) -> Any:
        def step(_: jax.Array, carry: Any) -> Any:
            params, mean, average = carry
            estimate = DiagonalEstimate((gradient,), "square")
            average, _, _ = diagonal_accumulate(mix, average, estimate, implementation=implementation)
            params, mean, _ = diagonal_update(
                rule, scalars, params, mean, average, gradient, implementation=implementation
            )
            return params, mean, average

        return jax.lax.fori_loop(0, 20, step, (params, mean, average))

    return steps


def test_a_step_is_one_call_for_each_op() -> None:
    step = busiest_loop(compile_for_h200(train("native"), PARAMS, VECTOR, VECTOR, VECTOR))
    calls = {kind: count for kind, count in step.items() if kind.startswith("custom-call")}
    assert calls == {"custom-call:curvax_diagonal_update": 1, "custom-call:curvax_diagonal_accumulate": 1}
    # Scalars alone; no vector is copied, so all is in place.
    assert step.total() <= 8
    reference = busiest_loop(compile_for_h200(train("reference"), PARAMS, VECTOR, VECTOR, VECTOR))
    assert reference.total() > LEAVES


def test_vmap_and_float64() -> None:
    with jax.enable_x64(True):
        leaves = [jax.ShapeDtypeStruct((3, 500), jnp.float64)] * 2
        compile_for_h200(jax.vmap(train("native")), leaves, leaves, leaves, leaves)


def test_block_means_are_written_out() -> None:
    def accumulate(average: Any, means: Any) -> Any:
        return diagonal_accumulate(
            AccumulateRule(0.9, root_mean_square=True), average, DiagonalEstimate((means,)), implementation="native"
        )

    means = [jax.ShapeDtypeStruct((leaf.shape[0], 1), jnp.float32) for leaf in VECTOR]
    compile_for_h200(accumulate, VECTOR, means)
