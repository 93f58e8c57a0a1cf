"""The methods: what makes a trainer out of a setting and a learning rate."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from examples.language_model import model

import curvax
from bench.suites.layerwise.setting import Setting
from curvax.layerwise import ByGroup, InnerLoopMethod, LineSearch, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy
from curvax.optimizers import muon_adamw, shampoo, soap

Step = Callable[[Any, Any, Any, Any], tuple[Any, Any]]


class Trainer(NamedTuple):
    """`init(params, batch) -> state` and the jitted `step(params, state, batch, rate) -> (params, state)`.

    The learning rate is an operand, so that a grid of them is one compilation.
    """

    init: Callable[[Any, Any], Any]
    step: Step


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method.

    Attributes:
      name: the rows' provider.
      rate: customary learning rate, which the grid's factors multiply.
      build: setting -> trainer.
      goal: largest ratio of its steps to SOAP's at the largest batch, from the paper.
      brief: whether it runs in brief settings.
      period: steps after which its work repeats.
    """

    name: str
    rate: float
    build: Callable[[Setting], Trainer]
    goal: float | None = None
    brief: bool = False
    period: int = 1


def first_order(make: Callable[[Any], optax.GradientTransformation]) -> Callable[[Setting], Trainer]:
    """A trainer with one update per batch, its gradient accumulated over the parts."""

    def build(setting: Setting) -> Trainer:
        gradient_of = jax.grad(setting.loss_fn())

        def step(params: Any, state: Any, batch: Any, rate: Any) -> tuple[Any, Any]:
            pieces = jax.tree.map(lambda a: a.reshape(setting.parts, setting.part, *a.shape[1:]), batch)
            zero = jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, gradient_of(params, b)), None), zero, pieces)
            gradient = jax.tree.map(lambda g: g / setting.parts, total)
            updates, state = make(rate).update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return Trainer(lambda params, _: make(1.0).init(params), jax.jit(step, donate_argnums=(0, 1)))

    return build


def curvax_method(make: Callable[[Setting, Any], Any]) -> Callable[[Setting], Trainer]:
    """A trainer from a method of curvax."""

    def build(setting: Setting) -> Trainer:
        def init(params: Any, batch: Any) -> Any:
            method = make(setting, 1.0)
            return method.init(params) if isinstance(method, InnerLoopMethod) else method.init(params, batch=batch)

        def step(params: Any, state: Any, batch: Any, rate: Any) -> tuple[Any, Any]:
            params, state, _ = make(setting, rate).step(params, batch, state, jax.random.key(0))
            return params, state

        return Trainer(init, jax.jit(step, donate_argnums=(0, 1)))

    return build


def muon(rate: Any) -> optax.GradientTransformation:
    """Muon for the hidden matrices, AdamW for embedding and head: the paper's inner optimizer."""
    return muon_adamw(rate, others=model.OUTER)


def adamw(rate: Any) -> optax.GradientTransformation:
    """AdamW without weight decay."""
    return optax.adamw(rate, weight_decay=0.0)


def gauss_newton(
    setting: Setting,
    rate: Any,
    *,
    layerwise: bool,
    shares: int = 1,
    inner: Callable[[Any], optax.GradientTransformation] = muon,
    search: bool = True,
    prox_linear: bool = False,
    parts: int | None = None,
) -> InnerLoopMethod:
    """Full or layerwise Gauss-Newton.

    Args:
      setting: what a batch is.
      rate: of the inner optimizer.
      layerwise: with blocks.
      shares: of a minibatch (`layerwise_gn`).
      inner: rate -> inner optimizer.
      search: with a line search; without one its data goes to inner minibatches.
      prox_linear: the loss itself on linearized outputs.
      parts: cut the same batch into as many parts instead, one of them for the line search.
    """
    cut = setting if parts is None else dataclasses.replace(setting, parts=parts, search=1)
    options: dict[str, Any] = {
        **model.outputs(setting.shape),
        "loss": SoftmaxCrossEntropy(),
        "inner": inner(rate),
        "inner_steps": cut.inner if search else cut.parts,
        "line_search": LineSearch(candidates=8, minibatches=cut.search, chunk=3) if search else None,
        "prox_linear": prox_linear,
        "clip_norm": 1.0,
    }
    if layerwise:
        return layerwise_gn(partition=ByGroup(split=("layers",)), shares=shares, **options)
    return full_gn(**options)


