"""Step times: every preset in both libraries in one run, and the steps that have a floor against that floor."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from bench import floors, libraries, run
from bench.libraries import CURVAX, SOMAX
from bench.schema import Row
from bench.workloads import CNN, MLP, REGRESSION, SMALL, UNEVEN, Workload

SUITE = "steps"
_FIRST_ORDER = "value_and_grad + optax.adamw"
# The same in both libraries. No tolerance: every solve takes all its iterations; no residual restarts within them.
_CG = {"maxiter": 20, "tol": 0.0, "stabilize_every": 50, "warm_start": True}
_DAMPED = {"lam0": 0.1, "learning_rate": 1e-3}
_DIAGONAL = {"learning_rate": 1e-4, "eval_every_k": 10}


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preset in both libraries on one workload.

    Attributes:
      preset: its name in both.
      options: keywords that both take.
      rounds: fewer for slow ones.
      calls: calls per round: 10 where every tenth has more work.
      regression: real targets instead of labels.
      goal: largest share of python-somax's time aimed at.
      rest: seconds for python-somax's memory to go back before the others are timed.
    """

    preset: str
    work: Workload
    batch: int
    options: dict[str, Any]
    rounds: int = 30
    calls: int = 1
    regression: bool = False
    goal: float = 1.0
    rest: float = 0.0

    @property
    def case(self) -> str:
        """The row's case."""
        return f"{self.preset}, {self.work.name}"


