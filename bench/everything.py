"""`python -m bench all [--quick]`: every suite that this machine can run, each in a process of its own."""

from __future__ import annotations

import argparse
import importlib.util
import pathlib
import subprocess
import sys
import time
from collections.abc import Sequence

from bench import schema

# What a suite needs beyond the `bench` extra, or a machine that it is for.
PACKAGES = {"vmc": "netket"}
ELSEWHERE = ("gpu_compile", "gpu_steps", "limits")


def main(suites: Sequence[str], arguments: Sequence[str]) -> int:
    """Runs them one after another and prints how each ended; the exit status is the number of those that failed."""
    parser = argparse.ArgumentParser(prog="python -m bench all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases, few rounds")
    parser.add_argument("--out", type=pathlib.Path, default=schema.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    failed = 0
    for suite in (name for name in suites if name not in ELSEWHERE):
        missing = PACKAGES.get(suite)
        if missing is not None and importlib.util.find_spec(missing) is None:
            print(f"{suite:<12}left out: {missing} is not installed", flush=True)
            continue
        command = [sys.executable, "-m", "bench", suite, "--out", str(chosen.out), *["--quick"] * chosen.quick]
        begin = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        seconds, failed = time.perf_counter() - begin, failed + bool(done.returncode)
        print(f"{suite:<12}{seconds:6.0f} s  {_last_line(done)}", flush=True)
    return failed


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stderr if done.returncode else done.stdout
    lines = [line for line in text.splitlines() if line.strip()]
    return ("FAILED: " if done.returncode else "") + (lines[-1] if lines else "")
