"""Growth: how time, memory and compilation of a step follow each size of the work, one size at a time.

    parameters    widths of an MLP of two hidden layers      batch and outputs fixed
    batch         examples                                   the model fixed
    outputs       classes: rows are batch x (outputs - 1)    hidden layers and batch fixed
    layers        hidden layers of one width                 batch fixed
    iterations    of conjugate gradients                     model and batch fixed

The same Gauss-Newton step is solved in parameter space and in row space, with one tolerance and damping, beside what
the planner picks for it, K-FAC and AdamW. An exponent is the slope of log(measurement) over log(size), by least squares
over the last `_TAIL` sizes: 1 is linear growth, 3 that of a factorization.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import optax

import curvax
from bench import libraries, run
from bench.schema import Row
from bench.suites import lanes
from bench.suites.lanes import PICKED
from bench.workloads import Workload, layered
from curvax.losses import SoftmaxCrossEntropy
from curvax.solvers import CG, RowSpace

SUITE = "growth"
PLANNED, KFAC, ADAMW = "planner's pick", "kfac", "adamw"
TIME, MEMORY, COMPILATION = "ms/step", "MiB temp", "s to compile"
_TAIL, _MOST_ROWS = 3, 2600
_BATCH, _WIDTH, _INPUTS, _OUTPUTS = 32, 128, 64, 10


@dataclasses.dataclass(frozen=True)
class Point:
    """One size of one sweep.

    Attributes:
      size: the size that grows: parameters, examples, outputs, layers or iterations.
      work, batch: the model and the number of examples.
      iterations: of conjugate gradients.
    """

    size: int
    work: Workload
    batch: int = _BATCH
    iterations: int = 20

    @property
    def rows(self) -> int:
        """Unknowns of the row system."""
        return self.batch * (self.work.outputs - 1)


def sweeps() -> dict[str, tuple[Point, ...]]:
    """The sweeps by the size that grows."""
    base = layered(_INPUTS, _WIDTH, _WIDTH, _OUTPUTS)
    widths = (layered(_INPUTS, w, w, _OUTPUTS) for w in (32, 64, 128, 256, 512, 1024))
    outputs = (layered(_INPUTS, _WIDTH, _WIDTH, n) for n in (2, 4, 8, 16, 32, 64))
    depths = (layered(_INPUTS, *[64] * n, _OUTPUTS) for n in (2, 4, 8, 16, 32))
    return {
        "parameters": tuple(Point(work.size, work) for work in widths),
        "batch": tuple(Point(n, base, n) for n in (8, 16, 32, 64, 128, 256, 512, 1024)),
        "outputs": tuple(Point(work.outputs, work) for work in outputs),
        "layers": tuple(Point(len(work.shapes) // 2 - 1, work) for work in depths),
        "iterations": tuple(Point(n, base, iterations=n) for n in (5, 10, 20, 40, 80)),
    }


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, size by size, then the exponents of each sweep.

    Args:
      quick: the two smallest sizes of each sweep, few rounds.
      only: substring of the cases, which are named after the size that grows.
    """
    for axis, points in sweeps().items():
        if only in axis:
            measured = []
            for point in points[:2] if quick else points:
                measured.append(_measure(axis, point, 2 if quick else 9))
                yield measured[-1]
            yield list(_exponents(axis, measured))


def _measure(axis: str, point: Point, rounds: int) -> list[Row]:
    batch = point.work.batch(point.batch)
    candidates, rows = [], []
    for name, trainer in _trainers(point).items():
        begin = time.process_time()
        step, carry, bytes_ = trainer(batch)
        spent = time.process_time() - begin
        candidates.append(run.Candidate(name, step, carry, baseline=None if name == ADAMW else ADAMW))
        rows += [_row(axis, point, name, MEMORY, bytes_ / 2**20), _row(axis, point, name, COMPILATION, spent)]
    timings = run.time_all(candidates, rounds, budget=6)
    rows = [*run.rows(SUITE, axis, _x(point), timings), *rows]
    by_name = {timing.candidate.name: timing for timing in timings}
    best = min((by_name[name] for name in _lanes(point)), key=lambda t: float(np.median(t.seconds)))
    over = run.ratio(by_name[PLANNED], best)
    pick = _row(axis, point, PLANNED, PICKED, over)
    return [*rows, dataclasses.replace(pick, ratio=over, baseline=best.candidate.name, goal=1.3)]


