"""Factorizations in flight at the same time end, whatever runs beside them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

UPDATES = 25
# Three runs one after another, which share the time to compile.
SEEDS = (0, 1, 2)
# They take half a minute; one that stands still would stand for ever.
PATIENCE = 600


def test_nothing_waits_for_ever() -> None:
    """Batched LAPACK calls, several of them at once, wait for each other's share of XLA's few threads."""
    script = Path(__file__).with_name("factorize_at_once.py")
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script), str(UPDATES), *map(str, SEEDS)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        try:
            done, errors = process.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            done, _ = process.communicate()
            pytest.fail(f"stands still; done so far: {done.splitlines()}")
    assert process.returncode == 0, errors[-3000:]
    assert done.splitlines()[-1] == f"{SEEDS[-1]} references of two models"
