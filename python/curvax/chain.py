"""The Optax chain applied to the direction s."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax

from curvax.curvature.partition import is_function
from curvax.tree import PyTree

ScalarOrSchedule = float | jax.Array | optax.Schedule


def build_transform(
    *,
    learning_rate: ScalarOrSchedule = 1.0,
    clip_norm: float | None = None,
    clip_value: float | None = None,
    weight_decay: ScalarOrSchedule | None = None,
    weight_decay_mask: Any | None = None,
    direction_momentum: float | None = None,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Momentum, then clipping by global norm and of entries, then decoupled weight decay, then minus the learning rate.

    Args:
      learning_rate: scalar or schedule; 1 takes the full direction.
      clip_norm: bound on the global norm of the direction.
      clip_value: bound on each entry of the direction.
      weight_decay: coefficient of decoupled weight decay.
      weight_decay_mask: tree of booleans like the parameters, or a function to one.
      direction_momentum: decay of an `optax.trace` of directions.
      nesterov: Nesterov form of that trace.

    Raises:
      ValueError: `nesterov` without momentum.
    """
    check_learning_rate(learning_rate)
    if nesterov and direction_momentum is None:
        raise ValueError("nesterov needs direction_momentum.")
    if direction_momentum is None and clip_norm is None:
        return EntrywiseUpdate(
            learning_rate, clip_value=clip_value, weight_decay=weight_decay, weight_decay_mask=weight_decay_mask
        )
    parts: list[optax.GradientTransformation] = []
    if direction_momentum is not None:
        parts.append(optax.trace(decay=direction_momentum, nesterov=nesterov))
    if clip_norm is not None:
        parts.append(optax.clip_by_global_norm(clip_norm))
    if clip_value is not None:
        parts.append(optax.clip(clip_value))
    if weight_decay is not None:
        parts.append(optax.add_decayed_weights(weight_decay, mask=trainable_mask(weight_decay_mask)))
    return RatedUpdate(parts, learning_rate)


class RatedUpdate(optax.GradientTransformationExtraArgs):
    """An Optax chain that ends with minus the learning rate, and can say what that is.

    Attributes:
      learning_rate: number or schedule.
    """

    learning_rate: ScalarOrSchedule

    def __new__(cls, parts: Sequence[optax.GradientTransformation], learning_rate: ScalarOrSchedule) -> Self:
        check_learning_rate(learning_rate)
        chain = optax.with_extra_args_support(optax.chain(*parts, optax.scale_by_learning_rate(learning_rate)))
        self = super().__new__(cls, chain.init, chain.update)
        self.learning_rate = learning_rate
        return self

    def rate(self, state: Any, dtype: Any) -> tuple[jax.Array, Any]:
        """Minus the learning rate of this step, and the next state."""
        *before, own = state
        rate, own = optax.scale_by_learning_rate(self.learning_rate).update(jnp.ones((), dtype), own)
        return jnp.asarray(rate), (*before, own)


class EntrywiseUpdate(RatedUpdate):
    """Clipping of each entry, then decoupled weight decay, then minus the learning rate.

    It is the Optax chain of these, with that chain's state, and knows what it is made of, so that a kernel can do all
    of it in the pass that makes the direction.

    Attributes:
      learning_rate: number or schedule.
      clip_value: bound on each entry, or `None`.
      weight_decay, weight_decay_mask: as in `build_transform`.
    """

    clip_value: float | None
    weight_decay: ScalarOrSchedule | None
    weight_decay_mask: Any | None

    def __new__(
        cls,
        learning_rate: ScalarOrSchedule,
        *,
        clip_value: float | None = None,
        weight_decay: ScalarOrSchedule | None = None,
        weight_decay_mask: Any | None = None,
    ) -> Self:
        parts: list[optax.GradientTransformation] = []
        if clip_value is not None:
            parts.append(optax.clip(clip_value))
        if weight_decay is not None:
            parts.append(optax.add_decayed_weights(weight_decay, mask=trainable_mask(weight_decay_mask)))
        self = super().__new__(cls, parts, learning_rate)
        self.clip_value, self.weight_decay, self.weight_decay_mask = clip_value, weight_decay, weight_decay_mask
        return self

    @property
    def constant_decay(self) -> jax.Array | float | None:
        """The coefficient of weight decay, 0 without any; `None` if it is a schedule."""
        if self.weight_decay is None:
            return 0.0
        return None if callable(self.weight_decay) else self.weight_decay

    def decays(self, params: PyTree) -> PyTree:
        """Booleans in the structure of `params`: where weight decay applies."""
        mask = trainable_mask(self.weight_decay_mask)
        chosen = mask(params) if callable(mask) else True
        return jax.tree.map(lambda flag, below: jax.tree.map(lambda _: bool(flag), below), chosen, params)


def learning_rate_of(transform: optax.GradientTransformation) -> ScalarOrSchedule | None:
    """The learning rate of a chain that can say it; `None` for any other Optax transform."""
    return transform.learning_rate if isinstance(transform, RatedUpdate) else None


def entrywise_update(transform: optax.GradientTransformation) -> EntrywiseUpdate | None:
    """The transform, if it is a chain that acts entry by entry and knows its parts; else `None`."""
    return transform if isinstance(transform, EntrywiseUpdate) else None


def check_learning_rate(learning_rate: Any) -> None:
    """Raises TypeError for what is neither a number nor a schedule. None would leave out the sign of descent."""
    if learning_rate is None or isinstance(learning_rate, str | bool | dict | list | tuple):
        raise TypeError("learning_rate must be a number or an Optax schedule: 1.0 takes the full direction.")


def check_rates(learning_rate: Any, weight_decay: Any, **decays: Any) -> None:
    """Raises for rates that no optimizer takes; what is traced or a schedule is believed.

    Args:
      learning_rate: a number or a schedule.
      weight_decay: at least 0.
      decays: decays of running averages by name, in [0, 1).

    Raises:
      TypeError, ValueError: a rate of another kind or out of its range.
    """
    check_learning_rate(learning_rate)
    for name, value in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if isinstance(value, int | float) and not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be at least 0 and finite, not {value}.")
    for name, value in decays.items():
        if isinstance(value, int | float) and not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), not {value}.")


def trainable_mask(mask: Any | None) -> Any | None:
    """A mask over all parameters as one over the trainable ones, which hold `None` for frozen leaves."""
    if mask is None or is_function(mask):
        return mask

    def restrict(trainable: PyTree) -> PyTree:
        return jax.tree.map(lambda p, m: None if p is None else m, trainable, mask, is_leaf=lambda p: p is None)

    return restrict
