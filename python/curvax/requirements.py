"""Cadences and requirements: what modules ask of a step."""

from __future__ import annotations

import dataclasses
import enum
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Cadence:
    """The steps at which a part runs: step t (from 0) is due if any period divides it.

    Periods keep their own steps: 3 and 5 together are due at 0, 3, 5, 6, 9, 10, ...

    Attributes:
      periods: at least 1 each; no period for never.
    """

    periods: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if any(period < 1 for period in self.periods):
            raise ValueError(f"a cadence is every 1 or more steps, not {min(self.periods)}.")
        distinct = sorted(set(self.periods))
        # A multiple of another period adds no step.
        least = tuple(p for p in distinct if not any(p % q == 0 for q in distinct if q < p))
        object.__setattr__(self, "periods", least)

    @property
    def never(self) -> bool:
        """No step is due."""
        return not self.periods

    @property
    def always(self) -> bool:
        """Every step is due."""
        return self.periods == (1,)

    @property
    def rate(self) -> float:
        """Fraction of steps that are due, by inclusion and exclusion over one common cycle."""
        if self.never:
            return 0.0
        cycle = math.lcm(*self.periods)
        return sum(any(t % p == 0 for p in self.periods) for t in range(cycle)) / cycle

    def __or__(self, other: Cadence) -> Cadence:
        return Cadence(self.periods + other.periods)

    def due(self, step: jax.Array) -> jax.Array:
        """Whether `step` is due."""
        due = jnp.asarray(False)
        for period in self.periods:
            due = due | (step % period == 0)
        return due

    def __str__(self) -> str:
        if self.never:
            return "never"
        if self.always:
            return "every step"
        return "every " + " and every ".join(str(p) for p in self.periods) + " steps"


EVERY_STEP = Cadence((1,))


class Part(enum.Enum):
    """A piece of work of a step, in the order in which a step runs them and a plan prints them."""

    LINEARIZE = "linearize"
    GRADIENT = "gradient"
    PRODUCT = "curvature products"
    ROWS = "row factors"
    SCALING = "scale of damping"
    REFRESH = "refresh"
    INVERSES = "inverses"
    SOLVE = "solve"
    SELECT = "loss for each lam"
    BOUND = "step bound"
    SEARCH = "step size"
    LOSS_AFTER = "loss after the step"
    PREDICTED = "predicted decrease"
    SHARPNESS = "largest eigenvalue"


@dataclasses.dataclass(frozen=True)
class Requirement:
    """A part of a step, when it is due, and the name of the module that asks for it."""

    part: Part
    cadence: Cadence
    by: str
