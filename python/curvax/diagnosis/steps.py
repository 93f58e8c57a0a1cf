"""What a step of each preset is predicted to take on this device, from its plan: nothing is compiled."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import jax

from curvax import methods, tree
from curvax.curvature import Model
from curvax.losses import Loss
from curvax.plan.machine import machine
from curvax.plan.plan import bytes_text, time_text
from curvax.tree import PyTree

PRESETS = (
    "gauss_newton", "egn", "sgn", "spring", "kfac", "ekfac", "newton_cg", "sophia_g", "sophia_h", "adahessian",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The predicted cost of an average step.

    Attributes:
      preset: its name.
      seconds, bytes: of a step, and alive at its peak; `None` for a preset that does not serve this model and loss.
      reason: why it does not, else empty.
    """

    preset: str
    seconds: float | None
    bytes: float | None
    reason: str = ""

    def __str__(self) -> str:
        if self.seconds is None or self.bytes is None:
            return f"{self.preset:<14}-- {self.reason}"
        return f"{self.preset:<14}{time_text(self.seconds):>10}{bytes_text(self.bytes):>11}"


def step_costs(model: Model, loss: Loss, params: PyTree, batch: Any, model_state: PyTree) -> tuple[StepCost, ...]:
    """Of the presets for a model and a loss, on one batch, without eigenvectors and inverses of Kronecker factors."""
    options = {
        "predict_fn": model.predict_fn,
        "loss": loss,
        "x_key": model.x_key,
        "y_key": model.y_key,
        "weight_key": model.weight_key,
        "batch_axes": model.batch_axes,
        "has_state": model.extras.has_state,
        "has_aux": model.extras.has_aux,
        "has_rng": model.extras.has_rng,
        "frozen": model.extras.partition.frozen,
    }
    itemsize = tree.scalar_dtype(params).itemsize
    return tuple(_cost(name, options, (params, batch, model_state), itemsize) for name in PRESETS)


def _cost(preset: str, options: dict[str, Any], at: tuple[PyTree, Any, PyTree], itemsize: int) -> StepCost:
    known = methods.describe(preset).signature.parameters
    own = {word: value for word, value in options.items() if word in known}
    params, batch, model_state = at
    try:
        with warnings.catch_warnings():
            # A fallback from a kernel is no matter here.
            warnings.simplefilter("ignore", UserWarning)
            plan = methods.make(preset, **own).plan_for(params, batch, model_state=model_state)
    except (TypeError, ValueError, jax.errors.JAXTypeError) as error:
        return StepCost(preset, None, None, str(error).splitlines()[0])
    return StepCost(preset, machine().seconds(plan.cost, itemsize), plan.cost.memory)
