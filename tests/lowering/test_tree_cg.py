"""tree_cg's CUDA handlers in programs for an H200: how many launches, no copies, recorded into CUDA graphs."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from curvax import ffi
from curvax.kernels import Implementation
from curvax.kernels.tree_cg import cg_direction, cg_update, dots
from tests.lowering.h200 import busiest_loop, compile_for_h200, temp_bytes, thunks

LEAVES = 50
VECTOR = [jax.ShapeDtypeStruct((1000 + i, 3), jnp.float32) for i in range(LEAVES)]


@pytest.fixture(autouse=True)
def module() -> None:
    status = ffi.native_status("cuda")
    if not status.available:
        pytest.skip(status.reason)


def solve(implementation: Implementation) -> Callable[[Any, Any], Any]:
    """Conjugate gradients for a diagonal operator, which costs one kernel per leaf."""

    def conjugate_gradients(b: Any, diagonal: Any) -> Any:
        def iteration(carry: Any) -> Any:
            k, x, r, p, rr = carry
            q = [u * v for u, v in zip(diagonal, p, strict=True)]
            pq, pp, _ = dots([(p, q), (p, p), (q, q)], implementation=implementation)
            lam = jnp.float32(1e-3)
            alpha = rr / (pq + lam * pp)
            x, r, new = cg_update(alpha, x, p, r, q, lam=lam, implementation=implementation)
            return k + 1, x, r, cg_direction(new / rr, r, p, implementation=implementation), new

        (rr,) = dots([(b, b)], implementation=implementation)
        start = (jnp.int32(0), [jnp.zeros_like(leaf) for leaf in b], b, b, rr)
        return jax.lax.while_loop(lambda carry: (carry[0] < 20) & (carry[4] > 1e-6), iteration, start)[1:]

    return conjugate_gradients


def test_an_iteration_is_three_calls_and_no_copy_of_a_vector() -> None:
    compiled = compile_for_h200(solve("native"), VECTOR, VECTOR)
    iteration = busiest_loop(compiled)
    calls = {kind: count for kind, count in iteration.items() if kind.startswith("custom-call")}
    assert calls == {f"custom-call:curvax_{op}": 1 for op in ("dots", "cg_update", "cg_direction")}
    # The operator's kernels, and scalar arithmetic.
    assert iteration["fusion"] <= LEAVES + 4
    assert iteration["copy"] <= 1
    reference = busiest_loop(compile_for_h200(solve("reference"), VECTOR, VECTOR))
    assert reference.total() > 2 * iteration.total()


def test_scratch_memory_is_all_that_is_allocated() -> None:
    """In place: one vector for q, and 8 bytes per inner product and block."""
    vector = sum(4 * leaf.size for leaf in VECTOR)
    assert temp_bytes(compile_for_h200(solve("native"), VECTOR, VECTOR)) < 1.2 * vector


def test_an_iteration_is_one_cuda_graph() -> None:
    lines = thunks(solve("native"), VECTOR, VECTOR).splitlines()
    (loop,) = [i for i, line in enumerate(lines) if "kWhile" in line]
    body = lines[loop + 1 :]
    (graph,) = [line for line in body if "kCommandBuffer" in line]
    depth = len(graph) - len(graph.lstrip())
    calls = [line for line in body if re.search(r": kCustomCall ", line)]
    assert len(calls) == 3
    assert all(len(line) - len(line.lstrip()) > depth for line in calls)


def test_batched_and_float64() -> None:
    with jax.enable_x64(True):
        batched = [jax.ShapeDtypeStruct((3, 5000), jnp.float64)] * 2

        def products(a: Any, b: Any) -> Any:
            return jax.vmap(lambda u, v: dots([(u, v), (u, u)], implementation="native"))(a, b)

        text = compile_for_h200(products, batched, batched).as_text() or ""
    (call,) = [line for line in text.splitlines() if "custom-call(" in line]
    # Two products of two leaves of two blocks, 8 bytes each.
    assert re.search(r"\(f64\[3\]\S*, f64\[3\]\S*, u8\[3,64\]", call), call
