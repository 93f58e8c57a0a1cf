"""Steps, tokens and time to a target loss: full and layerwise Gauss-Newton against first- and second-order baselines.

The protocol of the paper (arXiv 2510.09378) on a byte-level transformer: all methods start from one short AdamW
checkpoint, see the same batches, and have their learning rate tuned over the same grid of factors around a customary
one on the first seed; the best rate then runs on all seeds. Tokens of the line search count as tokens of the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from examples.language_model import data, model

import curvax
from bench import run
from bench.schema import Row
from bench.suites import layerwise_head
from curvax.layerwise import ByGroup, InnerLoopMethod, LineSearch, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy
from curvax.optimizers import muon_adamw, shampoo, soap

SUITE = "layerwise"
Step = Callable[[Any, Any, Any], tuple[Any, Any]]


class Trainer(NamedTuple):
    """`init(params) -> state` and the jitted `step(params, state, batch) -> (params, state)`."""

    init: Callable[[Any], Any]
    step: Step


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a batch is.

    Attributes:
      size: name of the model's size.
      parts: equal parts of a batch: inner minibatches and the line search's share; gradients accumulate over as many.
      part: sequences of one part.
      search: parts that the line search takes.
      target: test loss to reach.
      steps: most steps of a run.
      seconds: most seconds of a run, compilation aside.
      seeds: number of seeds; the seed decides the batches.
      factors: of the customary learning rate, tried on the first seed.
      checkpoint: AdamW steps before, each on 16 sequences.
      brief: only the methods that matter most.
    """

    size: str
    parts: int
    part: int
    search: int
    target: float
    steps: int
    seconds: float
    seeds: int = 3
    factors: tuple[float, ...] = (1 / 3, 1.0, 3.0)
    checkpoint: int = 200
    brief: bool = False

    @property
    def inner(self) -> int:
        """Inner minibatches of a step."""
        return self.parts - self.search

    @property
    def shape(self) -> model.Size:
        """The model."""
        return model.SIZES[self.size]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.parts * self.part * self.shape.length

    @property
    def x(self) -> str:
        """The rows' independent variable."""
        return f"{self.tokens} tokens/step"


