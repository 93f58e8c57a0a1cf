"""The Optax chain applied to the direction s."""

from __future__ import annotations

from typing import Any

import jax
import optax

from curvax.curvature.partition import is_function
from curvax.tree import PyTree

ScalarOrSchedule = float | jax.Array | optax.Schedule


def build_transform(
    *,
    tx: optax.GradientTransformation | None = None,
    learning_rate: ScalarOrSchedule = 1.0,
    clip_norm: float | None = None,
    weight_decay: float | None = None,
    weight_decay_mask: Any | None = None,
    direction_momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """momentum, then clipping by global norm, then decoupled weight decay, then minus the learning rate; or `tx`.

    Args:
      tx: an Optax chain that turns the direction into the update, sign included (end it with
        `optax.scale_by_learning_rate`). All other arguments must then keep their defaults.
      learning_rate: scalar or schedule; 1 takes the full direction.
      clip_norm: bound on the global norm of the direction.
      weight_decay: coefficient of decoupled weight decay.
      weight_decay_mask: tree of booleans like the parameters, or a function to one.
      direction_momentum: decay of an `optax.trace` of directions.
      nesterov: Nesterov form of that trace.

    Raises:
      ValueError: both `tx` and another knob are given, or `nesterov` without momentum.
    """
    knobs = {
        "clip_norm": clip_norm,
        "weight_decay": weight_decay,
        "weight_decay_mask": weight_decay_mask,
        "direction_momentum": direction_momentum,
        "nesterov": nesterov or None,
        "learning_rate": None if isinstance(learning_rate, int | float) and learning_rate == 1 else learning_rate,
    }
    given = [name for name, value in knobs.items() if value is not None]
    if tx is not None:
        if given:
            raise ValueError(f"tx already is the whole transform: drop {', '.join(given)}, or drop tx.")
        return optax.with_extra_args_support(tx)
    check_learning_rate(learning_rate)
    if nesterov and direction_momentum is None:
        raise ValueError("nesterov needs direction_momentum.")
    parts: list[optax.GradientTransformation] = []
    if direction_momentum is not None:
        parts.append(optax.trace(decay=direction_momentum, nesterov=nesterov))
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask=trainable_mask(weight_decay_mask)))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    return optax.with_extra_args_support(optax.chain(*parts))


def check_learning_rate(learning_rate: Any) -> None:
    """Raises TypeError for what is neither a number nor a schedule. None would leave out the sign of descent."""
    if learning_rate is None or isinstance(learning_rate, str):
        raise TypeError("learning_rate must be a number or an Optax schedule: 1.0 takes the full direction.")


def trainable_mask(mask: Any | None) -> Any | None:
    """A mask over all parameters as one over the trainable ones, which hold `None` for frozen leaves."""
    if mask is None or is_function(mask):
        return mask

    def restrict(trainable: PyTree) -> PyTree:
        return jax.tree.map(lambda p, m: None if p is None else m, trainable, mask, is_leaf=lambda p: p is None)

    return restrict
