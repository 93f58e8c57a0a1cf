"""Tidy rows: one measurement each, written as JSON lines, read back by anything."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess

import jax

RESULTS = pathlib.Path(__file__).parent / "results"
_PACKAGES = ("curvax", "jax", "jaxlib", "numpy", "optax", "python-somax")


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      suite: "steps", "plan", "kernels".
      case: what is computed, on what ("sgn_ce, 20 CG iterations, mlp").
      provider: who computes it ("curvax", "python-somax", "floor: 20 products + 1 gradient").
      metric: what was measured, with its unit ("ms/step", "GFLOP/s", "GB/s", "MiB temp").
      x: the independent variable, as text ("batch 128", "270000 floats").
      p20, p50, p80: percentiles over the rounds; all three equal where there is nothing to repeat.
      ratio: median over the rounds of this provider's time over the baseline's time in the same round, below 1 where
        it is faster; for other metrics the quotient of the medians. `None` for the baseline and where there is none.
      baseline: the provider that `ratio` refers to.
      goal: the largest ratio aimed at, or `None`.
      rounds: how many interleaved rounds were timed.
      device: what it ran on.
      versions: package versions, "name version" joined by commas.
      commit: of the checkout; "+" if it had local changes, "none" outside a repository.
      date: UTC.
    """

    suite: str
    case: str
    provider: str
    metric: str
    x: str
    p20: float
    p50: float
    p80: float
    ratio: float | None = None
    baseline: str | None = None
    goal: float | None = None
    rounds: int = 1
    device: str = dataclasses.field(default_factory=lambda: device())
    versions: str = dataclasses.field(default_factory=lambda: versions())
    commit: str = dataclasses.field(default_factory=lambda: commit())
    date: str = dataclasses.field(default_factory=lambda: datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"))

    @property
    def meets_goal(self) -> bool | None:
        """Whether the ratio is within the goal; `None` without a goal."""
        return None if self.goal is None or self.ratio is None else self.ratio <= self.goal


@functools.cache
def device() -> str:
    """The accelerator's name, or the processor's with its number of usable cores."""
    first = jax.devices()[0]
    if first.platform != "cpu":
        return f"{first.device_kind} x{jax.device_count()}"
    return f"cpu: {_processor()}, {len(os.sched_getaffinity(0))} cores"


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


@functools.cache
def versions() -> str:
    """Versions of the packages that take part."""
    records = [f"python {platform.python_version()}"]
    for name in _PACKAGES:
        try:
            records.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(records)


@functools.cache
def commit() -> str:
    """The checkout's short commit, "+" appended if it has local changes."""
    head = _git("rev-parse", "--short", "HEAD")
    if not head:
        return "none"
    return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")


def _git(*words: str) -> str:
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def write(rows: list[Row], suite: str, folder: pathlib.Path = RESULTS) -> pathlib.Path:
    """Writes `<folder>/<suite>.jsonl`, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}.jsonl"
    path.write_text("".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows))
    return path


def update(rows: list[Row], suite: str, folder: pathlib.Path = RESULTS, *, one_by_one: bool = False) -> pathlib.Path:
    """Writes the rows in the place of those of the same cases and x, behind all other rows of the file.

    With `one_by_one` rows of other providers of these cases stay.
    """

    def replaced(row: Row) -> tuple[str, ...]:
        return (row.case, row.x, *((row.provider,) if one_by_one else ()))

    path, gone = folder / f"{suite}.jsonl", {replaced(row) for row in rows}
    kept = [row for row in read(path) if replaced(row) not in gone] if path.exists() else []
    return write([*kept, *rows], suite, folder)


def read(path: pathlib.Path) -> list[Row]:
    """Rows of a file written by `write`."""
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


def table(rows: list[Row]) -> str:
    """Rows as text, one block per case."""
    head = f"  {'provider':<44}{'metric':<10}{'p20':>10}{'p50':>10}{'p80':>10}{'ratio':>8}  baseline"
    lines: list[str] = []
    previous = ("", "")
    for row in rows:
        if (row.case, row.x) != previous:
            previous = (row.case, row.x)
            lines += ["", f"{row.case} [{row.x}]", head]
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        goal = {None: "", True: f" (goal {row.goal}: met)", False: f" (goal {row.goal}: missed)"}[row.meets_goal]
        lines.append(
            f"  {row.provider:<44}{row.metric:<10}{row.p20:>10.4g}{row.p50:>10.4g}{row.p80:>10.4g}{ratio:>8}"
            f"  {row.baseline or ''}{goal}"
        )
    return "\n".join(lines)
