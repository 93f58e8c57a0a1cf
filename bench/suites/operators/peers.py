"""PyTorch packages in a process of their own, which computes a quantity whenever it is told to."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from bench.workloads import Workload

_WORKER = pathlib.Path(__file__).with_name("torch_worker.py")


@dataclasses.dataclass(frozen=True)
class Peer:
    """A package that computes the case.

    Attributes:
      name: of the package.
      step: computes it once, in its process.
    """

    name: str
    step: Callable[[Any], Any]


@contextlib.contextmanager
def started(python: pathlib.Path | None, case: str, work: Workload, size: int) -> Iterator[list[Peer]]:
    """The packages of that Python that have the case, until the context ends; none of no Python.

    Raises:
      RuntimeError: the process says nothing.
    """
    if python is None:
        yield []
        return
    process = _process(python, case, work, size)
    try:
        yield [Peer(name, _step(process, name)) for name in _answer(process)]
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(timeout=60)


def agreement(python: pathlib.Path, work: Workload, size: int) -> dict[str, Any]:
    """What laplace-torch makes of the workload (`torch_worker.agreement`)."""
    process = _process(python, "agreement", work, size)
    found = _answer(process)
    process.wait(timeout=60)
    return found


def _process(python: pathlib.Path, case: str, work: Workload, size: int) -> subprocess.Popen[str]:
    widths = [work.input_shape[0], *(shape[1] for shape in work.shapes[::2])]
    command = [str(python), str(_WORKER), case, json.dumps(widths), str(size)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def _step(process: subprocess.Popen[str], name: str) -> Callable[[Any], Any]:
    def step(carry: Any) -> Any:
        assert process.stdin is not None
        process.stdin.write(name + "\n")
        process.stdin.flush()
        _answer(process)
        return carry

    return step


def _answer(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise RuntimeError("the Python of the peers ended: does it have torch, curvlinops-for-pytorch, laplace-torch?")
    return json.loads(line)