def pairs() -> tuple[Pair, ...]:
    """Every preset that both libraries have."""
    cg, every = {**_DAMPED, **_CG}, {**_DIAGONAL, "eval_every_k": 1}
    return (
        Pair("sgn_ce", MLP, 128, cg),
        Pair("sgn_ce", MLP, 32, cg),
        Pair("sgn_mse", MLP, 128, cg, regression=True),
        Pair("newton_cg", MLP, 128, {**cg, "lam0": 10.0}),
        Pair("egn_ce", MLP, 32, _DAMPED, rounds=6),
        Pair("egn_ce", MLP, 128, _DAMPED, rounds=3),
        Pair("egn_ce", UNEVEN, 96, _DAMPED, rounds=12, goal=1 / 150, rest=1.0),
        Pair("egn_mse", REGRESSION, 128, _DAMPED, rounds=6, regression=True),
        Pair("egn_mse_cg", REGRESSION, 128, cg, rounds=6, regression=True),
        Pair("sophia_g", MLP, 128, _DIAGONAL, calls=10),
        Pair("sophia_h", MLP, 128, _DIAGONAL, calls=10),
        Pair("adahessian", MLP, 128, every),
        Pair("newton_direct", SMALL, 128, {**_DAMPED, "lam0": 10.0}),
        Pair("ggn_direct_ce", SMALL, 128, _DAMPED),
        Pair("ggn_direct_mse", SMALL, 128, _DAMPED, regression=True),
        Pair("sgn_ce", CNN, 128, cg, rounds=10),
        Pair("egn_ce", CNN, 16, _DAMPED, rounds=4),
        Pair("sophia_g", CNN, 128, _DIAGONAL, rounds=10, calls=10),
        Pair("sophia_h", CNN, 128, _DIAGONAL, rounds=10, calls=10),
        Pair("adahessian", CNN, 128, every, rounds=10),
    )


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case.

    Args:
      quick: few rounds, small cases only.
      only: substring of the case names to run.
    """
    for pair in pairs():
        if only in pair.case and not (quick and pair.work is not SMALL):
            yield _compare(pair, 2 if quick else pair.rounds)
    if not quick:
        for case, make in (("floor", _cg_floor), ("amortised", _sophia_floor), ("limit", _limit)):
            if only in case or not only:
                yield from make()


def _compare(pair: Pair, rounds: int) -> list[Row]:
    batch = pair.work.batch(pair.batch, labels=not pair.regression)
    options = {**libraries.model_options(pair.preset, pair.work), **pair.options}
    labeled = batch if not pair.regression else pair.work.batch(pair.batch)
    candidates = [run.Candidate(_FIRST_ORDER, *floors.adamw(pair.work, labeled), calls=pair.calls)]
    if libraries.has_somax():
        method = libraries.make(SOMAX, pair.preset, **options)
        pieces = libraries.stepper(method, pair.work, batch)
        candidates.append(run.Candidate(SOMAX, *pieces, calls=pair.calls, baseline=_FIRST_ORDER))
    peer = SOMAX if libraries.has_somax() else _FIRST_ORDER
    method = libraries.make(CURVAX, pair.preset, **options)
    pieces = libraries.stepper(method, pair.work, batch)
    goal = pair.goal if peer is SOMAX else None
    candidates.append(run.Candidate(CURVAX, *pieces, calls=pair.calls, baseline=peer, goal=goal))
    if pair.rest > 0:
        candidates = [dataclasses.replace(c, rest=pair.rest, untimed=int(c.name != SOMAX)) for c in candidates]
    return run.rows(SUITE, pair.case, f"batch {pair.batch}", run.time_all(candidates, rounds))


def _cg_floor() -> Iterator[list[Row]]:
    """sgn_ce, exactly 20 iterations, against a gradient and 20 bare products; and how far those are from the limit."""
    batch, count = MLP.batch(128), 20
    floor, limit = f"1 gradient + {count} bare products", f"the matrix products of {count} products alone"
    options = {**libraries.model_options("sgn_ce", MLP), **_DAMPED, **_CG}
    lean = {**options, "warm_start": False, "record_cg_stats": False}

    def curvax(name: str, goal: float, **changes: Any) -> run.Candidate:
        pieces = libraries.stepper(libraries.make(CURVAX, "sgn_ce", **{**lean, **changes}), MLP, batch)
        return run.Candidate(name, *pieces, baseline=floor, goal=goal)

    candidates = [
        run.Candidate(floor, *floors.products(MLP, batch, count)),
        run.Candidate(limit, *floors.matmuls(MLP, batch, count), baseline=floor),
        curvax("curvax, 20 products", 1.15),
        curvax("curvax, 20 products, backend=reference", 1.15, backend="reference"),
        curvax("curvax, warm start (+1 product)", 1.15 * 22 / 21, warm_start=True),
        curvax("curvax, warm start, true residual (+2)", 1.15 * 23 / 21, warm_start=True, record_cg_stats=True),
    ]
    if libraries.has_somax():
        pieces = libraries.stepper(libraries.make(SOMAX, "sgn_ce", **options), MLP, batch)
        candidates.append(run.Candidate(f"{SOMAX}, warm start (+1)", *pieces, baseline=floor))
    timings = run.time_all(candidates, 60)
    case = f"sgn_ce against its floor, {MLP.name}"
    yield run.rows(SUITE, case, "batch 128", timings)
    work = floors.matmul_flops(MLP, 128, count) / 1e9
    rates = [_rate(case, t, work) for t in timings[:3]]
    yield [rates[0], *(dataclasses.replace(r, ratio=r.p50 / rates[0].p50, baseline=floor) for r in rates[1:])]


def _rate(case: str, timing: run.Timing, gflop: float) -> Row:
    """Matrix-product GFLOP/s of a candidate; the elementwise operations are not counted."""
    values = run.percentiles(gflop / timing.seconds)
    return Row(SUITE, case, timing.candidate.name, "GFLOP/s", "batch 128", *values, rounds=len(timing.seconds))


def _sophia_floor() -> Iterator[list[Row]]:
    batch, every = MLP.batch(128), 10
    for preset, sampled in (("sophia_g", True), ("sophia_h", False)):
        floor = "adamw + 1/10 curvature evaluation"
        options = {**libraries.model_options(preset, MLP), **_DIAGONAL}
        candidates = [
            run.Candidate(floor, *floors.amortised(MLP, batch, every, sampled=sampled), calls=every),
            run.Candidate(_FIRST_ORDER, *floors.adamw(MLP, batch), calls=every, baseline=floor),
        ]
        for library in (SOMAX, CURVAX) if libraries.has_somax() else (CURVAX,):
            pieces = libraries.stepper(libraries.make(library, preset, **options), MLP, batch)
            goal = 1.10 if library is CURVAX else None
            candidates.append(run.Candidate(library, *pieces, calls=every, baseline=floor, goal=goal))
        case = f"{preset} over ten steps against its floor, {MLP.name}"
        yield run.rows(SUITE, case, "batch 128", run.time_all(candidates, 40))


def _limit() -> Iterator[list[Row]]:
    """The machine's float32 matrix-product rate, and that at the shapes of the MLP's products."""
    side, batch, count = 1024, MLP.batch(128), 20
    candidates = [
        run.Candidate(f"{side}^3 matrix product", *floors.square_matmul(side), calls=5),
        run.Candidate("matrix products of the MLP", *floors.matmuls(MLP, batch, count)),
    ]
    timings = run.time_all(candidates, 30)
    flops = (2.0 * side**3 / 1e9, floors.matmul_flops(MLP, 128, count) / 1e9)
    rates = [_rate("float32 matrix products", t, f) for t, f in zip(timings, flops, strict=True)]
    peak = rates[0]
    shapes = dataclasses.replace(rates[1], ratio=rates[1].p50 / peak.p50, baseline=peak.provider)
    yield [dataclasses.replace(peak, x=f"{side}"), dataclasses.replace(shapes, x=f"{side}")]
