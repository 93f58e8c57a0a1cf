"""One device equals eight: steps on meshes with explicit and automatic axes, whole and in pieces."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.suites.scale import DIFFERENCE, measured

# Each method on a layout that differs from those of the others: compiling for eight devices takes seconds.
COVERING = (
    "gauss_newton: FSDP x tensor, explicit, pieces",
    "egn_ce: tensor, explicit",
    "kfac: data, explicit",
    "layerwise_gn: FSDP x tensor, automatic",
    "soap: FSDP, explicit",
)
PROGRAM = Path(__file__).with_name("explicit_axes.py")


@pytest.mark.slow
def test_one_device_equals_eight() -> None:
    entries = measured(*COVERING)
    assert len(entries) == len(COVERING)
    for entry in entries:
        what = f"{entry['method']}, {entry['layout']}"
        assert float(entry[DIFFERENCE]) < 1e-9, what
        assert entry["sharded as before"], what
        assert not entry["compiled again"] or "automatic" in what, what


@pytest.mark.slow
def test_explicit_axes_in_models_and_in_what_stands_beside_a_step() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