def _inner(name: str, rate: float = 1e-2, *, layerwise: bool, goal: float | None = None, **options: Any) -> Contender:
    make = functools.partial(gauss_newton, layerwise=layerwise, **options)
    return Contender(name, rate, curvax_method(make), goal, brief=goal is not None)


def _shampoo(rate: Any) -> optax.GradientTransformation:
    return shampoo(rate, b2=0.95, every=10, eps=1e-12, graft=optax.scale_by_adam())


def _sophia(setting: Setting, rate: Any) -> Any:
    return curvax.sophia_g(predict_fn=setting.predict_fn(), learning_rate=lambda _: rate, microbatch_size=setting.part)


def _sgn(setting: Setting, rate: Any) -> Any:
    # In pieces every product repeats the forward pass.
    pieces = setting.part if setting.tokens > 2**15 else None
    return curvax.sgn_ce(
        predict_fn=setting.predict_fn(), lam_policy="trust_region", lam0=0.1, maxiter=8, learning_rate=lambda _: rate,
        microbatch_size=pieces,
    )  # fmt: skip


def _kfac(setting: Setting, rate: Any) -> Any:
    return curvax.kfac(
        predict_fn=setting.predict_fn(), loss=SoftmaxCrossEntropy(), learning_rate=lambda _: rate,
        microbatch_size=setting.part,
    )  # fmt: skip


SOAP = "soap"
FULL, LAYERWISE, SHARED = "full_gn, muon inside", "layerwise_gn, muon inside", "layerwise_gn, muon inside, 4 shares"
CONTENDERS = (
    Contender(SOAP, 1e-2, first_order(soap), brief=True, period=10),
    Contender("sgd, momentum 0.9", 0.3, first_order(lambda r: optax.sgd(r, momentum=0.9))),
    Contender("adamw", 3e-3, first_order(adamw)),
    Contender("muon + adamw", 1e-2, first_order(muon), brief=True),
    Contender("shampoo, adam's norms", 1e-2, first_order(_shampoo), period=10),
    Contender("sophia_g (curvax)", 1e-3, curvax_method(_sophia), period=10),
    _inner(FULL, layerwise=False, goal=1 / 5),
    _inner(LAYERWISE, layerwise=True, goal=1 / 3),
    _inner(SHARED, layerwise=True, shares=4, goal=1 / 3),
    Contender("kfac (curvax)", 0.3, curvax_method(_kfac), period=10),
    Contender("sgn (curvax)", 1.0, curvax_method(_sgn)),
)
ABLATIONS = (
    _inner("full_gn, adamw inside", 3e-3, layerwise=False, inner=adamw),
    _inner("full_gn, soap inside", 1e-2, layerwise=False, inner=soap),
    _inner("full_gn, no line search", layerwise=False, search=False),
    _inner("full_gn, prox-linear, no line search", layerwise=False, prox_linear=True, search=False),
    _inner("full_gn, 4 parts instead of 16", layerwise=False, parts=4),
    _inner("full_gn, 8 parts instead of 16", layerwise=False, parts=8),
    _inner("layerwise_gn, adamw inside", 3e-3, layerwise=True, shares=4, inner=adamw),
    _inner("layerwise_gn, no line search", layerwise=True, shares=4, search=False),
)


def contenders_in(setting: Setting) -> tuple[Contender, ...]:
    """Those that run in a setting, SOAP first."""
    return tuple(c for c in CONTENDERS if c.brief or not setting.brief)
