"""The best of twelve rates, and what tuned AdamW makes of it: measured, or read from earlier rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from bench.schema import Row
from bench.suites.untuned.contenders import ADAMW
from bench.suites.untuned.runner import Compiled, Effort, Trajectory, race

RATE, FINAL, TARGET_TIME, COMPILE = "learning rate", "training loss", "s to tuned adamw's loss", "s to compile"


def best_rates(compiled: Sequence[Compiled], effort: Effort) -> dict[str, float]:
    """For every contender with rates the one whose run ends with the smallest loss on the first seed."""
    entries = [(c, rate, 0) for c in compiled for rate in c.contender.rates]
    finals = [t.final.loss for t in race(entries, effort.budget)]
    best: dict[str, tuple[float, float]] = {}
    for (each, rate, _), loss in zip(entries, finals, strict=True):
        name = each.contender.name
        best[name] = min(best.get(name, (loss, rate)), (loss, rate))
    return {name: rate for name, (_, rate) in best.items()}


@dataclasses.dataclass(frozen=True)
class Baseline:
    """What tuned AdamW reaches, seed by seed.

    Attributes:
      losses: final training losses.
      seconds: when it was there first.
      compile: seconds to trace and compile its step.
    """

    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    compile: float

    @staticmethod
    def of(runs: Sequence[Trajectory], compile_seconds: float) -> Baseline:
        """From runs of all seeds at the best rate."""
        losses = tuple(t.final.loss for t in runs)
        seconds = tuple(t.seconds_to(loss) for t, loss in zip(runs, losses, strict=True))
        return Baseline(losses, seconds, compile_seconds)

    def first(self, seeds: int) -> Baseline:
        """Of the first seeds alone."""
        return dataclasses.replace(self, losses=self.losses[:seeds], seconds=self.seconds[:seeds])


@dataclasses.dataclass(frozen=True)
class Earlier:
    """What earlier rows of a problem say.

    Attributes:
      effort: that they were measured with.
      rates: the best rate of each tuned contender.
      baseline: tuned AdamW.
    """

    effort: Effort
    rates: Mapping[str, float]
    baseline: Baseline

    @staticmethod
    def of(rows: Sequence[Row], problem: str) -> Earlier | None:
        """From rows; `None` if they lack AdamW on this problem."""
        own = [row for row in rows if row.case == problem]
        adamw = [row for row in own if row.provider == ADAMW]
        compiling = next((row for row in adamw if row.metric == COMPILE), None)
        if compiling is None:
            return None
        losses, seconds = (_by_seed(adamw, metric) for metric in (FINAL, TARGET_TIME))
        return Earlier(
            Effort.parse(compiling.x, len(losses)),
            {row.provider: row.p50 for row in own if row.metric == RATE},
            Baseline(losses, seconds, compiling.p50),
        )


def by_seed(metric: str, seed: int) -> str:
    """The metric of one seed."""
    return f"{metric}, seed {seed}"


def _by_seed(rows: Sequence[Row], metric: str) -> tuple[float, ...]:
    values = {row.metric: row.p50 for row in rows}
    names = [by_seed(metric, seed) for seed in range(len(values))]
    return tuple(values[name] for name in names if name in values)
