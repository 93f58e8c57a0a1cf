"""Training runs side by side: one process, slices in turns, so that what slows the machine slows all alike."""

from __future__ import annotations

import dataclasses
import enum
import math
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bench.suites.untuned.contenders import Contender, Step, Trainer
from bench.suites.untuned.problems.problem import Batch, Data, Params

# A run's loss is looked at whenever its time has grown by this factor: to some 20 % times are known.
_GROWTH, _FIRST_LOOK = 1.2, 0.02
_TURNS = 8


class Clock(enum.Enum):
    """How time is taken.

    WALL is what a user waits for. CPU, the processor time of all threads, does not see who else uses the machine, and
    serves comparisons with rows of another day; a method gains nothing there by a second core.
    """

    WALL = "wall"
    CPU = "cpu"

    def now(self) -> float:
        """Seconds since some moment."""
        return time.perf_counter() if self is Clock.WALL else time.process_time()


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a run may take.

    Attributes:
      budget: seconds of steps.
      clock: that counts them.
      seeds: number of runs; the seed decides start and order of batches.
    """

    budget: float = 8.0
    clock: Clock = Clock.WALL
    seeds: int = 3

    @property
    def x(self) -> str:
        """The rows' independent variable."""
        return f"{self.budget:g} s, {self.clock.value}"

    @staticmethod
    def parse(x: str, seeds: int) -> Effort:
        """The effort behind rows."""
        budget, clock = x.split(" s, ")
        return Effort(float(budget), Clock(clock), seeds)


class Point(NamedTuple):
    """Seconds of steps so far, steps so far, the loss on all training examples."""

    seconds: float
    steps: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """A finished run.

    Attributes:
      points: from the start, by rising time.
      worst: the largest loss seen, of a step's batch or of all examples; infinite if one was no number.
      held_out: the problem's own metric at the end.
    """

    points: tuple[Point, ...]
    worst: float
    held_out: float

    @property
    def start(self) -> float:
        """The loss before the first step."""
        return self.points[0].loss

    @property
    def final(self) -> Point:
        """The last point within the budget."""
        return self.points[-1]

    def seconds_to(self, loss: float) -> float:
        """Seconds to a loss, up to the rounding of float32; infinite if it was not reached."""
        return next((p.seconds for p in self.points if p.loss <= loss * (1 + 1e-6)), math.inf)


class Raced(Protocol):
    """What a race wants of a problem: a start, data, and two measures of parameters (`problems.Problem`)."""

    def init(self, key: jax.Array, /) -> Params: ...

    def data(self) -> Data: ...

    def objective(self, params: Params, batch: Batch, /) -> jax.Array: ...

    def evaluate(self, params: Params, batch: Batch, /) -> jax.Array: ...

    def order(self, size: int, seed: int) -> np.ndarray | None: ...


class Course:
    """A problem's data on the device, and what measures parameters there."""

    def __init__(self, problem: Raced) -> None:
        self.problem, data = problem, problem.data()
        self.size = data.size
        self.train, self.held_out = jax.tree.map(jnp.asarray, (data.train, data.held_out))
        self._objective, self._evaluate = jax.jit(problem.objective), jax.jit(problem.evaluate)

    def start(self, seed: int) -> Params:
        """First parameters."""
        return self.problem.init(jax.random.key(seed))

    def first_batch(self) -> Batch:
        """The batch of the first seed's first step."""
        return _batch(self.train, self.order(0), 0)

    def order(self, seed: int) -> jax.Array | None:
        """Indices of the examples of each step."""
        results = self.problem.order(self.size, seed)
        return None if results is None else jnp.asarray(results)

    def loss(self, params: Params) -> float:
        """The loss on all training examples; infinite where it is no number."""
        return _number(self._objective(params, self.train))

    def measure(self, params: Params) -> float:
        """The problem's metric on held-out data; infinite where it is no number."""
        return _number(self._evaluate(params, self.held_out))


def _number(value: jax.Array) -> float:
    return float(value) if math.isfinite(value) else math.inf


class _Carry(NamedTuple):
    params: Params
    state: Any
    count: jax.Array
    worst: jax.Array


