"""What it takes to trace and compile a step of presets at their defaults, over a step of AdamW on the same model.

All of them are traced, lowered and compiled once, in random order, with JAX's caches empty, as a user's first step is.
Processor time of all threads counts, so that others who use the machine do not; the models are those of
`python -m bench untuned`.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bench.schema import Row
from bench.suites.untuned.contenders import ADAMW, CONTENDERS, Contender
from bench.suites.untuned.problems import PROBLEMS, Problem
from bench.suites.untuned.runner import Course

SUITE = "compile"
CALLS, TRACE, COMPILE, TOTAL, SIZE = "model calls", "s to lower", "s to compile", "s in all", "HLO instructions"
_MODELS = ("digits", "poisson2d", "cnn", "transformer", "recurrent")
# Of each kind one: others compile what these do.
_CONTENDERS = (ADAMW, "gauss_newton", "egn", "kfac", "sophia_g", "adahessian")
_GOAL, _MOST_BYTES = 3.0, 2 * 2**30


class Costs(NamedTuple):
    """One compilation.

    Attributes:
      calls: of the model's Python.
      trace: seconds to trace and lower.
      compile: seconds to compile that.
      size: instructions of the compiled program, those inside fusions included.
    """

    calls: int
    trace: float
    compile: float
    size: int


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, model by model.

    Args:
      quick: the smallest model alone.
      only: substring of the names of models to run.
    """
    known = {problem.name: problem for problem in PROBLEMS}
    for name in _MODELS[:1] if quick else _MODELS:
        if only in name:
            with jax.enable_x64(known[name].float64):
                yield list(_compare(known[name]))


def _compare(problem: Problem) -> Iterator[Row]:
    course = Course(problem)
    contenders = [c for c in CONTENDERS if c.name in _CONTENDERS and _affordable(c, course)]
    shuffled = random.Random(0).sample(contenders, len(contenders))
    results = {contender.name: _costs(contender, course) for contender in shuffled}
    for contender in contenders:
        yield from _rows(problem, contender.name, results[contender.name], results[ADAMW])


def _affordable(contender: Contender, course: Course) -> bool:
    return contender.build(course.problem).planned(course.start(0), course.first_batch()).memory <= _MOST_BYTES


def _costs(contender: Contender, course: Course) -> Costs:
    calls: list[None] = []

    def predict(*args: Any) -> jax.Array:
        calls.append(None)
        return course.problem.predict_fn(*args)

    trainer = contender.build(dataclasses.replace(course.problem, predict_fn=predict))
    params, batch = course.start(0), course.first_batch()
    operands = (params, trainer.init(params, batch), batch, jnp.asarray(1.0), jax.random.key(0))
    jax.clear_caches()
    calls.clear()
    begin = time.process_time()
    lowered = jax.jit(trainer.step).lower(*operands)
    between = time.process_time()
    compiled = lowered.compile()
    end = time.process_time()
    text = compiled.as_text() or ""
    return Costs(len(calls), between - begin, end - between, text.count(" = "))


_METRICS: dict[str, Callable[[Costs], float]] = {
    CALLS: lambda c: float(c.calls),
    TRACE: lambda c: c.trace,
    COMPILE: lambda c: c.compile,
    TOTAL: lambda c: c.trace + c.compile,
    SIZE: lambda c: float(c.size),
}


def _rows(problem: Problem, name: str, costs: Costs, base: Costs) -> Iterator[Row]:
    x = "full batch" if problem.full_batch else f"batch {problem.batch}"
    first = name == ADAMW
    for metric, of in _METRICS.items():
        ratio = None if first else of(costs) / of(base)
        goal = _GOAL if metric == TOTAL and not first else None
        baseline = None if first else ADAMW
        yield Row(SUITE, problem.name, name, metric, x, *3 * [of(costs)], ratio=ratio, baseline=baseline, goal=goal)


def table(rows: Sequence[Row]) -> Iterator[str]:
    """One line per model and preset: counts, seconds, and how often AdamW's that is."""
    yield f"| model | preset | {CALLS} | {TRACE} | {COMPILE} | {SIZE} | {TOTAL} over {ADAMW}'s |"
    yield "|---|---|---|---|---|---|---|"
    by_run: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        by_run.setdefault((row.case, row.provider), {})[row.metric] = row
    for (case, provider), own in by_run.items():
        ratio = own[TOTAL].ratio
        cells = [f"{own[m].p50:.3g}" for m in (CALLS, TRACE, COMPILE)] + [f"{own[SIZE].p50:.0f}"]
        yield f"| {case} | {provider} | {' | '.join(cells)} | {'' if ratio is None else f'{ratio:.2f}'} |"
