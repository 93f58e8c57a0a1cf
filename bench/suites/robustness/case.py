"""A hard case, and what a method makes of it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from curvax.losses import Loss

Params: TypeAlias = Any
Batch: TypeAlias = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What several cases share: a step of a method is compiled once for all of them.

    Attributes:
      name: of the task, for messages.
      predict_fn: (params, inputs) -> outputs; `None` where there is only `loss_fn`.
      loss: in output space.
      loss_fn: (params, batch) -> scalar; `None` for that of model and loss.
      somax: python-somax's preset for it, or "" where it has none.
      weight_key: as in curvax.
      learning_rate: of all methods; `None` for their defaults.
      float64: whether it runs in float64.
    """

    name: str
    predict_fn: Callable[[Params, Any], jax.Array] | None = None
    loss: Loss | None = None
    loss_fn: Callable[[Params, Batch], jax.Array] | None = None
    somax: str = ""
    weight_key: str | None = None
    learning_rate: float | None = None
    float64: bool = False

    def objective(self, params: Params, batch: Batch) -> jax.Array:
        """The loss of a batch."""
        if self.loss_fn is not None:
            return self.loss_fn(params, batch)
        if self.predict_fn is None or self.loss is None:
            raise ValueError(f"the task {self.name!r} has neither a model with a loss nor a loss function.")
        outputs = self.predict_fn(params, batch["x"])
        weights = None if self.weight_key is None else batch[self.weight_key]
        return self.loss.value(outputs, batch["y"], self.loss.effective_weights(outputs, weights))


def always(step: int) -> bool:
    """No step is clean."""
    del step
    return True


@dataclasses.dataclass(frozen=True)
class Case:
    """A task with a start and batches.

    Attributes:
      name: the rows' case.
      task: shared with similar cases.
      start: parameters.
      batch: the clean batch, on which progress is measured.
      poison: what some steps get instead; several batches take turns.
      poisoned: which steps these are.
      steps: of the run.
      minimum: loss at or below which the minimum counts as reached.
    """

    name: str
    task: Task
    start: Params
    batch: Batch
    minimum: float
    poison: Batch | tuple[Batch, ...] = ()
    poisoned: Callable[[int], bool] = always
    steps: int = 200

    def batch_of(self, step: int) -> Batch:
        """What a step gets."""
        several = self.poison if isinstance(self.poison, tuple) else (self.poison,)
        return several[step % len(several)] if several and self.poisoned(step) else self.batch


class Stepper(Protocol):
    """A method on a task."""

    def init(self, params: Params, batch: Batch) -> Any:
        """The state."""
        ...

    def step(self, params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        """One step."""
        ...


class Outcome(NamedTuple):
    """How a run went.

    Attributes:
      finite: whether parameters were finite after every step.
      start, final: loss on the clean batch; infinite where parameters are not finite.
      steps: to the minimum; infinite where the run does not end there.
      error: what was raised, or "".
    """

    finite: bool
    start: float
    final: float
    steps: float
    error: str = ""

    @property
    def recovered(self) -> bool:
        """Whether it ends no worse than it began."""
        return self.finite and self.final <= self.start * (1 + 1e-5)


class Compiled:
    """A stepper with its loss and its check for finite numbers, as one jitted function."""

    def __init__(self, task: Task, stepper: Stepper) -> None:
        self.init = stepper.init
        self.objective = jax.jit(task.objective)

        def advance(params: Params, state: Any, batch: Batch, clean: Batch) -> tuple[Params, Any, jax.Array, jax.Array]:
            params, state = stepper.step(params, state, batch)
            finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(params)]))
            return params, state, task.objective(params, clean), finite

        self.advance = jax.jit(advance)

    def run(self, case: Case) -> Outcome:
        """Trains on a case; an exception is an outcome too, as a peer may not support a dtype, say."""
        params, clean, poison = jax.tree.map(jnp.asarray, (case.start, case.batch, case.poison))
        case = dataclasses.replace(case, batch=clean, poison=poison)
        start = _number(self.objective(params, clean))
        seen = []
        try:
            state = self.init(params, clean)
            for step in range(case.steps):
                params, state, loss, finite = self.advance(params, state, case.batch_of(step), clean)
                seen.append((loss, finite))
        except Exception as error:
            return Outcome(False, start, math.inf, math.inf, f"{type(error).__name__}: {error}".splitlines()[0][:80])
        losses = np.asarray([_number(loss) for loss, _ in seen])
        finite = all(bool(f) for _, f in seen)
        final = float(losses[-1]) if finite else math.inf
        reached = start <= case.minimum or bool(np.any(losses <= case.minimum))
        arrived = finite and final <= case.minimum and reached
        first = 0 if start <= case.minimum else int(np.argmax(losses <= case.minimum)) + 1
        return Outcome(finite, start, final, float(first) if arrived else math.inf)


def _number(loss: jax.Array) -> float:
    value = float(loss)
    return value if math.isfinite(value) else math.inf
