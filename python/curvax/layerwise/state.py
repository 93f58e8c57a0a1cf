"""What a full or layerwise Gauss-Newton method carries from step to step, and within a step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from curvax.execute import AbstractState, Layout
from curvax.origin import Origin
from curvax.state_version import STATE_VERSION
from curvax.tree import PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OuterState(AbstractState):
    """State between steps; a pytree of arrays with fixed shapes and dtypes, so any checkpointer can store it.

    Attributes:
      step, rejected: steps so far, and those of them that were not taken, int32.
      inner: the inner solver's state.
      offset: where the next inner loop starts, relative to the parameters, in the accumulation dtype; `()` without
        warm start.
      model_state: mutable model state, or `None`.
      layout: what parameters the state belongs to; static.
      origin: what modules made it; static.
      version: of the form of the state; static.
    """

    step: jax.Array
    rejected: jax.Array
    inner: Any
    offset: PyTree
    model_state: PyTree
    layout: Layout = dataclasses.field(metadata={"static": True})
    origin: Origin = dataclasses.field(metadata={"static": True})
    version: int = dataclasses.field(default=STATE_VERSION, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Progress:
    """What minibatches change within a step.

    Attributes:
      delta: theta - theta0, in the accumulation dtype.
      inner: the inner solver's state.
      index: minibatches so far, int32.
      loss: sum of their losses at theta0.
      model_state: the model's state.
      result, iterations, residual: of the last linear solve.
      batch_fault: the worst of the batches, a `curvax.losses.BatchFault`.
      losses: of a loss of several terms the sum of each, by name.
    """

    delta: PyTree
    inner: Any
    index: jax.Array
    loss: jax.Array
    model_state: PyTree
    result: jax.Array
    iterations: jax.Array
    residual: jax.Array
    batch_fault: jax.Array
    losses: dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """A step under way.

    Attributes:
      params: theta0, the trainable parameters as they were passed to `start`.
      frozen: the other parameters.
      before: the state that the step began with.
      key: random key of the step, or `None`.
      progress: what the minibatches have changed.
    """

    params: PyTree
    frozen: PyTree
    before: OuterState
    key: jax.Array | None
    progress: Progress
