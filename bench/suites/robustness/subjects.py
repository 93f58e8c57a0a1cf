"""Who is tried: curvax at defaults, python-somax at defaults, the nearest method of Optax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax

import curvax
from bench import libraries
from bench.libraries import SOMAX
from bench.suites.robustness.case import Batch, Params, Stepper, Task

_ADAMW_RATE = 1e-2
_BAD_UPDATES = 1000  # as many in a row as a run has steps: Optax's guard gives up after that


@dataclasses.dataclass(frozen=True)
class Subject:
    """A method.

    Attributes:
      name: the rows' provider.
      build: task -> stepper, or `None` where it does not apply.
    """

    name: str
    build: Callable[[Task], Stepper | None]


@dataclasses.dataclass(frozen=True, eq=False)
class _MethodStepper:
    """A method of curvax or python-somax."""

    method: Any
    by_layer: bool = False

    def init(self, params: Params, batch: Batch) -> Any:
        return self.method.init(params, batch=batch) if self.by_layer else self.method.init(params)

    def step(self, params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        params, state, _ = self.method.step(params, batch, state, libraries.key_for(self.method))
        return params, state


@dataclasses.dataclass(frozen=True, eq=False)
class _OptaxStepper:
    tx: optax.GradientTransformationExtraArgs
    task: Task

    def init(self, params: Params, batch: Batch) -> Any:
        del batch
        return self.tx.init(params)

    def step(self, params: Params, state: Any, batch: Batch) -> tuple[Params, Any]:
        def objective(p: Params) -> jax.Array:
            return self.task.objective(p, batch)

        loss, gradient = jax.value_and_grad(objective)(params)
        updates, state = self.tx.update(gradient, state, params, value=loss, grad=gradient, value_fn=objective)
        return optax.apply_updates(params, updates), state


def _options(task: Task, *, hessian: bool) -> dict[str, Any]:
    rate = {} if task.learning_rate is None else {"learning_rate": task.learning_rate}
    if hessian and task.loss_fn is not None:
        return {"loss_fn": task.loss_fn, **rate}
    return {"predict_fn": task.predict_fn, "loss": task.loss, "weight_key": task.weight_key, **rate}


def _curvax(name: str, *, hessian: bool = False, by_layer: bool = False) -> Subject:
    def build(task: Task) -> Stepper | None:
        # Models in float64 here have few parameters and no layers.
        if (task.predict_fn is None and not hessian) or (by_layer and task.float64):
            return None
        return _MethodStepper(curvax.make(name, **_options(task, hessian=hessian)), by_layer)

    return Subject(name, build)


def _dense_newton() -> Subject:
    """For functions of few variables; elsewhere `newton_cg` stands for both."""
    inner = _curvax("newton_direct", hessian=True)
    return Subject(inner.name, lambda task: None if task.loss_fn is None else inner.build(task))


def _somax(task: Task) -> Stepper | None:
    if not task.somax or not libraries.has_somax():
        return None
    rate = {} if task.learning_rate is None else {"learning_rate": task.learning_rate}
    model = {"predict_fn": task.predict_fn} if task.loss_fn is None else {"loss_fn": task.loss_fn}
    return _MethodStepper(libraries.make(SOMAX, task.somax, **model, **rate))


def _optax(task: Task) -> Stepper:
    """L-BFGS with its line search for functions; AdamW behind Optax's guard against bad gradients for batches."""
    if task.loss_fn is not None:
        return _OptaxStepper(optax.lbfgs(), task)
    rate = _ADAMW_RATE if task.learning_rate is None else task.learning_rate
    guarded = optax.apply_if_finite(optax.adamw(rate), _BAD_UPDATES)
    return _OptaxStepper(optax.with_extra_args_support(guarded), task)


OPTAX = "optax"
SUBJECTS = (
    _curvax("gauss_newton"),
    _curvax("newton_cg", hessian=True),
    _dense_newton(),
    _curvax("egn"),
    _curvax("kfac", by_layer=True),
    Subject(SOMAX, _somax),
    Subject(OPTAX, _optax),
)
