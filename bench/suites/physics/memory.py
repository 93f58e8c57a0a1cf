"""What a step at defaults takes of the machine's memory where there are many points and parameters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator

from bench.schema import Row

POINTS, WIDTHS = 10_000, (2, 156, 156, 156, 1)
"""49,609 parameters; explicit rows in float64 are 4 GB, their Gram matrix 800 MB."""
CASE, GIB = "memory of gauss_newton steps, 2-D Poisson", "GiB, peak of the process"
_LIMIT = 2e9
_SCRIPT = """
import json, sys, time
import jax, jax.numpy as jnp
import curvax
from bench.suites.physics import steps

def peak():
    # Not getrusage: its peak is that of the process which started this one, if that was larger.
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return 1024 * int(line.split()[1])

points, *widths = json.loads(sys.argv[1])
jax.config.update("jax_enable_x64", True)
data = steps.batch(points * 9 // 10, points // 10)
params = steps.parameters(tuple(widths))
terms = curvax.Terms(interior=curvax.Term(steps.laplacian), boundary=curvax.Term(steps.values))
before = peak()
method = curvax.gauss_newton(loss=terms)
state, step = method.init(params), jax.jit(method.step)
for _ in range(3):
    begin = time.perf_counter()
    params, state, info = step(params, data, state)
    jax.block_until_ready(params)
    seconds = time.perf_counter() - begin
print(json.dumps([peak(), before, seconds, bool(info["accepted"])]))
"""


def memory_rows(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """The peak of a fresh process that takes three steps, over two gigabytes, and the time of the third.

    Args:
      suite: the rows' suite.
      quick: few points and parameters.
      only: substring of the case names to run.
    """
    if only not in CASE:
        return
    points, widths = (500, (2, 16, 16, 1)) if quick else (POINTS, WIDTHS)
    peak, before, seconds = measured(points, widths)
    x = f"{points} points, {'-'.join(map(str, widths))}"
    gib, start = peak / 2**30, before / 2**30

    def row(metric: str, value: float, ratio: float | None = None) -> Row:
        baseline, goal = (None, None) if ratio is None else ("2 GB", 1.0)
        return Row(suite, CASE, "gauss_newton", metric, x, value, value, value, ratio, baseline, goal)

    yield [row(GIB, gib, peak / _LIMIT), row(f"{GIB}, before the first step", start), row("ms/step", 1e3 * seconds)]


def measured(points: int, widths: tuple[int, ...]) -> tuple[float, float, float]:
    """(bytes at the peak, bytes before the first step, seconds of the third)."""
    command = [sys.executable, "-c", _SCRIPT, json.dumps([points, *widths])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process that was measured failed: {done.stderr[-2000:]}")
    peak, before, seconds, _ = json.loads(done.stdout.splitlines()[-1])
    return peak, before, seconds