SETTINGS = (
    Setting("0.3M", parts=16, part=16, search=2, target=2.1, steps=40, seconds=20.0),
    Setting("0.3M", parts=4, part=4, search=1, target=2.1, steps=300, seconds=8.0, brief=True),
)
QUICK = (
    Setting(
        "0.3M",
        parts=4,
        part=4,
        search=1,
        target=2.7,
        steps=4,
        seconds=2.0,
        seeds=1,
        factors=(1.0,),
        checkpoint=40,
        brief=True,
    ),
)
LARGE = (Setting("45M", parts=140, part=32, search=18, target=3.25, steps=200, seconds=3600.0, checkpoint=1000),)


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method.

    Attributes:
      name: the rows' provider.
      rate: customary learning rate, which the grid's factors multiply.
      build: (setting, learning rate) -> trainer.
      goal: largest ratio of its steps to SOAP's at the largest batch, from the paper.
    """

    name: str
    rate: float
    build: Callable[[Setting, float], Trainer]
    goal: float | None = None


def predict_fn(setting: Setting) -> Callable[[Any, jax.Array], jax.Array]:
    """The model as curvax takes it."""
    return functools.partial(model.predict, heads=setting.shape.heads)


def loss_fn(setting: Setting) -> Callable[[Any, Any], jax.Array]:
    """Mean cross entropy per token."""
    predict = predict_fn(setting)
    return lambda p, b: optax.softmax_cross_entropy_with_integer_labels(predict(p, b["x"]), b["y"]).mean()


def first_order(make: Callable[[float], optax.GradientTransformation]) -> Callable[[Setting, float], Trainer]:
    """A trainer with one update per batch, its gradient accumulated over the parts."""

    def build(setting: Setting, rate: float) -> Trainer:
        tx, gradient_of = make(rate), jax.grad(loss_fn(setting))

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            pieces = jax.tree.map(lambda a: a.reshape(setting.parts, setting.part, *a.shape[1:]), batch)
            zero = jax.tree.map(jnp.zeros_like, params)
            total, _ = jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, gradient_of(params, b)), None), zero, pieces)
            gradient = jax.tree.map(lambda g: g / setting.parts, total)
            updates, state = tx.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        return Trainer(tx.init, jax.jit(step, donate_argnums=(0, 1)))

    return build


def curvax_method(make: Callable[[Setting, float], Any]) -> Callable[[Setting, float], Trainer]:
    """A trainer from a method of curvax."""

    def build(setting: Setting, rate: float) -> Trainer:
        method = make(setting, rate)

        def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
            params, state, _ = method.step(params, batch, state, jax.random.key(0))
            return params, state

        return Trainer(method.init, jax.jit(step, donate_argnums=(0, 1)))

    return build


def gauss_newton(
    setting: Setting, rate: float, *, layerwise: bool, muon: bool = True, search: bool = True
) -> InnerLoopMethod:
    """Full or layerwise Gauss-Newton; without line search its share goes to inner minibatches."""
    inner = muon_adamw(rate, others=model.OUTER) if muon else optax.adamw(rate, weight_decay=0.0)
    options: dict[str, Any] = {
        **model.outputs(setting.shape),
        "loss": SoftmaxCrossEntropy(),
        "inner": inner,
        "inner_steps": setting.inner if search else setting.parts,
        "line_search": LineSearch(candidates=8, minibatches=setting.search, chunk=3) if search else None,
        "clip_norm": 1.0,
    }
    if layerwise:
        return layerwise_gn(partition=ByGroup(split=("layers",)), **options)
    return full_gn(**options)


def _sophia(setting: Setting, rate: float) -> Any:
    return curvax.sophia_g(predict_fn=predict_fn(setting), learning_rate=rate, microbatch_size=setting.part)


def _sgn(setting: Setting, rate: float) -> Any:
    return curvax.sgn_ce(
        predict_fn=predict_fn(setting), lam_policy="trust_region", lam0=0.1, maxiter=8, learning_rate=rate,
        microbatch_size=4 * setting.part,
    )  # fmt: skip


SOAP = "soap"
CONTENDERS = (
    Contender("sgd, momentum 0.9", 0.1, first_order(lambda r: optax.sgd(r, momentum=0.9))),
    Contender("adamw", 3e-3, first_order(lambda r: optax.adamw(r, weight_decay=0.0))),
    Contender("muon + adamw", 1e-2, first_order(lambda r: muon_adamw(r, others=model.OUTER))),
    Contender(SOAP, 3e-3, first_order(soap)),
    Contender("shampoo", 3e-2, first_order(lambda r: shampoo(r, beta2=0.95, every=5, eps=1e-8))),
    Contender("sophia_g (curvax)", 1e-3, curvax_method(_sophia)),
    Contender("sgn (curvax)", 0.3, curvax_method(_sgn)),
    Contender("full_gn, muon inside", 1e-2, curvax_method(functools.partial(gauss_newton, layerwise=False)), 1 / 5),
    Contender("layerwise_gn, muon inside", 1e-2, curvax_method(functools.partial(gauss_newton, layerwise=True)), 1 / 3),
)
ABLATIONS = (
    Contender(
        "layerwise_gn, adamw inside", 1e-3, curvax_method(functools.partial(gauss_newton, layerwise=True, muon=False))
    ),
    Contender(
        "layerwise_gn, no line search",
        1e-2,
        curvax_method(functools.partial(gauss_newton, layerwise=True, search=False)),
    ),
)


class Run(NamedTuple):
    """One training run: steps and seconds (compilation aside) to the target, infinite if it was not reached."""

    steps: float
    seconds: float
    loss: float
    rate: float
    seconds_per_step: float


class Study:
    """One setting: the checkpoint that all runs start from, data, test loss."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.corpus = setting, data.load()
        self.held_out = self.corpus.held_out(64, setting.shape.length)
        self.test_loss = jax.jit(loss_fn(setting))
        self.params = self._checkpoint()
        self.start = float(self.test_loss(self.params, self.held_out))
        if not self.start > setting.target:
            raise ValueError(f"the checkpoint has a test loss of {self.start:.3f} already: set a lower target.")

    def _checkpoint(self) -> Any:
        once = dataclasses.replace(self.setting, parts=1, part=16)
        trainer = first_order(lambda r: optax.adamw(r, weight_decay=0.0))(once, 3e-3)
        params = model.init(jax.random.key(0), self.setting.shape)
        state, rng = trainer.init(params), np.random.default_rng(10_000)
        for _ in range(self.setting.checkpoint):
            params, state = trainer.step(params, state, self.corpus.batch(rng, 16, self.setting.shape.length))
        return params

    def batch(self, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One step's batch."""
        return self.corpus.batch(rng, self.setting.parts * self.setting.part, self.setting.shape.length)

    def run(self, trainer: Trainer, rate: float, seed: int) -> Run:
        """Trains to the target, the step limit or the time limit, whichever is first."""
        params = jax.tree.map(jnp.copy, self.params)
        state, rng = trainer.init(params), np.random.default_rng(seed)
        seconds, loss, done = 0.0, self.start, 0
        while done < self.setting.steps and seconds < self.setting.seconds and loss > self.setting.target:
            batch = self.batch(rng)
            begin = time.perf_counter()
            params, state = jax.block_until_ready(trainer.step(params, state, batch))
            seconds, done = seconds + time.perf_counter() - begin, done + 1
            loss = float(self.test_loss(params, self.held_out))
            if not loss < self.start + 1:  # diverged
                loss = loss if math.isfinite(loss) else math.inf
                break
        reached = loss <= self.setting.target
        return Run(done if reached else math.inf, seconds if reached else math.inf, loss, rate, seconds / max(done, 1))

    def _compile(self, trainer: Trainer) -> None:
        copy = jax.tree.map(jnp.copy, self.params)
        jax.block_until_ready(trainer.step(copy, trainer.init(copy), self.batch(np.random.default_rng(0))))

    def tuned(self, contender: Contender) -> list[Run]:
        """The runs of all seeds at the rate that is best on the first."""
        tried = []
        for factor in self.setting.factors:
            rate = contender.rate * factor
            trainer = contender.build(self.setting, rate)
            self._compile(trainer)
            tried.append((self.run(trainer, rate, 0), trainer))
        best, trainer = min(tried, key=lambda pair: (pair[0].steps, pair[0].loss))
        return [best, *(self.run(trainer, best.rate, seed) for seed in range(1, self.setting.seeds))]


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, setting by setting: first what a step costs, then the runs, method by method.

    Args:
      quick: a smoke run of about a minute: one rate, one seed, few steps, four methods.
      only: text in the case's name, such as "45M" for the paper's configuration on a GPU, or "ablations".
    """
    yield from layerwise_head.cases(SUITE, quick, only)
    chosen = QUICK if quick else LARGE if "45M" in only else SETTINGS
    for setting in chosen:
        case = f"language model {setting.size}"
        text = f"{case}, cost, study, ablations"
        if only and only not in text:
            continue
        study = Study(setting)
        if not only or only in f"{case}, cost":
            yield _costs(study, f"{case}, cost of a step", 3 if quick else 8)
        if not only or only in f"{case}, study":
            yield from _compare(study, f"{case}, to test loss {setting.target}", _contenders(setting.brief))
        if setting is chosen[0] and not quick and (not only or only in "ablations"):
            yield from _compare(study, f"{case}, ablations", ABLATIONS)


def _contenders(brief: bool) -> tuple[Contender, ...]:
    return tuple(c for c in CONTENDERS if not brief or c.name in (SOAP, "adamw", "muon + adamw") or "_gn" in c.name)


def _compare(study: Study, case: str, contenders: tuple[Contender, ...]) -> Iterator[list[Row]]:
    base: float | None = None
    for contender in sorted(contenders, key=lambda c: c.name != SOAP):
        runs = study.tuned(contender)
        rows = _rows(study.setting, case, contender, runs, base)
        if contender.name == SOAP:
            base = float(np.median([r.steps for r in runs]))
        yield rows


def _rows(setting: Setting, case: str, contender: Contender, runs: list[Run], base: float | None) -> list[Row]:
    """Test loss always; steps, tokens and seconds to the target where the median seed reaches it."""
    provider = f"{contender.name}, rate {runs[0].rate:.2g}"

    def row(metric: str, values: list[float], ratio: float | None = None, goal: float | None = None) -> Row:
        # Percentiles that are runs, not means of two: a run that never arrives is infinite.
        p20, p50, p80 = (float(v) for v in np.percentile(values, (20, 50, 80), method="nearest"))
        to = None if ratio is None else SOAP
        return Row(
            SUITE,
            case,
            provider,
            metric,
            setting.x,
            p20,
            p50,
            p80,
            ratio=ratio,
            baseline=to,
            goal=goal,
            rounds=len(runs),
        )

    found = [row("test loss", [r.loss for r in runs]), row("ms/step", [1e3 * r.seconds_per_step for r in runs])]
    steps = [min(r.steps, 10.0 * setting.steps) for r in runs]
    if all(math.isfinite(r.steps) for r in runs):
        median = float(np.percentile(steps, 50, method="nearest"))
        ratio = None if base is None or not math.isfinite(base) else median / base
        goal = contender.goal if setting is not SETTINGS[-1] else None
        found += [
            row("steps", steps, ratio, goal if ratio is not None else None),
            row("tokens", [s * setting.tokens for s in steps]),
            row("s", [r.seconds for r in runs]),
        ]
    return found


def _costs(study: Study, case: str, rounds: int) -> list[Row]:
    """Time of a step: N plain inner updates, full and layerwise Gauss-Newton on the same batch, without line search."""
    setting = study.setting
    batch = jax.tree.map(jnp.asarray, study.batch(np.random.default_rng(0)))
    gradient_of, tx = jax.grad(loss_fn(setting)), muon_adamw(1e-4, others=model.OUTER)

    def plain(params: Any, state: Any, batch: Any) -> tuple[Any, Any]:
        def one(carry: Any, piece: Any) -> Any:
            p, s = carry
            updates, s = tx.update(gradient_of(p, piece), s, p)
            return (optax.apply_updates(p, updates), s), None

        pieces = jax.tree.map(lambda a: a.reshape(setting.parts, setting.part, *a.shape[1:]), batch)
        return jax.lax.scan(one, (params, state), pieces)[0]

    trainers = {"muon + adamw, an update per part": Trainer(tx.init, plain)}
    for name, layerwise in (("full_gn", False), ("layerwise_gn", True)):
        make = functools.partial(gauss_newton, layerwise=layerwise, search=False)
        trainers[name] = curvax_method(make)(setting, 1e-4)
    first, full = "muon + adamw, an update per part", "full_gn"
    baselines = {first: (None, None), full: (first, None), "layerwise_gn": (full, 1.3)}

    def candidate(name: str, trainer: Trainer) -> run.Candidate:
        step = jax.jit(lambda c: trainer.step(c[0], c[1], batch), donate_argnums=0)

        def carry() -> Any:
            params = jax.tree.map(jnp.copy, study.params)
            return params, trainer.init(params)

        return run.Candidate(name, step, carry, baseline=baselines[name][0], goal=baselines[name][1])

    timings = run.time_all([candidate(n, t) for n, t in trainers.items()], rounds)
    rows = run.rows(SUITE, case, setting.x, timings)
    again = dataclasses.replace(
        rows[2], ratio=run.ratio(timings[2], timings[0]), baseline=first, goal=2.0, provider="layerwise_gn, to plain"
    )
    return [*rows, again, *_flops(study, case)]


def _flops(study: Study, case: str) -> list[Row]:
    """What the plan says about the same quotient, counted in floating-point operations."""
    setting = study.setting
    method = gauss_newton(setting, 1e-4, layerwise=True)
    plan = method.plan_for(study.params, jax.eval_shape(lambda: study.batch(np.random.default_rng(0))))
    if plan.own is None or plan.full is None or plan.over_full is None:
        raise AssertionError("a plan for shapes counts.")
    rows = []
    for name, cost, ratio in (
        ("full_gn, inner gradient", plan.full, None),
        ("layerwise_gn, inner gradient", plan.own, plan.over_full),
    ):
        value = cost.flops / 1e9
        to = None if ratio is None else "full_gn, inner gradient"
        rows.append(Row(SUITE, case, name, "GFLOP", setting.x, value, value, value, ratio=ratio, baseline=to))
    return rows
