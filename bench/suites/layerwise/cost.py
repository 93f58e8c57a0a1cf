"""What a step costs: as many plain updates, full and layerwise Gauss-Newton on the same batch, without line search."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import run
from bench.schema import Row
from bench.suites.layerwise.contenders import Trainer, curvax_method, gauss_newton, muon
from bench.suites.layerwise.setting import Setting
from bench.suites.layerwise.study import SUITE, Study

_PLAIN, _FULL = "muon + adamw, an update per part", "full_gn"
_RATE = 1e-4


def rows(study: Study, case: str) -> list[Row]:
    """Milliseconds of a step, then floating-point operations as the plan counts them."""
    setting = study.setting
    batch = jax.tree.map(jnp.asarray, study.batch(np.random.default_rng(0)))
    trainers = {_PLAIN: _plain(setting), _FULL: _step(setting, layerwise=False)}
    for shares in (1, 2, 4):
        trainers[_name(shares)] = _step(setting, layerwise=True, shares=shares)

    def candidate(name: str, trainer: Trainer) -> run.Candidate:
        def carry() -> Any:
            params = jax.tree.map(jnp.copy, study.params)
            return params, trainer.init(params, batch)

        baseline = {_PLAIN: None, _FULL: _PLAIN}.get(name, _FULL)
        goal = 1.3 if name.startswith("layerwise_gn") else None
        return run.Candidate(name, lambda c: trainer.step(*c, batch), carry, baseline=baseline, goal=goal)

    timings = run.time_all([candidate(*item) for item in trainers.items()], 3 * setting.rounds)
    found = run.rows(SUITE, case, setting.x, timings)
    return [*found, *(_to_plain(setting, case, t, timings[0]) for t in timings[2:]), *_flops(study, case)]


def _name(shares: int) -> str:
    return "layerwise_gn" if shares == 1 else f"layerwise_gn, {shares} shares"


def _step(setting: Setting, **options: Any) -> Trainer:
    return curvax_method(functools.partial(gauss_newton, search=False, **options))(setting, _RATE)


def _plain(setting: Setting) -> Trainer:
    gradient_of, tx = jax.grad(setting.loss_fn()), muon(_RATE)

    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def one(carry: Any, piece: Any) -> Any:
            p, s = carry
            updates, s = tx.update(gradient_of(p, piece), s, p)
            return (optax.apply_updates(p, updates), s), None

        pieces = jax.tree.map(lambda a: a.reshape(setting.parts, setting.part, *a.shape[1:]), batch)
        return jax.lax.scan(one, (params, state), pieces)[0]

    return Trainer(lambda params, _: tx.init(params), jax.jit(step, donate_argnums=(0, 1)))


def _to_plain(setting: Setting, case: str, timing: run.Timing, plain: run.Timing) -> Row:
    spread = run.percentiles(timing.seconds * 1e3)
    return Row(
        SUITE, case, f"{timing.candidate.name}, to plain", "ms/step", setting.x, *spread,
        ratio=run.ratio(timing, plain), baseline=_PLAIN, goal=2.0, rounds=len(timing.seconds),
    )  # fmt: skip


def _flops(study: Study, case: str) -> list[Row]:
    """The same quotient, counted in floating-point operations of an inner gradient."""
    setting, found = study.setting, []
    batch = jax.eval_shape(lambda: study.batch(np.random.default_rng(0)))
    for shares in (1, 2, 4):
        plan = gauss_newton(setting, _RATE, layerwise=True, shares=shares).plan_for(study.params, batch)
        if plan.own is None or plan.full is None or plan.over_full is None:
            raise AssertionError("a plan for shapes counts.")
        if not found:
            value = plan.full.flops / 1e9
            found.append(Row(SUITE, case, _FULL, "GFLOP", setting.x, value, value, value))
        value = plan.own.flops / 1e9
        found.append(Row(SUITE, case, _name(shares), "GFLOP", setting.x, value, value, value, plan.over_full, _FULL))
    return found