class Compiled:
    """A contender's step on a course, compiled once for all rates and seeds.

    Attributes:
      seconds: to trace and compile it.
    """

    def __init__(self, contender: Contender[Any], trainer: Trainer, course: Course, clock: Clock) -> None:
        self.contender, self.trainer, self.course, self.clock = contender, trainer, course, clock
        carry, rate = self.carry(0), jnp.asarray(1.0)
        function = jax.jit(_stepper(trainer.step), donate_argnums=0)
        begin = clock.now()
        self.step = function.lower(carry, rate, course.train, course.order(0), jax.random.key(0)).compile()
        self.seconds = clock.now() - begin

    def carry(self, seed: int) -> _Carry:
        """Before the first step."""
        params = self.course.start(seed)
        state = self.trainer.init(params, self.course.first_batch())
        carry = _Carry(params, state, jnp.zeros((), jnp.int32), jnp.asarray(self.course.loss(params)))
        # A copy, as steps donate and a state may hold the parameters or one array twice.
        return jax.tree.map(jnp.copy, carry)


def _batch(train: Any, order: jax.Array | None, count: Any) -> Any:
    if order is None:
        return train
    return jax.tree.map(lambda leaf: leaf[order[count % order.shape[0]]], train)


def _stepper(step: Step) -> Any:
    def advance(carry: _Carry, rate: jax.Array, train: Any, order: jax.Array | None, key: jax.Array) -> _Carry:
        batch = _batch(train, order, carry.count)
        params, state, loss = step(carry.params, carry.state, batch, rate, key)
        seen = jnp.where(jnp.isnan(loss), jnp.inf, loss).astype(carry.worst.dtype)
        return _Carry(params, state, carry.count + 1, jnp.maximum(carry.worst, seen))

    return advance


class _Run:
    """One run in progress."""

    def __init__(self, compiled: Compiled, rate: float, seed: int, budget: float) -> None:
        self.compiled, self.rate, self.budget = compiled, jnp.asarray(rate), budget
        self.order, self.key = compiled.course.order(seed), jax.random.key(seed)
        self.carry = compiled.carry(seed)
        self.points = [Point(0.0, 0, compiled.course.loss(self.carry.params))]
        self.elapsed, self.steps, self.per_step, self.look = 0.0, 0, math.inf, _FIRST_LOOK
        self.finished = False

    def advance(self, until: float) -> None:
        """Steps until that much of its time is spent."""
        enough = 0.99 * self.budget
        while not self.finished and self.elapsed < min(until, enough):
            count = max(1, int((min(self.look, self.budget) - self.elapsed) / self.per_step))
            self._steps(count)
            over = self.elapsed >= enough
            # A long step that ends beyond the budget does not count, unless it was the first.
            late = count == 1 and self.elapsed > 1.05 * self.budget and len(self.points) > 1
            if not late and (over or self.elapsed >= self.look):
                self._look()
            self.finished |= over

    def _steps(self, count: int) -> None:
        course, clock = self.compiled.course, self.compiled.clock
        begin = clock.now()
        for _ in range(count):
            self.carry = self.compiled.step(self.carry, self.rate, course.train, self.order, self.key)
        jax.block_until_ready(self.carry)
        spent = clock.now() - begin
        self.elapsed, self.steps, self.per_step = self.elapsed + spent, self.steps + count, spent / count

    def _look(self) -> None:
        self.look = self.elapsed * _GROWTH
        self.points.append(Point(self.elapsed, self.steps, self.compiled.course.loss(self.carry.params)))
        # No method comes back from parameters without a finite loss, or it would not have gone there.
        self.finished = math.isinf(self.points[-1].loss)

    def trajectory(self) -> Trajectory:
        """What it did."""
        worst = max(float(self.carry.worst), *(p.loss for p in self.points))
        return Trajectory(tuple(self.points), worst, self.compiled.course.measure(self.carry.params))


def race(entries: Sequence[tuple[Compiled, float, int]], budget: float) -> Iterator[Trajectory]:
    """Trains all entries (compiled step, rate, seed), in turns and in random order; trajectories in their order."""
    runs = [_Run(*entry, budget) for entry in entries]
    shuffle, slice_ = random.Random(0), budget / _TURNS
    for turn in range(1, _TURNS + 1):
        for run in shuffle.sample(runs, len(runs)):
            run.advance(turn * slice_)
    return (run.trajectory() for run in runs)
