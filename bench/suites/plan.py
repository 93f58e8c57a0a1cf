"""What planning brings: the same modules with `plan="shared"` and `plan="off"`, time and memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import optax

import curvax
from bench import libraries, run
from bench.libraries import CURVAX, SOMAX
from bench.schema import Row
from bench.workloads import MLP, SMALL, WIDE, Workload

SUITE = "plan"
_MIB = 2.0**20
_OFF, _SHARED = "plan off", "plan shared"
_NEVER_SLOWER, _FASTER = 1.0, 1 / 1.5


@dataclasses.dataclass(frozen=True)
class Case:
    """One method in both modes.

    Attributes:
      name: what makes the plan matter here.
      preset, work, batch, options: the method and what it runs on.
      goal: largest time of shared over off.
      calls: steps per round, a whole cycle of the cadences.
      rounds: fewer for slow ones.
    """

    name: str
    preset: str
    work: Workload
    batch: int
    options: dict[str, Any]
    goal: float = _NEVER_SLOWER
    calls: int = 1
    rounds: int = 25


def cases() -> tuple[Case, ...]:
    """Sharing within a step, cadences, both."""
    cg = {"lam0": 0.1, "learning_rate": 1e-3, "maxiter": 20, "tol": 0.0}
    few = {**cg, "maxiter": 5}
    region = {"lam_policy": "trust_region", "lam_kwargs": {"every_k": 5}, "lam0": 10.0}
    diagonal = {"learning_rate": 1e-4}
    average = {"precond": "diag_ema", "estimator": "gnb_ce", "precond_kwargs": {"eval_every_k": 10}}
    return (
        Case("one linearization for 20 products", "sgn_ce", MLP, 128, cg),
        Case("one linearization for 5 products", "sgn_ce", MLP, 128, few),
        Case("preconditioner every 10", "sgn_ce", MLP, 128, {**few, **average}, calls=10, rounds=8),
        Case("trust region every 5, rho every 3", "sgn_ce", MLP, 128, {**few, **region, "record_rho_every_k": 3},
             calls=15, rounds=6),
        Case("trust region every 5, rho every 3", "newton_cg", MLP, 128, {**few, **region, "record_rho_every_k": 3},
             calls=15, rounds=6),
        Case("rows of one linearization", "egn_ce", MLP, 16, {"lam0": 0.1, "learning_rate": 1e-3}, rounds=6),
        Case("smallest case", "egn_ce", SMALL, 32, {"lam0": 0.1, "learning_rate": 1e-3}),
        Case("refresh every 10", "sophia_g", MLP, 128, diagonal, _FASTER, calls=10, rounds=10),
        Case("refresh every 10", "sophia_h", MLP, 128, diagonal, _FASTER, calls=10, rounds=10),
        Case("refresh every step", "adahessian", MLP, 128, diagonal),
        Case("refresh every 10", "adahessian", MLP, 128, {**diagonal, "eval_every_k": 10}, _FASTER, calls=10,
             rounds=10),
    )  # fmt: skip


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case; `quick` and `only` as in `steps`."""
    for case in cases():
        if only in f"{case.preset}, {case.name}" and not (quick and case.work is not SMALL):
            yield _compare(case, 2 if quick else case.rounds)
    if not quick and only in "memory":
        yield from _memory()


def _compare(case: Case, rounds: int) -> list[Row]:
    batch = case.work.batch(case.batch)
    options = {**libraries.model_options(case.preset, case.work), **case.options}
    off = curvax.make(case.preset, plan="off", **options)
    shared = curvax.make(case.preset, plan="shared", **options)
    candidates = [
        run.Candidate(_OFF, *libraries.stepper(off, case.work, batch), calls=case.calls),
        run.Candidate(
            _SHARED, *libraries.stepper(shared, case.work, batch), calls=case.calls, baseline=_OFF, goal=case.goal
        ),
    ]
    name, x = f"{case.preset}, {case.name}, {case.work.name}", f"batch {case.batch}"
    rows = run.rows(SUITE, name, x, run.time_all(candidates, rounds, budget=40))
    sizes = {n: libraries.temporary_bytes(m, case.work, batch) / _MIB for n, m in ((_OFF, off), (_SHARED, shared))}
    for provider, size in sizes.items():
        relative = size / sizes[_OFF] if provider == _SHARED else None
        rows.append(_memory_row(name, provider, x, size, relative, _OFF if relative is not None else None))
    return rows


def _memory_row(
    case: str, provider: str, x: str, size: float, ratio: float | None, baseline: str | None, metric: str = "MiB temp"
) -> Row:
    return Row(SUITE, case, provider, metric, x, size, size, size, ratio=ratio, baseline=baseline)


def _memory() -> Iterator[list[Row]]:
    """Temporary memory of a step without and with refresh, on a 1.3M-parameter network, beside AdamW's.

    The step number is a constant of the compiled program, so that the branch not taken is gone: the compiler's own
    count of a step with a branch is that of its larger side.
    """
    batch = WIDE.batch(128)
    first = "value_and_grad + optax.adamw"
    adamw = _adamw_bytes(batch) / _MIB
    libraries_here = (SOMAX, CURVAX) if libraries.has_somax() else (CURVAX,)
    for preset in ("sophia_g", "sophia_h"):
        options = {**libraries.model_options(preset, WIDE), "learning_rate": 1e-4, "eval_every_k": 10}
        for number, kind in ((1, "without refresh"), (10, "with refresh")):
            case = f"{preset}, refresh every 10, memory of a step {kind}, {WIDE.name}"
            rows = [_memory_row(case, first, "batch 128", adamw, None, None)]
            for library in libraries_here:
                size = _bytes_at(libraries.make(library, preset, **options), batch, number) / _MIB
                rows.append(_memory_row(case, library, "batch 128", size, size / adamw, first))
            yield rows


def _adamw_bytes(batch: dict[str, jax.Array]) -> int:
    tx = optax.adamw(1e-3)

    def step(params: Any, state: Any, data: Any) -> Any:
        loss, gradient = jax.value_and_grad(WIDE.cross_entropy)(params, data)
        update, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, update), state, loss

    params = WIDE.params()
    return libraries.compiled_temporary_bytes(jax.jit(step, donate_argnums=(0, 1)), params, tx.init(params), batch)


def _bytes_at(method: Any, batch: dict[str, jax.Array], number: int) -> int:
    """Temporary bytes of the step with this number."""

    def step(params: Any, state: Any, data: Any, key: jax.Array) -> Any:
        return method.step(params, data, _numbered(state, number), key)

    params = WIDE.params()
    key = libraries.key_for(method)
    donating = jax.jit(step, donate_argnums=(0, 1))
    return libraries.compiled_temporary_bytes(donating, params, method.init(params), batch, key)


def _numbered(state: Any, number: int) -> Any:
    """The state with every step counter, its own and its parts', a constant."""
    count = jax.numpy.asarray(number, jax.numpy.int32)
    return jax.tree.map(lambda leaf: count if _counts(leaf) else leaf, state)


def _counts(leaf: Any) -> bool:
    return leaf.shape == () and jax.numpy.issubdtype(leaf.dtype, jax.numpy.integer)