def _lanes(point: Point) -> dict[str, curvax.Method]:
    """One system in each space; the dense one only as far as it takes less than a second."""
    cg = CG(maxiter=point.iterations, tol=0.0)
    methods = lanes.methods(point.work, "cross entropy")
    solvers = {lanes.PARAM_CG: cg, lanes.ROW_CG: RowSpace(cg)}
    results = {
        name: curvax.Method(dataclasses.replace(methods[name].assembly, solver=solver))
        for name, solver in solvers.items()
    }
    if point.rows <= _MOST_ROWS:
        results[lanes.ROW_CHOLESKY] = methods[lanes.ROW_CHOLESKY]
    return results


Stepper = tuple[libraries.Step, Callable[[], Any], int]


def _trainers(point: Point) -> dict[str, Callable[[dict[str, jax.Array]], Stepper]]:
    loss = SoftmaxCrossEntropy()
    methods = _lanes(point) | {
        PLANNED: lanes.automatic(point.work, loss, point.iterations),
        KFAC: curvax.kfac(predict_fn=point.work.predict, loss=loss),
    }

    def of(method: curvax.Method) -> Callable[[dict[str, jax.Array]], Stepper]:
        return lambda batch: libraries.compiled_stepper(method, point.work, batch)

    return {ADAMW: lambda batch: _adamw(point.work, batch)} | {name: of(method) for name, method in methods.items()}


def _adamw(work: Workload, batch: dict[str, jax.Array]) -> Stepper:
    optimizer = optax.adamw(1e-3)

    def update(params: Any, state: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(jax.grad(work.cross_entropy)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    def carry() -> tuple[Any, Any]:
        params = work.params()
        return params, optimizer.init(params)

    step = jax.jit(update, donate_argnums=(0, 1)).lower(*carry()).compile()
    return lambda c: step(*c), carry, libraries.temp_bytes(step)


def _exponents(axis: str, measured: Sequence[Sequence[Row]]) -> Iterator[Row]:
    rows = [row for group in measured for row in group]
    for provider in dict.fromkeys(row.provider for row in rows):
        for metric in (TIME, MEMORY, COMPILATION):
            tail = [r for r in rows if (r.provider, r.metric) == (provider, metric) and r.p50 > 0][-_TAIL:]
            if len(tail) > 1:
                sizes = [_size(row) for row in tail]
                slope = run.exponent(sizes, [row.p50 for row in tail])
                x = f"{sizes[0]} to {sizes[-1]}"
                yield Row(SUITE, axis, provider, f"exponent of {metric}", x, slope, slope, slope)


def _x(point: Point) -> str:
    return str(point.size)


def _size(row: Row) -> int:
    return int(row.x)


def _row(axis: str, point: Point, name: str, metric: str, value: float) -> Row:
    return Row(SUITE, axis, name, metric, _x(point), value, value, value)


def exponents(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each size that grows and each measurement."""
    providers = list(dict.fromkeys(row.provider for row in rows))
    yield f"| grows | exponent of | {' | '.join(providers)} |"
    yield "|---|---|" + "---|" * len(providers)
    axes = list(dict.fromkeys(row.case for row in rows))
    for axis in axes:
        for metric in (TIME, MEMORY, COMPILATION):
            values = {r.provider: r.p50 for r in rows if (r.case, r.metric) == (axis, f"exponent of {metric}")}
            yield f"| {axis} | {metric} | {' | '.join(_cell(values.get(p), '.2f') for p in providers)} |"


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Exponents first, then one table a sweep: milliseconds, MiB and seconds to compile."""
    yield from exponents(rows)
    providers = list(dict.fromkeys(row.provider for row in rows))
    for axis in dict.fromkeys(row.case for row in rows):
        yield from ("", f"### {axis}", "", f"| {axis} | {' | '.join(providers)} | {PICKED} |")
        yield "|---|" + "---|" * (len(providers) + 1)
        for x in dict.fromkeys(row.x for row in rows if row.case == axis and not row.metric.startswith("exponent")):
            own = {(r.provider, r.metric): r for r in rows if (r.case, r.x) == (axis, x)}
            cells = [
                " / ".join(
                    _cell(own[p, metric].p50 if (p, metric) in own else None, ".3g")
                    for metric in (TIME, MEMORY, COMPILATION)
                )
                for p in providers
            ]
            pick = own.get((PLANNED, PICKED))
            yield f"| {x} | {' | '.join(cells)} | {'' if pick is None else f'{pick.p50:.2f} ({pick.baseline})'} |"
    yield ""
    yield f"Cells: {TIME} / {MEMORY} / {COMPILATION}."


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
