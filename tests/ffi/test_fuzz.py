"""Random calls of the native handlers, in a process of its own: a crash there fails one test and not the run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from curvax import ffi

CALLS = 120


@pytest.mark.parametrize("seed", [0, 1])
def test_random_calls_are_answered_or_refused(seed: int) -> None:
    status = ffi.native_status()
    if not status.available:
        pytest.skip(status.reason)
    script = Path(__file__).with_name("fuzz.py")
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(script), str(seed), str(CALLS)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    answered, refused = map(int, done.stdout.split())
    assert answered > CALLS / 3 and refused > CALLS / 6
