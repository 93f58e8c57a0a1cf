"""Who competes: `gauss_newton` and other presets as they come, first-order methods and L-BFGS at tuned rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import jax
import numpy as np
import optax

import curvax
from bench.suites.untuned.problems import Problem
from bench.suites.untuned.problems.problem import Batch, Params
from curvax.layerwise import full_gn, layerwise_gn
from curvax.optimizers import muon_adamw, soap
from curvax.plan.cost import Cost

Stepped: TypeAlias = tuple[Params, Any, jax.Array]


class Step(Protocol):
    """One step."""

    def __call__(self, params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
        """Returns (parameters, state, the batch's loss before the step)."""
        ...


class Trainer(NamedTuple):
    """A method on a problem, to be compiled. The learning rate is an operand, so that a grid is one compilation."""

    init: Callable[[Params, Batch], Any]
    step: Step
    method: curvax.Method | None = None

    def planned(self, params: Params, batch: Batch) -> Cost:
        """The cost of a step as its plan has it, before anything is compiled; nothing for methods without a plan."""
        return Cost() if self.method is None else self.method.plan_for(params, batch).cost


class Minimized(Protocol):
    """What a first-order method wants of a problem."""

    def objective(self, params: Params, batch: Batch, /) -> jax.Array:
        """The loss of a batch."""
        ...


P = TypeVar("P")


@dataclasses.dataclass(frozen=True)
class Contender(Generic[P]):
    """A method.

    Attributes:
      name: the rows' provider.
      build: problem -> trainer.
      kind: "untuned" methods should beat tuned AdamW, "preset"s at defaults should not end above their start, and
        "tuned" methods are the yardsticks.
      rates: learning rates that it is tuned over; none where it has its own.
      full_batch: whether it needs a loss that is the same function in every step.
    """

    name: str
    build: Callable[[P], Trainer]
    kind: Literal["untuned", "preset", "tuned"]
    rates: tuple[float, ...] = ()
    full_batch: bool = False

    def runs_on(self, problem: Problem) -> bool:
        """Whether it can compete."""
        return problem.full_batch or not self.full_batch


def _preset(make: Callable[[Problem], curvax.Method]) -> Callable[[Problem], Trainer]:
    def build(problem: Problem) -> Trainer:
        method = make(problem)

        def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
            del rate
            params, state, info = method.step(params, batch, state, key)
            return params, state, info["loss"]

        return Trainer(lambda params, batch: method.init(params, batch=batch), step, method)

    return build


def _by_name(name: str) -> Callable[[Problem], Trainer]:
    return _preset(lambda p: curvax.make(name, predict_fn=p.predict_fn, loss=p.loss))


def _quadratic(name: str) -> Callable[[Problem], Trainer]:
    """A K-FAC preset whose every step has at most the length of the exact quadratic model."""
    search = curvax.search.QuadraticModel()
    return _preset(lambda p: curvax.make(name, predict_fn=p.predict_fn, loss=p.loss, search=search))


def _inner_loop(make: Callable[..., Any]) -> Callable[[Problem], Trainer]:
    """Inner optimizer and number of minibatches have no defaults: Muon and AdamW as in the paper, a batch in four."""

    def build(problem: Problem) -> Trainer:
        inner = muon_adamw(1e-2, others=())
        method = make(predict_fn=problem.predict_fn, loss=problem.loss, inner=inner, inner_steps=3)

        def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
            del rate
            params, state, info = method.step(params, batch, state, key)
            return params, state, info["loss"]

        return Trainer(lambda params, _: method.init(params), step)

    return build


def first_order(
    make: Callable[[Any], optax.GradientTransformation], *, reuse_gradient: bool = False
) -> Callable[[Minimized], Trainer]:
    """A transformation that is made at each learning rate."""

    def build(problem: Minimized) -> Trainer:
        def method(rate: Any) -> curvax.AbstractMethod:
            return curvax.first_order(make(rate), loss_fn=problem.objective, reuse_gradient=reuse_gradient)

        def step(params: Params, state: Any, batch: Batch, rate: jax.Array, key: jax.Array) -> Stepped:
            params, state, info = method(rate).step(params, batch, state, key)
            return params, state, info["loss"]

        return Trainer(lambda params, _: method(1.0).init(params), step)

    return build


lbfgs = first_order(optax.lbfgs, reuse_gradient=True)
"""Optax's L-BFGS with its zoom line search, whose values and gradients the next step takes over."""


def _grid(low: float, high: float) -> tuple[float, ...]:
    return tuple(float(f"{rate:.2g}") for rate in np.geomspace(low, high, 12))


ADAMW, GAUSS_NEWTON = "adamw", "gauss_newton"
_RATES = _grid(1e-4, 0.3)
_PRESETS = ("sgn", "egn", "spring", "kfac", "ekfac", "sophia_g", "sophia_h", "adahessian")
CONTENDERS: tuple[Contender[Problem], ...] = (
    Contender(ADAMW, first_order(optax.adamw), "tuned", _RATES),
    Contender("soap", first_order(soap), "tuned", _RATES),
    Contender("lbfgs", lbfgs, "tuned", _grid(1e-2, 10.0), full_batch=True),
    Contender(GAUSS_NEWTON, _by_name(GAUSS_NEWTON), "untuned"),
    *(Contender(name, _by_name(name), "preset") for name in _PRESETS),
    Contender("full_gn", _inner_loop(full_gn), "preset"),
    Contender("layerwise_gn", _inner_loop(layerwise_gn), "preset"),
)
ON_REQUEST: tuple[Contender[Problem], ...] = tuple(
    Contender(f"{name}_quadratic", _quadratic(name), "preset") for name in ("kfac", "ekfac")
)
"""Settings that were tried as defaults: they run where they are named."""


def chosen(names: str) -> tuple[Contender[Problem], ...]:
    """The contenders of a list of names with commas; all of them for no name.

    Raises:
      ValueError: a name is unknown.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {c.name: c for c in (*CONTENDERS, *ON_REQUEST)}
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no contender {name!r}: choose from {', '.join(known)}.")
    return tuple(known[name] for name in wanted) or CONTENDERS
