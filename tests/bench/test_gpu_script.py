"""`bench/gpu.sh` with a stand-in for Python: which parts run, and that one that fails or hangs leaves the others."""

from __future__ import annotations

import os
import pathlib
import re
import subprocess
import tarfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PARTS = {
    "1": ("doctor", "tests"),
    "2": ("calibrate", "limits", "kernels", "gpu_steps"),
    "3": ("layerwise", "physics", "vmc"),
}
CUT = ("limits", "kernels", "gpu_steps", "layerwise", "physics", "vmc")

# Says what it is asked for; fails, or is stopped as by the time limit, where its part is the one that STANDIN_BREAKS.
STANDIN = """#!/usr/bin/env bash
case "$*" in
  "-m pip"*) name=install; while [[ $1 != --target ]]; do shift; done; mkdir -p "$2/curvax" ;;
  "-m pytest"*) name=tests ;;
  "-m curvax "*) name=$3 ;;
  "-m bench.summary"*) name=summary ;;
  "-m bench "*) name=$3 ;;
  *) name=unknown ;;
esac
echo "stand-in for $name"
[[ $name == "${STANDIN_BREAKS:-}" ]] && exit "${STANDIN_STATUS:-3}"
exit 0
"""


@pytest.fixture
def run(tmp_path: pathlib.Path):
    """Runs the script with the stand-in; answers (exit status, printed text, names of the logs that came back)."""
    standin = tmp_path / "python"
    standin.write_text(STANDIN)
    standin.chmod(0o755)
    out = tmp_path / "out"

    def call(parts: str = "123", **settings: str) -> tuple[int, str, set[str]]:
        environment = os.environ | {"PYTHON": str(standin), "OUT": str(out)} | settings
        command = ["bash", str(ROOT / "bench/gpu.sh"), "cpu", parts]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        with tarfile.open(out / "logs.tgz") as logs:
            return done.returncode, done.stdout, {pathlib.Path(n).stem for n in logs.getnames() if n.endswith(".log")}

    return call


@pytest.mark.parametrize("parts", ["1", "2", "3", "123"])
def test_each_part_can_be_run_alone(run, parts):
    status, text, logs = run(parts)
    assert status == 0 and logs == {"install", *(name for part in parts for name in PARTS[part])}
    assert "exit 0" in text and "failed" not in text


@pytest.mark.parametrize("name", ["install", *(name for part in PARTS.values() for name in part)])
def test_a_part_that_fails_is_named_and_the_others_run(run, name):
    status, text, logs = run(STANDIN_BREAKS=name)
    assert status == 1 and f"failed: {name} " in text
    assert logs == {"install", *(each for part in PARTS.values() for each in part)}


@pytest.mark.parametrize("name", ["tests", *CUT])
def test_a_measurement_that_is_cut_off_is_no_failure_and_tests_that_are_cut_off_are(run, name):
    # 124: what `timeout` answers for a command that it stopped.
    status, text, _ = run(STANDIN_BREAKS=name, STANDIN_STATUS="124")
    assert (status == 0) == (name in CUT) and "exit 124" in text


def test_the_parts_stay_below_four_minutes():
    script = (ROOT / "bench/gpu.sh").read_text()
    limits = {name: int(seconds) for name, seconds in re.findall(r" part (\w+) (\d+)", script)}
    for part, names in PARTS.items():
        assert sum(limits[name] for name in names) <= 240, part
