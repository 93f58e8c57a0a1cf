"""When a run ends, and what is measured on the way."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from curvax.tree import PyTree


class Reason(enum.StrEnum):
    """Why a run ended; the value says it."""

    STEPS = "all steps are done"
    LOSS = "the loss is as low as was asked for"
    GRADIENT = "the gradient is as small as was asked for"
    SECONDS = "the time is over"
    PATIENCE = "nothing improved for as long as was allowed"
    BATCHES = "the batches came to their end"
    INTERRUPTED = "it was interrupted"


@dataclasses.dataclass(frozen=True)
class Stop:
    """When a run ends before its steps are done; the first rule that holds ends it.

    Attributes:
      loss: the training loss of a step is at most this; the run ends with that very step.
      gradient: likewise the norm of the gradient, which takes `metrics=(MetricRecord("gradient_norm"),)` of the method.
      seconds: of training, compilation and evaluations left out; a chunk under way is finished.
      patience: so many steps since the best evaluation, or since the least training loss where nothing is evaluated;
        looked at after every chunk.
    """

    loss: float | None = None
    gradient: float | None = None
    seconds: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        for name in ("seconds", "patience"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"Stop: {name} must be positive, not {value}.")


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """A measure of the parameters, taken before the first step, on the way and at the end.

    The clock of the history stands still meanwhile.

    Attributes:
      function: `function(params)`, and of models with state `function(params, model_state)` -> a scalar, or a mapping
        of names to scalars, of which the first chooses the best parameters.
      every: steps between evaluations; `None`, the default, evaluates after every chunk of steps, about every half
        second, and more often at the beginning, as chunks grow.
      largest: the largest value is the best one, not the smallest.
      name: of a scalar, in `history.evaluations`.
      jit: `False` for a function that does not trace, as it draws or prints.
    """

    function: Callable[..., Any]
    every: int | None = None
    largest: bool = False
    name: str = "value"
    jit: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError("Evaluate: function must be a function of the parameters that returns a scalar.")
        if self.every is not None and self.every < 1:
            raise ValueError(f"Evaluate: every must be 1 or more steps, not {self.every}.")


class Evaluator:
    """Evaluations under way: the function, compiled once, and the best parameters by it.

    Attributes:
      best: (params, model state) of the best value so far.
      value: that value; NaN until there is one.
    """

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self._function = jax.jit(evaluate.function) if evaluate.jit else evaluate.function
        self.best: tuple[PyTree, PyTree] | None = None
        self.value = math.nan

    def __call__(self, params: PyTree, model_state: PyTree) -> tuple[Mapping[str, float], bool]:
        """(values by name, whether they are the best so far); copies the parameters if they are."""
        returned = self._function(params) if model_state is None else self._function(params, model_state)
        named = returned if isinstance(returned, Mapping) else {self.evaluate.name: returned}
        values = {str(name): float(value) for name, value in jax.device_get(dict(named)).items()}
        value = next(iter(values.values()))
        sign = -1 if self.evaluate.largest else 1
        better = not math.isnan(value) and not sign * value >= sign * self.value
        if better:
            self.value, self.best = value, copied((params, model_state))
        return values, better


def copied(tree: PyTree) -> PyTree:
    """A copy of all arrays, which no donation takes away, with dtypes that no promotion changes."""

    def one(x: Any) -> jax.Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jnp.copy(x)
        return jnp.array(x, dtype=jnp.result_type(x), copy=True)

    return jax.tree.map(one, tree)
