"""What a step costs: that of every method as it trains, and the inner loops beside as many plain updates.

Inner loops are timed without their line search: as many gradients, each with its update, on the same batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bench import run
from bench.schema import Row
from bench.suites.layerwise.contenders import Contender, Trainer, curvax_method, gauss_newton, muon
from bench.suites.layerwise.setting import Setting
from bench.suites.layerwise.study import SUITE, Study

_PLAIN, _FULL = "muon + adamw, an update per part", "full_gn"
_RATE = 1e-4
_SHARES = (1, 2, 4)


def methods(study: Study, case: str, contenders: Sequence[Contender]) -> list[Row]:
    """Milliseconds of a step of each method, the mean over its period unless the batch is so large that none shows."""
    large = study.setting.tokens > 2**15
    each = [(c.name, c.build(study.setting), 1 if large else c.period) for c in contenders]
    return _timed(study, case, each, {})


def inner_loops(study: Study, case: str) -> list[Row]:
    """Milliseconds of plain, full and layerwise inner loops, then floating-point operations as the plan counts them."""
    setting = study.setting
    trainers = {_PLAIN: _plain(setting), _FULL: _step(setting, layerwise=False)}
    for shares in _SHARES:
        trainers[_name(shares)] = _step(setting, layerwise=True, shares=shares)
    quotients = {_FULL: [(_PLAIN, None)]} | {_name(s): [(_FULL, 1.3), (_PLAIN, 2.0)] for s in _SHARES}
    results = _timed(study, case, [(name, trainer, 1) for name, trainer in trainers.items()], quotients)
    return [*results, *_flops(study, case)]


def _timed(
    study: Study,
    case: str,
    trainers: Sequence[tuple[str, Trainer, int]],
    quotients: Mapping[str, Sequence[tuple[str, float | None]]],
) -> list[Row]:
    """A row for each of (name, trainer, period), timed in turns; and one for each of its (baseline, goal)."""
    setting = study.setting
    batch = jax.tree.map(jnp.asarray, study.batch(np.random.default_rng(0)))

    def candidate(name: str, trainer: Trainer, period: int) -> run.Candidate:
        def carry() -> Any:
            params = jax.tree.map(jnp.copy, study.params)
            return params, trainer.init(params, batch)

        return run.Candidate(name, lambda c: trainer.step(c[0], c[1], batch, _RATE), carry, calls=period)

    timings = run.time_all([candidate(*each) for each in trainers], setting.rounds, budget=120.0)
    by_name, results = {t.candidate.name: t for t in timings}, []
    for row in run.rows(SUITE, case, setting.x, timings):
        results.append(row)
        for baseline, goal in quotients.get(row.provider, ()):
            ratio = run.ratio(by_name[row.provider], by_name[baseline])
            provider = f"{row.provider} / {baseline}"
            results.append(dataclasses.replace(row, provider=provider, ratio=ratio, baseline=baseline, goal=goal))
    return results


def _name(shares: int) -> str:
    return "layerwise_gn" if shares == 1 else f"layerwise_gn, {shares} shares"


def _step(setting: Setting, **options: Any) -> Trainer:
    return curvax_method(functools.partial(gauss_newton, search=False, **options))(setting)


def _plain(setting: Setting) -> Trainer:
    gradient_of = jax.grad(setting.loss_fn())

    def step(params: Any, state: Any, batch: Any, rate: Any) -> tuple[Any, Any]:
        tx = muon(rate)

        def one(carry: Any, piece: Any) -> Any:
            p, s = carry
            updates, s = tx.update(gradient_of(p, piece), s, p)
            return (optax.apply_updates(p, updates), s), None

        pieces = jax.tree.map(lambda a: a.reshape(setting.parts, setting.part, *a.shape[1:]), batch)
        return jax.lax.scan(one, (params, state), pieces)[0]

    return Trainer(lambda params, _: muon(_RATE).init(params), jax.jit(step, donate_argnums=(0, 1)))


def _flops(study: Study, case: str) -> list[Row]:
    """The same quotient, counted in floating-point operations of an inner gradient."""
    setting, results = study.setting, []
    batch = jax.eval_shape(lambda: study.batch(np.random.default_rng(0)))
    for shares in _SHARES:
        plan = gauss_newton(setting, _RATE, layerwise=True, shares=shares).plan_for(study.params, batch)
        if plan.own is None or plan.full is None or plan.over_full is None:
            raise AssertionError("a plan for shapes counts.")
        if not results:
            value = plan.full.flops / 1e9
            results.append(Row(SUITE, case, _FULL, "GFLOP", setting.x, value, value, value))
        value = plan.own.flops / 1e9
        results.append(Row(SUITE, case, _name(shares), "GFLOP", setting.x, value, value, value, plan.over_full, _FULL))
    return results
