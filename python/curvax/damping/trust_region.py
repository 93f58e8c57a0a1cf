"""Levenberg-Marquardt damping with real rejection."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.core import Tracer

from curvax.damping.base import Damping, Outcome, ScalarLike, scalar
from curvax.damping.constant import _check_lam0, _show


@dataclasses.dataclass(frozen=True)
class TrustRegion(Damping):
    """Raises lam after steps that the quadratic model promised more of than they kept, and lowers it after good ones.

    With rho = actual / predicted decrease on the step's own batch: rho < lower multiplies lam by `inc`, rho > upper by
    `dec`. A step that does not decrease the loss is rejected: parameters and transform state stay, lam rises. So it
    does after a step that is not finite, evaluated or not.

    Attributes:
      lam0: first damping, in units of the curvature.
      lower, upper: bounds on rho between which lam stays; 1/4 and 3/4 (Marquardt 1963, Martens 2010).
      inc, dec: factors for lam.
      every_k: every how many steps rho is evaluated (one forward pass and one curvature product).
      min_lam, max_lam: bounds on lam; `None` for 1e-12 and 1e6 times lam0, so that they follow the scale of the loss.
      accept: least rho of a step that is taken.
    """

    lam0: ScalarLike = 1.0
    lower: float = 0.25
    upper: float = 0.75
    inc: float = 1.5
    dec: float = 0.5
    every_k: int = 1
    min_lam: float | None = None
    max_lam: float | None = None
    accept: float = 0.0

    def __post_init__(self) -> None:
        _check_lam0(self.lam0)
        if not isinstance(self.lam0, Tracer) and float(self.lam0) == 0:
            raise ValueError("a trust region multiplies its damping: give lam0 above 0.")
        if self.every_k < 1:
            raise ValueError(f"every_k must be at least 1, not {self.every_k}.")
        if not (self.inc > 1 > self.dec > 0):
            raise ValueError("inc must be above 1 and dec between 0 and 1.")
        if not self.lower <= self.upper:
            raise ValueError("lower must not exceed upper.")

    @property
    def name(self) -> str:
        return f"trust region (from {_show(self.lam0)}, every {self.every_k})"

    @property
    def evaluate_every(self) -> int | None:
        return self.every_k

    def init(self) -> jax.Array:
        return scalar(self.lam0)

    def lam(self, state: jax.Array) -> jax.Array:
        return state

    def accepts(self, outcome: Outcome) -> jax.Array:
        # Where the model predicts no decrease (momentum can turn an update uphill), the loss itself decides.
        rho = outcome.rho
        return jnp.where(jnp.isnan(rho), outcome.actual > 0, rho > self.accept)

    def update(self, state: jax.Array, outcome: Outcome, due: jax.Array) -> jax.Array:
        rho = outcome.rho
        use = due & outcome.evaluated
        worse = use & (~self.accepts(outcome) | (rho < self.lower))
        better = use & ~worse & (rho > self.upper)
        lam0 = scalar(self.lam0).astype(state.dtype)
        low = lam0 * 1e-12 if self.min_lam is None else scalar(self.min_lam).astype(state.dtype)
        high = lam0 * 1e6 if self.max_lam is None else scalar(self.max_lam).astype(state.dtype)
        raised = jnp.where(worse | ~outcome.finite, state * self.inc, state)
        return jnp.clip(jnp.where(better, raised * self.dec, raised), low, high)
