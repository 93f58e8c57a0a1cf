"""Every method on meshes of eight devices beside one device: the same numbers, nothing gathered, memory per device.

The devices are the host's own, so times would say nothing. A process of its own (`worker`) takes steps of a method in
float64 on every layout, with explicit and with automatic axes, whole and in microbatches.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bench.schema import Row
from bench.suites.scale.methods import METHODS

SUITE = "scale"
ONE_DEVICE = "one device"
DIFFERENCE, GATHERS, MEMORY = "relative difference", "whole all-gathers", "temp bytes per device"
_DEVICES = 8
# How good LLVM's code is changes neither numbers nor what is gathered.
_QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
_ROOT = pathlib.Path(__file__).parents[3]


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, method by method.

    Args:
      quick: the first method alone.
      only: substring of the names of methods to run.
    """
    for name in list(METHODS)[: 1 if quick else None]:
        if only in name:
            yield [row for entry in measured(name) for row in _rows(name, entry)]


def measured(*arguments: str) -> list[dict[str, str | float]]:
    """What a worker measures; each entry has a layout, and one number per metric.

    Raises:
      RuntimeError: the worker failed.
    """
    devices = f"--xla_force_host_platform_device_count={_DEVICES} {_QUICK}"
    done = subprocess.run(
        [sys.executable, "-m", "bench.suites.scale.worker", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {devices}"},
    )
    if done.returncode:
        raise RuntimeError(f"the steps on {_DEVICES} devices failed: {done.stderr[-3000:]}")
    return [json.loads(line) for line in done.stdout.splitlines()]


def _rows(name: str, entry: dict[str, str | float]) -> Iterator[Row]:
    layout = str(entry["layout"])
    for metric in (DIFFERENCE, GATHERS, MEMORY):
        number = float(entry[metric])
        ratio = number / float(entry["bytes on one device"]) if metric == MEMORY else None
        baseline = ONE_DEVICE if metric == MEMORY else None
        yield Row(SUITE, name, "curvax", metric, layout, *3 * [number], ratio=ratio, baseline=baseline)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A line per method, a column per layout: difference, gathers, memory as a part of one device's."""
    layouts = list(dict.fromkeys(row.x for row in rows))
    yield f"Each cell: {DIFFERENCE}; {GATHERS}; {MEMORY} over those of {ONE_DEVICE}."
    yield ""
    yield f"| method | {' | '.join(layouts)} |"
    yield "|---" * (len(layouts) + 1) + "|"
    cells = {(row.case, row.x, row.metric): row for row in rows}
    for name in dict.fromkeys(row.case for row in rows):
        yield f"| {name} | {' | '.join(_cell(cells, name, layout) for layout in layouts)} |"


def _cell(cells: dict[tuple[str, str, str], Row], name: str, layout: str) -> str:
    if (name, layout, DIFFERENCE) not in cells:
        return ""
    difference, gathers, memory = (cells[name, layout, metric] for metric in (DIFFERENCE, GATHERS, MEMORY))
    return f"{difference.p50:.0e}; {gathers.p50:.0f}; {memory.ratio or 0:.2f}"
