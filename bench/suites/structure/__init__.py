"""What structure is worth: row-space steps and exact quantities with it, without it, and in python-somax.

One module per table.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.structure import crossover, exact, growth, quantities

SUITE = "structure"


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: a smoke run: the smallest case of each table, few rounds.
      only: substring of the case names to run.
    """
    yield from quantities.tables(SUITE, quick, only)
    yield from crossover.tables(SUITE, quick, only)
    steps: list[Row] = []
    for rows in exact.tables(SUITE, quick, only):
        steps += rows
        yield rows
    yield from growth.tables(SUITE, steps)
