"""Damping that does not look at the outcome."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from curvax.damping.base import Damping, Outcome, ScalarLike, scalar


@dataclasses.dataclass(frozen=True)
class Constant(Damping):
    """lam = lam0.

    Attributes:
      lam0: the damping, in units of the curvature (loss per squared parameter); at least 0.
    """

    lam0: ScalarLike = 1.0

    def __post_init__(self) -> None:
        _check_lam0(self.lam0)

    @property
    def name(self) -> str:
        return f"constant ({_show(self.lam0)})"

    @property
    def evaluate_every(self) -> int | None:
        return None

    def init(self) -> tuple[()]:
        return ()

    def lam(self, state: tuple[()]) -> jax.Array:
        return scalar(self.lam0)

    def accepts(self, outcome: Outcome) -> jax.Array:
        return jnp.asarray(True)

    def update(self, state: tuple[()], outcome: Outcome, due: jax.Array) -> tuple[()]:
        return ()


@dataclasses.dataclass(frozen=True)
class Scheduled(Damping):
    """lam = schedule(number of steps so far).

    Attributes:
      schedule: an Optax schedule.
    """

    schedule: optax.Schedule

    @property
    def name(self) -> str:
        return "schedule"

    @property
    def evaluate_every(self) -> int | None:
        return None

    def init(self) -> jax.Array:
        return jnp.zeros((), jnp.int32)

    def lam(self, state: jax.Array) -> jax.Array:
        return jnp.asarray(self.schedule(state)).astype(jnp.result_type(float))

    def accepts(self, outcome: Outcome) -> jax.Array:
        return jnp.asarray(True)

    def update(self, state: jax.Array, outcome: Outcome, due: jax.Array) -> jax.Array:
        return state + 1


def _check_lam0(lam0: ScalarLike) -> None:
    if callable(lam0) or isinstance(lam0, str):
        raise TypeError("lam0 must be a number here: a schedule goes into curvax.damping.Scheduled.")
    if jnp.shape(lam0):
        raise TypeError(f"lam0 has the shape {jnp.shape(lam0)}: pass one number.")
    if not isinstance(lam0, Tracer) and not float(lam0) >= 0:
        raise ValueError(f"lam0 must be at least 0, not {lam0}.")


def _show(lam0: ScalarLike) -> str:
    return f"{lam0:g}" if isinstance(lam0, int | float) else "traced"
