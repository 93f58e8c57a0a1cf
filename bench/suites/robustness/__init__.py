"""Hard cases: what stays finite, what recovers, what finds the minimum, in how many steps.

curvax and python-somax at their defaults and the nearest method of Optax on models and functions that break optimizers;
curvax, optimistix and SciPy on the classic least-squares problems of Moré, Garbow and Hillstrom.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import jax

from bench.schema import Row
from bench.suites.robustness import functions, least_squares, supervised
from bench.suites.robustness.case import Case, Compiled, Task
from bench.suites.robustness.classic import CLASSICS
from bench.suites.robustness.rows import CLASSIC, of_case, of_classic
from bench.suites.robustness.rows import SUITE as SUITE
from bench.suites.robustness.subjects import SUBJECTS, Subject


def hard_cases() -> Iterator[Case]:
    """All cases but the classic ones."""
    return itertools.chain(supervised.cases(), functions.cases())


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: every tenth case.
      only: substring of the case names to run; those of the classic set begin with "classic: ".
    """
    compiled = functools.cache(_compiled)
    every = 10 if quick else 1
    for case in itertools.islice((c for c in hard_cases() if only in c.name), 0, None, every):
        with jax.enable_x64(case.task.float64):
            yield [
                row
                for subject in SUBJECTS
                if (runner := compiled(subject, case.task)) is not None
                for row in of_case(case, subject.name, runner.run(case))
            ]
    for problem in itertools.islice((c for c in CLASSICS if only in CLASSIC + c.name), 0, None, every):
        yield [
            row
            for name, solver in least_squares.SOLVERS.items()
            for row in of_classic(problem, name, least_squares.solve(solver, problem))
        ]


def _compiled(subject: Subject, task: Task) -> Compiled | None:
    stepper = subject.build(task)
    return None if stepper is None else Compiled(task, stepper)
