"""The C++ for CPUs in every instruction set that it is compiled for and this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from curvax import ffi

TESTS = Path(__file__).resolve().parents[1]
FILES = ("batched_cg", "batched_cholesky_solve", "dense_linalg", "diagonal_update", "gram_accumulate", "tree_cg")
# The values of every native op at small and odd sizes: what needs large ones is not about instructions.
TESTS_OF_VALUES = ("test_solutions", "test_outcomes", "test_rules_and_dtypes", "odd and Values")
TESTS_OF_FACTORS = tuple(
    f"{name} and float32" for name in ("test_eigenpairs and normal", "test_qr_factors", "test_triangular_solutions")
)
TILES = "test_lower_triangle and float and tile"
SELECTED = f"native and ({' or '.join(f'({name})' for name in (*TESTS_OF_VALUES, *TESTS_OF_FACTORS, TILES))})"


def run(level: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CURVAX_SIMD": level}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=TESTS.parent, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_narrower_instructions_give_the_values(level: str) -> None:
    status = ffi.native_status()
    if not status.available:
        pytest.skip(status.reason)
    levels = status.build["simd_levels"]
    if level not in levels[: levels.index(status.build["simd"])]:
        pytest.skip(f"this process runs {status.build['simd']} already")
    said = run(level, "-c", "from curvax import ffi; print(ffi.native_status().build['simd'])")
    assert said.stdout.strip() == level, said.stderr
    files = [str(TESTS / "kernels" / f"test_{name}.py") for name in FILES]
    done = run(level, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-k", SELECTED, *files)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout and " skipped" not in done.stdout


def test_a_level_that_there_is_not_is_refused() -> None:
    if not ffi.native_status().available:
        pytest.skip(ffi.native_status().reason)
    done = run("sse9", "-c", "from curvax import ffi; ffi.native_status()")
    assert done.returncode != 0
    assert 'CURVAX_SIMD is "sse9": set it to baseline, avx2 or avx512f' in done.stderr
