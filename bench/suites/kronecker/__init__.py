"""Optimizers and preconditioners with a matrix per side of each weight, on the shapes of a small transformer.

`soap` times updates of SOAP, Shampoo and Muon, beside Optax's Muon and beside the matrix products that each cannot do
without.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.schema import Row
from bench.suites.kronecker import soap

SUITE = "kronecker"


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: a smoke run: narrow layers, few rounds.
      only: run the cases whose name holds this text.
    """
    yield from soap.rows(SUITE, quick, only)
