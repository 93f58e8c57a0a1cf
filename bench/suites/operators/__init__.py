"""Curvature outside of a step beside the same written by hand in JAX, and beside PyTorch packages on the same network.

    python -m bench operators                                 curvax and hand-written JAX, interleaved
    python -m bench operators --peer-python PATH/bin/python   and curvlinops, laplace-torch, in a process of their own

The Python of the peers has torch, curvlinops-for-pytorch and laplace-torch; its rows are timed by the same rounds, a
process beside this one that waits for its turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

from bench import run
from bench.schema import Row
from bench.suites.operators import peers
from bench.suites.operators.quantities import CASES, Case
from bench.workloads import MLP, SMALL

SUITE = "operators"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beyond the options of all suites.

    Attributes:
      peer_python: the Python that has the peers; `None` for none.
    """

    peer_python: pathlib.Path | None = None

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Adds the option to a command line."""
        group = parser.add_argument_group("operators")
        group.add_argument("--peer-python", type=pathlib.Path, help="a Python with curvlinops and laplace-torch")

    @staticmethod
    def of(arguments: argparse.Namespace) -> Options:
        """From a parsed command line."""
        return Options(arguments.peer_python)

    @property
    def some(self) -> bool:
        """Whether only some of the contenders run: rows of peers stay where there are none to run."""
        return self.peer_python is None


def run_suite(quick: bool = False, only: str = "", options: Options | None = None) -> Iterator[list[Row]]:
    """Rows, quantity by quantity.

    Args:
      quick: a smoke run on a small network, few rounds.
      only: run the cases whose name holds this text.
      options: where the peers are.
    """
    chosen = Options() if options is None else options
    work, size = (SMALL, 16) if quick else (MLP, 128)
    for case in CASES:
        title = f"{case.name}, {work.name}"
        if only not in title:
            continue
        made = case.make(work.params(), work.batch(size), work)
        candidates = [
            run.Candidate(
                name, _step(function), lambda: None, baseline=None if name == case.baseline else case.baseline
            )
            for name, function in made.items()
        ]
        with peers.started(chosen.peer_python, case.name, work, size) as others:
            candidates += [run.Candidate(peer.name, peer.step, lambda: None, baseline=case.baseline) for peer in others]
            timings = run.time_all(candidates, 2 if quick else 15, budget=30)
        yield run.rows(SUITE, title, f"batch {size}", timings, metric="ms")


def _step(function: Any) -> Any:
    return lambda _: function()


__all__ = ["SUITE", "Case", "Options", "run_suite"]
