"""What a damping policy is, and the outcome of a step that it reacts to."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.requirements import Cadence, Part, Requirement

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
      rounding: how far rounding alone may move the decrease of the loss; at least 0.
      curvature: |d.Cd| / d.d, the curvature along the update; NaN unless evaluated.
      shown: the curvature along the update that the loss shows, 2 (predicted - actual) / d.d beyond that of the model;
        NaN unless evaluated.
      norm: |d|.
      descends: a search along the step found a step size that lowers the loss; true without a search.
      step_size: how much of the update the search took; 1 without a search.
      shortened: the full update would not do, and the search took less of it.
      solved: the linear system behind the step was solved, as far as the solver can tell.
      at_boundary: the direction ends where the policy's radius stopped it.
    """

    finite: jax.Array
    evaluated: jax.Array
    loss: jax.Array
    loss_after: jax.Array
    predicted: jax.Array
    rounding: ScalarLike = 0.0
    curvature: ScalarLike = float("nan")
    shown: ScalarLike = float("nan")
    norm: ScalarLike = 0.0
    descends: bool | jax.Array = True
    step_size: ScalarLike = 1.0
    shortened: bool | jax.Array = False
    solved: bool | jax.Array = True
    at_boundary: bool | jax.Array = False

    @property
    def actual(self) -> jax.Array:
        """Decrease of the loss; minus infinity where the loss after the step was computed and is no finite number."""
        change = self.loss - self.loss_after
        lost = self.evaluated & ~jnp.isfinite(self.loss_after)
        return jnp.where(lost, jnp.full_like(change, -jnp.inf), change)

    @property
    def rho(self) -> jax.Array:
        """Actual over predicted decrease; NaN if the model predicts none."""
        descends = self.predicted > 0
        ratio = self.actual / jnp.where(descends, self.predicted, jnp.ones_like(self.predicted))
        return jnp.where(descends, ratio, jnp.full_like(ratio, jnp.nan))

    @property
    def safe_rho(self) -> jax.Array:
        """Actual over predicted decrease, `rounding` added to both: near 1 where rounding is all that there is.

        1 for a step that neither promises nor changes anything, NaN if more of an increase is predicted than rounding.
        """
        gained, promised = self.actual + self.rounding, self.predicted + self.rounding
        ratio = gained / jnp.where(promised > 0, promised, jnp.ones_like(promised))
        still = jnp.where(gained >= 0, jnp.ones_like(ratio), jnp.full_like(ratio, -jnp.inf))
        return jnp.where(promised > 0, ratio, jnp.where(promised == 0, still, jnp.full_like(ratio, jnp.nan)))


class Damping(abc.ABC):
    """The policy that owns lam, the multiple of the identity added to the curvature.

    An implementor is a frozen dataclass. It must say `name` and `evaluate_every`, and write `init`, `lam`, `accepts`
    and `update`, pure functions of a state of fixed shapes. `requirements` follows from `evaluate_every`: a policy that
    looks at outcomes costs a forward pass and a curvature product at the steps at which it looks.

    Attributes:
      factors: multiples of lam of which a step takes the one with the lowest loss behind it; lam alone by default.
        `None` leaves it to the plan, which tries several where the planner chose a solver to which they cost little.
    """

    factors: tuple[float, ...] | None = (1.0,)

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """The policy's name in the plan."""

    @property
    @abc.abstractmethod
    def evaluate_every(self) -> int | None:
        """Every how many steps it needs the loss after the step and the predicted decrease; `None` for never."""

    @property
    def needs_search(self) -> bool:
        """Whether it reads the step size that a search found; no by default."""
        return False

    def requirements(self) -> tuple[Requirement, ...]:
        """The parts of a step that it asks for, with their cadence."""
        if self.evaluate_every is None:
            return ()
        cadence, by = Cadence((self.evaluate_every,)), f"damping: {self.name}"
        return tuple(Requirement(part, cadence, by) for part in (Part.LOSS_AFTER, Part.PREDICTED))

    @abc.abstractmethod
    def init(self) -> Any:
        """State of fixed shapes and dtypes."""

    @abc.abstractmethod
    def lam(self, state: Any) -> jax.Array:
        """The damping of this step."""

    @property
    def has_radius(self) -> bool:
        """Whether it bounds the norm of the direction, which the solver must then keep to; no by default."""
        return False

    def radius(self, state: Any) -> jax.Array | None:
        """The bound on the norm of this step's direction; `None` for none."""
        del state
        return None

    def lams(self, state: Any, factors: tuple[float, ...]) -> jax.Array:
        """The dampings that this step tries, (k,); by default all multiples of lam."""
        lam = self.lam(state)
        return lam * jnp.asarray(factors, lam.dtype)

    def chosen(self, state: Any, lam: jax.Array) -> Any:
        """The state of a step that took this one of the multiples of lam; by default as it is."""
        del lam
        return state

    def start(self, state: Any, loss: jax.Array, gradient_norm: Callable[[], jax.Array]) -> Any:
        """The state once loss and gradient of a step are known, from which a first damping can be taken."""
        del loss, gradient_norm
        return state

    def trusts(self, state: Any) -> jax.Array:
        """Whether momentum may use the previous steps as a guide for the next one. True by default."""
        del state
        return jnp.asarray(True)

    def demands(self, state: Any, norm: jax.Array) -> jax.Array:
        """Whether a step of this length must be evaluated, although it is not due; never by default."""
        del state, norm
        return jnp.asarray(False)

    @abc.abstractmethod
    def accepts(self, outcome: Outcome) -> jax.Array:
        """Whether an evaluated, finite step may be taken."""

    @abc.abstractmethod
    def update(self, state: Any, outcome: Outcome, due: jax.Array) -> Any:
        """The next state.

        Args:
          due: whether this step is one of the policy's own (`evaluate_every`, `demands`); others may have evaluated
            it too.
        """


def scalar(value: ScalarLike) -> jax.Array:
    """A strongly typed scalar in the default float dtype (float64 with x64, else float32)."""
    return jnp.asarray(value, jnp.result_type(float))
