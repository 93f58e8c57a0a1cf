"""Kernels: each op in each implementation that runs here, against its reference and the machine's limits.

One module per op family, each with `cases(quick)`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from bench.schema import Row
from bench.suites.kernels import (
    batched_cg,
    batched_cholesky_solve,
    diagonal_update,
    gram_accumulate,
    hutchinson_reduce,
    linear_softmax_hvp,
    sampled_softmax_residual,
    softmax_hvp,
    tree_cg,
)

SUITE = "kernels"
_FAMILIES = (
    softmax_hvp,
    batched_cg,
    batched_cholesky_solve,
    diagonal_update,
    hutchinson_reduce,
    gram_accumulate,
    sampled_softmax_residual,
    linear_softmax_hvp,
    tree_cg,
)


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: a smoke run: the first case of each family, few rounds.
      only: run the cases whose name holds this text.
    """
    # One case of each family in turn: a run that is cut off has seen them all.
    for turn in itertools.zip_longest(*(family.cases(quick) for family in _FAMILIES)):
        for case in turn:
            if case is not None and only in case.title:
                yield case.rows(SUITE, 2 if quick else 15)
