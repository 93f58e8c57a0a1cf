"""What a batch is, and how long a run may take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from examples.language_model import model


@dataclasses.dataclass(frozen=True)
class Setting:
    """A model and a batch.

    Attributes:
      size: name of the model's size.
      parts: equal parts of a batch: inner minibatches and the line search's share; gradients accumulate over as many.
      part: sequences of one part.
      search: parts that the line search takes.
      target: test loss to reach.
      steps: most steps of a run.
      seeds: number of seeds; the seed decides the batches.
      factors: of the customary learning rate, tried on the first seed, in this order.
      checkpoint: AdamW steps before, each on 16 sequences.
      rounds: of timed steps.
      brief: only the methods that matter most.
      goals: whether the paper's quotients of steps are aimed at, as they are at the largest batch.
    """

    size: str
    parts: int
    part: int
    search: int
    target: float
    steps: int
    seeds: int = 3
    factors: tuple[float, ...] = (1.0, 1 / 3, 3.0)
    checkpoint: int = 200
    rounds: int = 5
    brief: bool = False
    goals: bool = False

    @property
    def inner(self) -> int:
        """Inner minibatches of a step."""
        return self.parts - self.search

    @property
    def shape(self) -> model.Size:
        """The model."""
        return model.SIZES[self.size]

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.parts * self.part

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.sequences * self.shape.length

    @property
    def x(self) -> str:
        """The rows' independent variable."""
        return f"{self.tokens} tokens/step"

    @property
    def case(self) -> str:
        """Beginning of the rows' cases."""
        return f"language model {self.size}, {self.sequences} sequences"

    def predict_fn(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The model as curvax takes it."""
        return functools.partial(model.predict, heads=self.shape.heads)

    def loss_fn(self) -> Callable[[Any, Any], jax.Array]:
        """Mean cross entropy per token."""
        predict = self.predict_fn()
        return lambda p, b: optax.softmax_cross_entropy_with_integer_labels(predict(p, b["x"]), b["y"]).mean()


MAIN = Setting("0.3M", parts=16, part=16, search=2, target=2.0, steps=45)
SMALL = Setting("0.3M", parts=4, part=4, search=1, target=2.0, steps=600, brief=True)
LARGEST = Setting("0.3M", parts=128, part=16, search=8, target=2.0, steps=30, rounds=3, brief=True, goals=True)
# One run of each method, at the rates that are best for the smaller model: whether what holds there holds here.
WIDER = Setting("1M", parts=16, part=16, search=2, target=2.0, steps=40, seeds=1, factors=(1.0,), brief=True)
QUICK = Setting(
    "0.3M", parts=4, part=4, search=1, target=2.7, steps=4, seeds=1, factors=(1.0,), checkpoint=40, rounds=3, brief=True
)
# The paper's: 32 sequences of 1,024 tokens in an inner minibatch, 122 of them; for a GPU.
PAPER = Setting("45M", parts=140, part=32, search=18, target=3.25, steps=200, checkpoint=1000, goals=True)
# The same model at a 20th of that batch: what a step costs, where a GPU is at hand for minutes.
GLIMPSE = Setting("45M", parts=7, part=32, search=1, target=3.25, steps=10, rounds=2, checkpoint=10, brief=True)
