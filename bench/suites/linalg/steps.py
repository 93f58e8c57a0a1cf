"""Steps that factorize, in a process per setting of LAPACK's threads, all of them interleaved."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from bench import run
from bench.schema import Row
from bench.suites.linalg.worker import STEPS

UNSET = "OPENBLAS_NUM_THREADS unset"
BEST = "the best setting of OPENBLAS_NUM_THREADS"
_VARIABLE = "OPENBLAS_NUM_THREADS"
_SETTINGS = ("1", "2")
_GOAL = 1.05
# Steps of one turn.
_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Case:
    """One step, with so many other processes that never rest."""

    step: str
    busy: int

    @property
    def name(self) -> str:
        """The row's case."""
        return self.step

    @property
    def x(self) -> str:
        """What runs beside."""
        return "alone" if self.busy == 0 else f"beside {self.busy} busy processes"

    @property
    def title(self) -> str:
        """What `--only` searches."""
        return f"{self.name} [{self.x}]"

    def rows(self, suite: str, rounds: int) -> list[Row]:
        """Milliseconds of a step; the goal is over the best setting of the same rounds."""
        settings: dict[str, str | None] = {UNSET: None, **{f"{_VARIABLE}={n}": n for n in _SETTINGS}}
        with contextlib.ExitStack() as stack:
            workers = {name: stack.enter_context(Worker(self.step, value)) for name, value in settings.items()}
            for _ in range(self.busy):
                stack.enter_context(_busy())
            seconds = _interleaved(workers, rounds)
        medians = {name: float(np.median(times)) for name, times in seconds.items() if name != UNSET}
        best = min(medians, key=lambda name: medians[name])
        results = []
        for name, own in seconds.items():
            row = Row(suite, self.name, name, "ms/step", self.x, *run.percentiles(own * 1e3), rounds=rounds)
            if name == UNSET:
                ratio = float(np.median(own / seconds[best]))
                row = dataclasses.replace(row, ratio=ratio, baseline=best, goal=_GOAL)
            results.append(row)
        return results


class Worker:
    """A process that makes steps when it is told to."""

    def __init__(self, step: str, threads: str | None):
        environment = {k: v for k, v in os.environ.items() if k != _VARIABLE}
        if threads is not None:
            environment[_VARIABLE] = threads
        command = [sys.executable, "-W", "ignore", "-m", "bench.suites.linalg.worker", step]
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Worker:
        self.steps(2)
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()

    def steps(self, count: int) -> float:
        """Seconds of one of `count` steps in turn, on average."""
        if self._process.stdin is None or self._process.stdout is None:
            raise AssertionError("a worker is asked and answers through pipes.")
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return float(np.mean(json.loads(self._process.stdout.readline())))


def cases(quick: bool) -> Iterator[Case]:
    """Every step alone and beside two busy processes."""
    for step in tuple(STEPS)[: 1 if quick else None]:
        yield Case(step, 0)
        if not quick:
            yield Case(step, 2)


def _interleaved(workers: dict[str, Worker], rounds: int) -> dict[str, np.ndarray]:
    shuffle, names = random.Random(0), list(workers)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in shuffle.sample(names, len(names)):
            seconds[name].append(workers[name].steps(_STEPS))
    return {name: np.asarray(times) for name, times in seconds.items()}


@contextlib.contextmanager
def _busy(command: Sequence[str] = (sys.executable, "-c", "while True: pass")) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        yield
    finally:
        process.kill()
        process.wait()
