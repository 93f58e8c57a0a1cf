"""What the references of the dense factorizations do to LAPACK's threads, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from curvax import ffi

SCRIPT = """
import json, sys
import jax, jax.numpy as jnp
import numpy, scipy.linalg.cython_lapack, threadpoolctl
from curvax.kernels.batched_cholesky_solve import batched_cholesky_solve
from curvax.kernels.dense_linalg import eigh
from curvax.solvers.dense import solve_dense

def threads():
    found = threadpoolctl.threadpool_info()
    return [(lib["num_threads"], "numpy.libs" in lib["filepath"]) for lib in found if lib["user_api"] == "blas"]

threadpoolctl.threadpool_limits(3, "blas")
before = threads()
name = sys.argv[1]
{
    "eigh": lambda: eigh(jnp.eye(3), implementation="reference"),
    "solve": lambda: batched_cholesky_solve(jnp.eye(3), jnp.ones(3), implementation="reference"),
    "direct": lambda: solve_dense(jnp.eye(3), jnp.ones(3), jnp.ones(()), "reference"),
    "native": lambda: (eigh(jnp.eye(3)), solve_dense(jnp.eye(3), jnp.ones(3), jnp.ones(()))),
}[name]()
print(json.dumps([before, threads()]))
"""
VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def threads(name: str, **variables: str) -> tuple[list[tuple[int, bool]], list[tuple[int, bool]]]:
    """(threads, whether NumPy's wheel brings it) of each BLAS library before and after a call."""
    environment = {k: v for k, v in os.environ.items() if k not in VARIABLES} | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, name], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["eigh", "solve", "direct"])
def test_references_hold_its_threads_to_one(name: str) -> None:
    """All but those of the library that is NumPy's alone, which JAX never calls."""
    before, after = threads(name)
    assert [n for n, _ in before] == [3] * len(before)
    assert after == [[3 if numpy else 1, numpy] for _, numpy in before]


def test_native_forms_leave_them() -> None:
    if not ffi.native_status().available:
        pytest.skip(ffi.native_status().reason)
    before, after = threads("native")
    assert before == after


@pytest.mark.parametrize("variable", VARIABLES)
def test_who_sets_a_variable_decides(variable: str) -> None:
    before, after = threads("eigh", **{variable: "2"})
    assert before == after
