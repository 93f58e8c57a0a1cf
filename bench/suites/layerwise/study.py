"""Steps and tokens to a target loss, from one checkpoint, at tuned learning rates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from examples.language_model import data, model

from bench.schema import Row
from bench.suites.layerwise.contenders import SOAP, Contender, Trainer, adamw, first_order
from bench.suites.layerwise.setting import Setting

SUITE = "layerwise"
RATE = ", rate "  # between a method's name and its learning rate in a row's provider


class Run(NamedTuple):
    """One training run: steps to the target, infinite if it was not reached; last test loss. Fewer steps are better."""

    steps: float
    loss: float


class Tuned(NamedTuple):
    """A method's runs of all seeds at its best rate."""

    contender: Contender
    rate: float
    runs: tuple[Run, ...]

    @property
    def provider(self) -> str:
        """The rows' provider."""
        return f"{self.contender.name}{RATE}{self.rate:.2g}"

    @property
    def steps(self) -> float:
        """Of the median seed."""
        return _percentiles([r.steps for r in self.runs])[1]


class Study:
    """One setting: the checkpoint that all runs start from, data, test loss."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.corpus = setting, data.load()
        self.held_out = self.corpus.held_out(64, setting.shape.length)
        self.test_loss = jax.jit(setting.loss_fn())
        self.params = self._checkpoint()
        self.start = float(self.test_loss(self.params, self.held_out))
        if not self.start > setting.target:
            raise ValueError(f"the checkpoint has a test loss of {self.start:.3f} already: set a lower target.")

    def _checkpoint(self) -> Any:
        once = dataclasses.replace(self.setting, parts=1, part=16)
        trainer = first_order(adamw)(once)
        params = model.init(jax.random.key(0), self.setting.shape)
        state, rng = trainer.init(params, None), np.random.default_rng(10_000)
        for _ in range(self.setting.checkpoint):
            batch = self.corpus.batch(rng, 16, self.setting.shape.length)
            params, state = trainer.step(params, state, batch, 3e-3)
        return params

    def batch(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One step's batch."""
        return self.corpus.batch(rng, self.setting.sequences, self.setting.shape.length)

    def run(self, trainer: Trainer, rate: float, seed: int, limit: float) -> Run:
        """Trains until the target, or until `limit` steps are done, or until the loss is 1 above its start."""
        params, rng = jax.tree.map(jnp.copy, self.params), np.random.default_rng(seed)
        batch = self.batch(rng)
        state, loss, done = trainer.init(params, batch), self.start, 0
        while done < limit and loss > self.setting.target:
            params, state = trainer.step(params, state, batch, rate)
            batch, done = self.batch(rng), done + 1
            loss = float(self.test_loss(params, self.held_out))
            if not loss < self.start + 1:
                loss = loss if math.isfinite(loss) else math.inf
                break
        return Run(done if loss <= self.setting.target else math.inf, loss)

    def tuned(self, contender: Contender) -> Tuned:
        """The runs of all seeds at the rate that is best on the first.

        A rate is given up where another was at the target already: it cannot be better.
        """
        trainer = contender.build(self.setting)
        best: tuple[Run, float] | None = None
        for factor in self.setting.factors:
            rate = contender.rate * factor
            limit = self.setting.steps if best is None else min(self.setting.steps, best[0].steps)
            results = self.run(trainer, rate, 0, limit), rate
            if best is None or results[0] < best[0]:
                best = results
        if best is None:
            raise ValueError("a setting needs at least one factor of the learning rate.")
        others = (self.run(trainer, best[1], seed, self.setting.steps) for seed in range(1, self.setting.seeds))
        return Tuned(contender, best[1], (best[0], *others))


def compare(study: Study, case: str, contenders: Sequence[Contender]) -> Iterator[list[Row]]:
    """Rows, method by method."""
    soap: Tuned | None = None
    for contender in contenders:
        results = study.tuned(contender)
        soap = results if contender.name == SOAP else soap
        yield _rows(study.setting, case, results, soap)


def _rows(setting: Setting, case: str, results: Tuned, soap: Tuned | None) -> list[Row]:
    """Test loss and steps always (infinite for a run that did not arrive), tokens where the median seed arrives."""

    def row(metric: str, values: Sequence[float], ratio: float | None = None, goal: float | None = None) -> Row:
        baseline = None if ratio is None else SOAP
        spread = _percentiles(values)
        return Row(
            SUITE, case, results.provider, metric, setting.x, *spread, ratio, baseline, goal, rounds=len(values)
        )  # fmt: skip

    losses, steps = [r.loss for r in results.runs], [r.steps for r in results.runs]
    if not math.isfinite(results.steps):
        return [row("test loss", losses)]
    ratio = None
    if soap is not None and results is not soap and math.isfinite(soap.steps):
        ratio = results.steps / soap.steps
    goal = results.contender.goal if setting.goals and ratio is not None else None
    return [
        row("test loss", losses),
        row("steps", steps, ratio, goal),
        row("tokens", [s * setting.tokens for s in steps]),
    ]


def _percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Percentiles that are runs, not means of two: a run that never arrives is infinite."""
    p20, p50, p80 = (float(v) for v in np.percentile(values, (20, 50, 80), method="nearest"))
    return p20, p50, p80
