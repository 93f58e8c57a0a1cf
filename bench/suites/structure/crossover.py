"""From which batch on an exact solve in row space costs more than conjugate gradients, and what a diagonal costs."""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.lanes import PARAM_CG, ROW_CHOLESKY, methods
from bench.suites.structure import measure
from bench.workloads import MLP, SMALL

_LADDERS = {"cross entropy": (16, 32, 64, 128, 256, 512), "squared error": (32, 128, 512)}
# Exact solves should cost no more than 20 iterations up to here.
_ROWS = 1280


def tables(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Rows batch by batch, for softmax cross entropy (outputs - 1 rows per example) and squared error."""
    work = SMALL if quick else MLP
    for loss, per_example in (("cross entropy", work.outputs - 1), ("squared error", work.outputs)):
        case = f"lanes, {loss}, {work.name}"
        for batch in (16,) if quick else _LADDERS[loss]:
            if only in case:
                data = work.batch(batch, labels=loss == "cross entropy")
                goals = {ROW_CHOLESKY: 1.0 if batch * per_example <= _ROWS else None}
                results = methods(work, loss, diagonal=True)
                yield measure.steps(
                    suite, case, work, data, results, baseline=PARAM_CG, goals=goals, rounds=2 if quick else 9
                )
