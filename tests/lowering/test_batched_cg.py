"""The Mosaic kernel of batched_cg compiles for an H200, through ptxas, as one launch that copies no matrix."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from curvax.kernels import strict_backend
from curvax.kernels.batched_cg import BatchedSolution, batched_cg
from tests.lowering.h200 import compile_for_h200, custom_calls, kernel_counts, temp_bytes


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _solve(a: Any, b: Any, x0: Any = None, diagonal: Any = None, tol: Any = 1e-5) -> BatchedSolution:
    return batched_cg(a, b, x0, diagonal=diagonal, tol=tol, implementation="pallas")


def _launches(compiled: jax.stages.Compiled) -> int:
    return sum(count for name, count in custom_calls(compiled).items() if "mosaic" in name)


@pytest.mark.parametrize("systems", [1, 1024])
@pytest.mark.parametrize("n", [8, 64, 96, 128, 232])
def test_one_launch_and_no_copy_of_a_matrix(systems: int, n: int) -> None:
    vector = _array(systems, n)
    compiled = compile_for_h200(_solve, _array(systems, n, n), vector, vector, vector)
    assert _launches(compiled) == 1
    # The whole solve is no loop of XLA's.
    assert list(kernel_counts(compiled)) == ["ENTRY"]
    # The preconditioner, a tolerance and a limit per system, each rounded up to 256 bytes.
    assert temp_bytes(compiled) <= 2 * 4 * systems * n + 2 * 4 * systems + 2048


@pytest.mark.parametrize("n", [1, 33, 100, 231])
def test_other_sizes_are_padded(n: int) -> None:
    compiled = compile_for_h200(_solve, _array(16, n, n), _array(16, n))
    assert _launches(compiled) == 1
    assert temp_bytes(compiled) <= 1.1 * 16 * 4 * (n + 7) ** 2 + 2**13


@pytest.mark.parametrize("n", [8, 64, 100, 232])
def test_bfloat16_matrices(n: int) -> None:
    compiled = compile_for_h200(_solve, _array(16, n, n, dtype=jnp.bfloat16), _array(16, n))
    assert _launches(compiled) == 1


def test_one_matrix_for_many_right_hand_sides() -> None:
    compiled = compile_for_h200(_solve, _array(1, 3, 64, 64), _array(500, 3, 64))
    assert _launches(compiled) == 1
    assert temp_bytes(compiled) < 4 * 64 * 64 * 3


def test_vmap_is_one_launch() -> None:
    batched = jax.vmap(lambda a, b, tol: _solve(a, b, tol=tol), (None, 0, 0))
    compiled = compile_for_h200(batched, _array(3, 64, 64), _array(500, 3, 64), _array(500))
    assert _launches(compiled) == 1
    assert temp_bytes(compiled) < 4 * 64 * 64 * 3


def test_auto_keeps_the_reference() -> None:
    """Nobody has timed the kernel on a GPU: it runs when asked for by name."""
    with strict_backend():
        compiled = compile_for_h200(partial(batched_cg, tol=1e-5), _array(4, 64, 64), _array(4, 64))
    assert _launches(compiled) == 0
