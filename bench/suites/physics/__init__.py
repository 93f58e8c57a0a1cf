"""Physics-informed networks: ten equations solved against time, what a loss of several terms costs, and memory.

    python -m bench physics --only "Poisson 2-D"

`curvax.gauss_newton`, `egn`, `spring` and `kfac` with no keyword but the loss run beside Adam and SOAP at tuned rates,
L-BFGS, an expert's own natural gradient with line search and tuned damping, optimistix' Levenberg-Marquardt and
python-somax.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator

import jax

from bench.schema import Row
from bench.suites.physics import memory, steps
from bench.suites.physics.contenders import CONTENDERS
from bench.suites.physics.problems import PROBLEMS
from bench.suites.physics.race import rows_of
from bench.suites.untuned.runner import Clock, Effort

SUITE = "physics"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beyond the options of all suites.

    Attributes:
      contender: names with commas; "" for all.
      seconds: of each contender on each equation.
      clock: that counts them.
    """

    contender: str = ""
    seconds: float | None = None
    clock: Clock = Clock.WALL

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Adds the options to a command line."""
        group = parser.add_argument_group("physics")
        group.add_argument("--contender", default="", help="only these (a,b,...)")
        group.add_argument("--seconds", type=float, help="of each contender on each equation (20, with --quick 2)")
        group.add_argument("--clock", type=Clock, default=Clock.WALL, help="wall, or cpu where others use the machine")

    @staticmethod
    def of(arguments: argparse.Namespace) -> Options:
        """From a parsed command line."""
        return Options(arguments.contender, arguments.seconds, arguments.clock)

    @property
    def some(self) -> bool:
        """Whether only some of the contenders run."""
        return bool(self.contender)

    def takes(self, name: str) -> bool:
        """Whether a contender runs."""
        return not self.some or name in (each.strip() for each in self.contender.split(","))


def run_suite(quick: bool = False, only: str = "", options: Options = Options()) -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: short runs, few points and rounds.
      only: substring of the case names to run.
      options: contenders and seconds.
    """
    effort = Effort(options.seconds or (2.0 if quick else 20.0), options.clock, 1)
    contenders = [c for c in CONTENDERS if options.takes(c.name)]
    for make in PROBLEMS:
        with jax.enable_x64(True):
            pde = make()
            if only in pde.name:
                yield list(rows_of(SUITE, pde, effort, contenders))
    if not options.some:
        yield from steps.step_rows(SUITE, quick, only)
        yield from memory.memory_rows(SUITE, quick, only)
