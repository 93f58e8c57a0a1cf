"""What a damping policy is, and the outcome of a step that it reacts to."""

from __future__ import annotations

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

ScalarLike = float | jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a proposed step. All scalars.

    Attributes:
      finite: the step is made of finite numbers.
      evaluated: the loss after the step was computed in this step.
      loss: loss before, on the step's batch.
      loss_after: loss after the proposed step, on the same batch; NaN unless evaluated.
      predicted: decrease that the quadratic model predicts for the proposed update d, -(g.d + d.Cd / 2) with the
        undamped C; NaN unless evaluated.
    """

    finite: jax.Array
    evaluated: jax.Array
    loss: jax.Array
    loss_after: jax.Array
    predicted: jax.Array

    @property
    def actual(self) -> jax.Array:
        """Decrease of the loss."""
        return self.loss - self.loss_after

    @property
    def rho(self) -> jax.Array:
        """Actual over predicted decrease; NaN if the model predicts none."""
        sound = self.predicted > 0
        ratio = self.actual / jnp.where(sound, self.predicted, jnp.ones_like(self.predicted))
        return jnp.where(sound, ratio, jnp.full_like(ratio, jnp.nan))


class Damping(abc.ABC):
    """Owns lam."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The policy's name in the plan."""

    @property
    @abc.abstractmethod
    def evaluate_every(self) -> int | None:
        """Every how many steps it needs the loss after the step and the predicted decrease; `None` for never."""

    @abc.abstractmethod
    def init(self) -> Any:
        """State of fixed shapes and dtypes."""

    @abc.abstractmethod
    def lam(self, state: Any) -> jax.Array:
        """The damping of this step."""

    @abc.abstractmethod
    def accepts(self, outcome: Outcome) -> jax.Array:
        """Whether an evaluated, finite step may be taken."""

    @abc.abstractmethod
    def update(self, state: Any, outcome: Outcome, due: jax.Array) -> Any:
        """The next state.

        Args:
          due: whether this step is one of the policy's own (`evaluate_every`); others may have evaluated it too.
        """


def scalar(value: ScalarLike) -> jax.Array:
    """A strongly typed scalar in the default float dtype (float64 with x64, else float32)."""
    return jnp.asarray(value, jnp.result_type(float))
