"""Several processes train as one, and go on where a lost one has ended the others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "multihost"


def run(out: Path, processes: int, *more: str) -> subprocess.CompletedProcess[str]:
    words = ["--processes", str(processes), "--steps", "7", "--out", str(out), *more]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, EXAMPLE, *words], capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.mark.slow
def test_a_lost_process_ends_the_others_and_one_goes_on_to_the_parameters_of_one(tmp_path: Path) -> None:
    lost = run(tmp_path / "lost", 2, "--die-at", "5")
    assert lost.returncode == 1
    assert "process 1 ended with code -9, and the others with it" in lost.stderr
    assert run(tmp_path / "lost", 1).returncode == 0
    assert run(tmp_path / "alone", 1).returncode == 0
    (step, params, _), (_, alone, _) = (
        pickle.loads((tmp_path / name / "checkpoint.pickle").read_bytes()) for name in ("lost", "alone")
    )
    assert step == 7
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
