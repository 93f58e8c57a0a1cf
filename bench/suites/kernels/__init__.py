"""Kernels: each op in each implementation that runs here, against its reference and the machine's limits.

One module per op family, each with `cases(quick)`.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.kernels import tree_cg

SUITE = "kernels"
_FAMILIES = (tree_cg,)


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: a smoke run: the first case of each family, few rounds.
      only: run the cases whose name holds this text.
    """
    for family in _FAMILIES:
        for case in family.cases(quick):
            if only in case.title:
                yield case.rows(SUITE, 2 if quick else 15)
