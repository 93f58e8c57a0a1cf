"""Methods as they come against tuned first-order ones, on ten small problems: time to a loss, final loss, divergence.

`gauss_newton` with no keyword but model and loss runs beside AdamW, SOAP and L-BFGS, each at the best of twelve rates,
and beside other presets at their defaults, which should at least not end above their start. All runs of a problem
share one process and take turns. A problem alone, with what tuned AdamW reached there in the committed rows:

    python -m bench untuned --only poisson2d --contender gauss_newton
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import jax

from bench import schema
from bench.schema import Row
from bench.suites.untuned.contenders import ADAMW, Contender, chosen
from bench.suites.untuned.problems import PROBLEMS, Problem
from bench.suites.untuned.rows import SUITE as SUITE
from bench.suites.untuned.rows import Result, left_out, rows
from bench.suites.untuned.runner import Clock, Compiled, Course, Effort, race
from bench.suites.untuned.tuning import Baseline, Earlier, best_rates

_QUICK = 1.5
# A step beyond either is left out: some ten seconds, or memory that a small machine may not have.
_MOST_FLOPS, _MOST_BYTES = 2e12, 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says beyond the options of all suites.

    Attributes:
      contender: names with commas; "" for all. Named ones take rates and tuned AdamW from the committed rows, and the
        budget and the clock with them, unless `budget` is given.
      budget: seconds of each run.
      clock: that counts them.
      seeds: runs of each contender.
    """

    contender: str = ""
    budget: float | None = None
    clock: Clock = Clock.WALL
    seeds: int = 3

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Adds the options to a command line."""
        group = parser.add_argument_group("untuned")
        group.add_argument("--contender", default="", help="only these (a,b,...), beside tuned AdamW of earlier rows")
        group.add_argument("--budget", type=float, help="seconds of each run (8, with --quick 1.5)")
        group.add_argument("--clock", type=Clock, default=Clock.WALL, help="wall, or cpu where others use the machine")
        group.add_argument("--seeds", type=int, default=3, help="runs of each contender (3)")

    @property
    def some(self) -> bool:
        """Whether only some of the contenders run."""
        return bool(self.contender)

    @staticmethod
    def of(arguments: argparse.Namespace) -> Options:
        """From a parsed command line."""
        return Options(arguments.contender, arguments.budget, arguments.clock, arguments.seeds)

    def effort(self, quick: bool, earlier: Earlier | None) -> Effort:
        """What a run may take; comparisons with earlier rows take what those took."""
        if earlier is not None and self.budget is None and not quick:
            return dataclasses.replace(earlier.effort, seeds=min(self.seeds, earlier.effort.seeds))
        budget = self.budget or (_QUICK if quick else Effort.budget)
        return Effort(budget, self.clock, 1 if quick else self.seeds)


def run_suite(quick: bool = False, only: str = "", options: Options = Options()) -> Iterator[list[Row]]:
    """Rows, problem by problem.

    Args:
      quick: short runs of one seed.
      only: substring of the names of problems to run.
      options: contenders and effort.
    """
    contenders = chosen(options.contender)
    path = schema.RESULTS / f"{SUITE}.jsonl"
    known = schema.read(path) if options.contender and path.exists() else []
    for problem in PROBLEMS:
        if only in problem.name:
            earlier = Earlier.of(known, problem.name)
            effort = options.effort(quick, earlier)
            usable = earlier if earlier is not None and earlier.effort.x == effort.x else None
            with jax.enable_x64(problem.float64):
                yield list(_problem(problem, [c for c in contenders if c.runs_on(problem)], effort, usable))


def _problem(
    problem: Problem, contenders: Sequence[Contender], effort: Effort, earlier: Earlier | None
) -> Iterator[Row]:
    if earlier is None and all(c.name != ADAMW for c in contenders):
        raise ValueError(
            f"there are no rows of tuned AdamW on {problem.name} with {effort.x}: add it by --contender {ADAMW},..."
        )
    course, compiled = Course(problem), []
    for contender in contenders:
        trainer = contender.build(problem)
        cost = trainer.planned(course.start(0), course.first_batch())
        if cost.flops > _MOST_FLOPS or cost.memory > _MOST_BYTES:
            yield left_out(problem, contender, cost.flops, effort)
        else:
            compiled.append(Compiled(contender, trainer, course, effort.clock))
    rates = {} if earlier is None else dict(earlier.rates)
    rates |= best_rates([c for c in compiled if c.contender.name not in rates], effort)
    entries = [(c, rates.get(c.contender.name, 0.0), seed) for c in compiled for seed in range(effort.seeds)]
    trajectories = iter(race(entries, effort.budget))
    results = [
        Result(c.contender, rates.get(c.contender.name), c.seconds, tuple(itertools.islice(trajectories, effort.seeds)))
        for c in compiled
    ]
    baseline = _baseline(results, earlier).first(effort.seeds)
    for result in results:
        yield from rows(problem, result, baseline, effort)


def _baseline(results: Sequence[Result], earlier: Earlier | None) -> Baseline:
    """Tuned AdamW of this run if it ran, else of earlier rows."""
    for result in results:
        if result.contender.name == ADAMW:
            return Baseline.of(result.runs, result.compile)
    if earlier is None:
        raise AssertionError("a run without AdamW has earlier rows.")
    return earlier.baseline
