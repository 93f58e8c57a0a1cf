"""Exact row-space steps (`egn_ce`, `egn_mse`, `spring`) with structure, on the generic route, and in python-somax."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench import libraries
from bench.generic import without_structure
from bench.libraries import CURVAX, SOMAX
from bench.schema import Row
from bench.suites.structure import measure
from bench.workloads import CNN, MLP, PINN, REGRESSION, SMALL, Workload, mlp

GENERIC = "curvax, every leaf by reverse mode"
_LADDER = (32, 64, 128, 256, 512)


@dataclasses.dataclass(frozen=True)
class Case:
    """One preset on one workload and batch.

    Attributes:
      preset, work, batch: what runs.
      goal: largest time over python-somax aimed at, or `None`.
    """

    preset: str
    work: Workload
    batch: int
    goal: float | None = None

    @property
    def name(self) -> str:
        """The row's case."""
        return f"{self.preset}, {self.work.name}"


def cases() -> Iterator[Case]:
    """Batches and widths on their own axes, then outputs and other models."""
    for batch in _LADDER:
        yield Case("egn_ce", MLP, batch, 1 / 200 if batch == 128 else None)
    for batch in _LADDER:
        yield Case("egn_mse", REGRESSION, batch, 1 / 40 if batch == 128 else None)
    for batch in (32, 128, 512):
        yield Case("spring", REGRESSION, batch)
    for width in (64, 1024):
        for preset, outputs in (("egn_ce", 10), ("egn_mse", 1), ("spring", 1)):
            yield Case(preset, mlp(width, outputs), 128)
    yield Case("egn_mse", MLP, 128)
    yield Case("egn_ce", mlp(256, 100), 32)
    yield Case("egn_mse", mlp(256, 100), 32)
    for batch in (32, 128, 512):
        yield Case("egn_ce", CNN, batch)
    for preset in ("egn_mse", "spring"):
        for batch in (32, 128, 512):
            yield Case(preset, PINN, batch)


def tables(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Rows of every case; a provider that was left out on a batch is not tried on a larger one."""
    beyond: set[tuple[str, str]] = set()
    for case in (Case("egn_ce", SMALL, 32),) if quick else cases():
        if only in case.name:
            with measure.precision(case.work):
                rows = _rows(suite, case, {p for p, name in beyond if name == case.name}, 2 if quick else 9)
            beyond |= {(r.provider, r.case) for r in rows if r.metric in (measure.TOO_LONG, measure.TOO_LARGE)}
            yield rows


def _rows(suite: str, case: Case, skipped: set[str], rounds: int) -> list[Row]:
    options = {**libraries.model_options(case.preset, case.work), "lam0": 0.1, "learning_rate": 1e-3}
    method = libraries.make(CURVAX, case.preset, **options)
    methods: dict[str, Any] = {CURVAX: method, GENERIC: without_structure(method)}
    # python-somax has no spring, and its egn_mse takes one output.
    peered = case.preset == "egn_ce" or (case.preset == "egn_mse" and case.work.outputs == 1)
    if libraries.has_somax() and peered:
        methods = {SOMAX: libraries.make(SOMAX, case.preset, **options), **methods}
    peer = SOMAX if SOMAX in methods and SOMAX not in skipped else GENERIC
    batch = case.work.batch(case.batch, labels=case.preset == "egn_ce")
    kept = {name: m for name, m in methods.items() if name not in skipped}
    goals = {CURVAX: case.goal if peer == SOMAX else None}
    return measure.steps(suite, case.name, case.work, batch, kept, baseline=peer, goals=goals, rounds=rounds)
