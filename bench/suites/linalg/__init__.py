"""Dense factorizations beside JAX's LAPACK, and steps that factorize beside the best that its threads allow.

`factorizations` times single ops in one process, LAPACK's threads held to one and as they come; `steps` whole steps in
processes of their own, one per setting of OPENBLAS_NUM_THREADS, on the machine as it is and beside two that never rest.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bench.schema import Row
from bench.suites.linalg import factorizations, steps

SUITE = "linalg"


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: a smoke run: the smallest case of each kind, few rounds.
      only: run the cases whose name holds this text.
    """
    for case in itertools.chain(factorizations.cases(quick), steps.cases(quick)):
        if only in case.title:
            yield case.rows(SUITE, 3 if quick else 15)
