"""`fit`: a training loop around any method.

    compile     the chunk program, by a call of no steps
    chunk       1 step, then 4, 16, ... until one lasts a third of a second: one program, one look at the device each
    between     history, check, evaluation, checkpoint, progress, stop rules; the next batches are read meanwhile

It stands on `method.init` and `method.step` alone, and nothing else in curvax knows of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Generator
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.check import Check, StepsRefused, cause_of_refusal
from curvax.keys import check_key
from curvax.keywords import spread
from curvax.method import AbstractMethod
from curvax.telemetry import Metric
from curvax.training.batches import Taken, source_of
from curvax.training.checkpoints import Checkpoints, Snapshot, Store
from curvax.training.chunk import Best, Bounds, Carry, compiled_chunk
from curvax.training.history import Columns, History, Recorder
from curvax.training.progress import Display, Progress, display
from curvax.training.rules import Evaluate, Evaluator, Reason, Stop, copied
from curvax.tree import PyTree

_CHUNK_SECONDS, _GROWTH = 0.3, 4


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """Keywords of `fit`.

    Attributes:
      method: any method of curvax, or `curvax.first_order(...)` of an Optax optimizer.
      params: the parameters, which stay as they are: the run works on a copy.
      batches: one batch, which is the same in every step; a list of batches, which begins anew at its end; a function
        step -> batch; a loader, which begins anew, or an iterator, which does not; `curvax.training.Minibatches` of
        data in memory; `curvax.training.Sampler`, which draws from the parameters. NumPy or JAX arrays.
      steps: how many steps.
      rng: random key, as for `method.step`; `None` is enough for what draws nothing.
      state: to go on from, as an earlier result or `method.init` returned it; models with `has_state` need
        `method.init(params, batch=batch, model_state=model_state)`. By default `method.init(params)`, with the first
        batch where the method needs one.
      stop: rules that end the run early; none by default.
      evaluate: a measure of the parameters, whose best are kept; by default the training loss chooses them, which on
        minibatches is that of a minibatch.
      checkpoints: where the run is saved, and taken up again; nowhere by default.
      progress: `False` shows nothing; `Progress(label=...)` names the run.
      check: what bounds refused steps in a row, `curvax.Check()`.
      clock: what seconds are; `time.process_time`, the processor time of all threads, does not see who else uses the
        machine.
      chunk: steps of a compiled chunk; by default, `None`, as many as take about a third of a second.
    """

    method: AbstractMethod[Any, Any]
    params: PyTree
    batches: Any
    steps: int
    _: dataclasses.KW_ONLY
    rng: jax.Array | None = None
    state: Any = None
    stop: Stop = Stop()
    evaluate: Evaluate | None = None
    checkpoints: Checkpoints | None = None
    progress: Progress | bool = True
    check: Check | None = None
    clock: Callable[[], float] = time.perf_counter
    chunk: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, AbstractMethod):
            kind = type(self.method).__name__
            raise TypeError(
                f"method is a {kind}: pass what curvax.gauss_newton(...) returned, or curvax.first_order(tx, ...)."
            )
        if self.steps < 1 or (self.chunk is not None and self.chunk < 1):
            raise ValueError(f"steps and chunk must be at least 1, not {self.steps} and {self.chunk}.")
        if self.rng is not None:
            check_key("rng", self.rng)


@dataclasses.dataclass(frozen=True, repr=False)
class FitResult:
    """What a run came to.

    Attributes:
      params, state: after its last step; with `state=result.state` another run goes on from there.
      best_params: those with the best evaluation, or without one with the least training loss of a step; the last ones
        where no step reports a loss.
      best_model_state: the model state that goes with them; `None` of models without.
      history: what its steps reported.
      reason: why it ended.
    """

    params: PyTree
    state: Any
    best_params: PyTree
    best_model_state: PyTree
    history: History
    reason: Reason

    def __repr__(self) -> str:
        history, loss = self.history, self.history.columns.get(Metric.LOSS, np.zeros(0))
        parts = [f"{len(history)} steps in {history.seconds[-1] if len(history) else 0:.2f} s"]
        parts[0] += f" (compiled in {history.compile_seconds:.1f} s)"
        if len(loss):
            parts.append(f"loss {loss[0]:.3e} -> {loss[-1]:.3e}")
        parts += [f"{name} {values[0]:.4g} -> {values[-1]:.4g}" for name, values in history.measures]
        return f"<fit: {', '.join(parts)}; {self.reason.value}>"


class FitFailed(StepsRefused):
    """Too many steps in a row were refused, or already the first loss was no number; the sentence says why.

    Attributes:
      result: what the run came to before.
    """

    def __init__(self, message: str, result: FitResult) -> None:
        super().__init__(message)
        self.result = result


@spread(FitOptions)
def fit(options: FitOptions) -> FitResult:
    """Trains `params` by `method`: the loop that one writes around `method.step`, with the same numbers.

        result = curvax.fit(method, params, batch, 200, evaluate=Evaluate(error), stop=Stop(loss=1e-9))
        result.params, result.best_params, result.history["loss"], result.reason

    Steps run in compiled chunks with parameters and state donated; nothing waits for the device between them. Ctrl-C
    ends the run after the chunk under way and returns what there is; a second one also breaks off what Python does, a
    loader that hangs, say.

    Raises:
      FitFailed: more than `check.max_skips` steps in a row were refused, or the first loss is no number.
      ValueError, TypeError, KeyError: batches, state or parameters do not fit; one sentence with the mend.
      ImportError: Orbax is needed and not installed.
    """
    return _Run(options).result()


class _Run:
    """One run under way."""

    def __init__(self, options: FitOptions) -> None:
        self.options = options
        self.begin = 0 if options.state is None else int(options.state.step)
        self.source = source_of(options.batches, self.begin)
        self.capacity = self.source.capacity if options.chunk is None else min(options.chunk, self.source.capacity)
        self.recorder, self.check = Recorder(), options.check or Check()
        self.evaluator = None if options.evaluate is None else Evaluator(options.evaluate)
        self.rng, self.done, self.pace = options.rng, 0, math.inf
        self.chunk = options.chunk or 1
        self.reason: Reason | None = None
        self.taken = self.source.take(self.begin, 1)
        self.carry = self._first_carry()
        self.store = None if options.checkpoints is None else Store(options.checkpoints)
        self.program = compiled_chunk(options.method, self.source.draw, self.capacity, stacked=self.source.stacked)
        self.interrupts = _Interrupts()

    def result(self) -> FitResult:
        """Runs to the end."""
        with display(self.options.progress, self.options.steps) as shown, contextlib.ExitStack() as stack:
            if self.store is not None:
                stack.callback(self.store.close)
                self._resume(self.store)
            stack.enter_context(self.interrupts.deferred())
            try:
                self._compile()
                self._train(shown)
            except KeyboardInterrupt:
                self.reason = Reason.INTERRUPTED
            if self.store is not None and self.done:
                self.store.save(self._snapshot(), self.done)
            shown.show(self.done, self.recorder, last=True)
        return self._result(self.reason or Reason.STEPS)

    def _train(self, shown: Display) -> None:
        every = self.options.evaluate and self.options.evaluate.every
        if self._due(every):
            self._evaluate()
        while self.reason is None:
            self._advance()
            if self._due(every):
                self._evaluate()
            if self.store is not None and self._due(self._checkpoint_every):
                self.store.save(self._snapshot(), self.done)
            shown.show(self.done, self.recorder)
            if self.interrupts.pending:
                self.reason = Reason.INTERRUPTED
            self.reason = self.reason or self._stale()
        if self.reason is not Reason.INTERRUPTED:
            self._evaluate()

    # Before the first step.

    def _first_carry(self) -> Carry:
        options = self.options
        params, state = copied(options.params), options.state
        if state is None:
            if options.method.curvature.has_state:
                raise ValueError(
                    "this model has a state: pass state=method.init(params, batch=batch, model_state=model_state)."
                )
            batch = self._batch_shapes(params) if options.method.needs_batch else None
            state = options.method.init(params, batch=batch)
        carry = Carry(params, copied(state), copied(self.source.start), None)
        return dataclasses.replace(carry, best=self._first_best(carry))

    def _batch_shapes(self, params: PyTree) -> Any:
        def draw(params: PyTree, start: PyTree, rng: jax.Array | None) -> Any:
            return self.source.draw((self.source.shared, entry), start, params, rng)[0]

        entry = jax.tree.map(lambda x: x[0], self.taken.entries) if self.source.stacked else self.taken.entries
        return jax.eval_shape(draw, params, self.source.start, self.rng)

    def _first_best(self, carry: Carry) -> Best | None:
        if self.evaluator is not None:
            return None
        loss = jnp.asarray(jnp.inf, jnp.result_type(float))
        return Best(copied(carry.params), copied(carry.state.model_state), loss)

    def _resume(self, store: Store) -> None:
        if store.latest is None:
            return
        snapshot = store.restore(self._arrays())
        (self.carry, self.rng, best), numbers = snapshot.arrays, snapshot.numbers
        self.done, self.begin = int(numbers["done"]), int(numbers["begin"])
        self.recorder.restore(snapshot.history)
        if self.evaluator is not None:
            self.evaluator.best, self.evaluator.value = best, numbers["value"]
        self.source = source_of(self.options.batches, self.begin) if self.taken.count == 0 else self.source
        self.source.skip(self.done)
        self.taken = Taken(None, 0)

    def _compile(self) -> None:
        """Calls the program for no steps, until arrays come back on the devices where they went in."""
        if self.done >= self.options.steps:
            self.reason = Reason.STEPS
            return
        self._take()
        for _ in range(3):
            before, start = _shardings(self.carry), self.options.clock()
            self._call(0)
            jax.block_until_ready(self.carry)
            self.recorder.compile_seconds += self.options.clock() - start
            if _shardings(self.carry) == before:
                return

    # A chunk.

    def _take(self) -> None:
        if self.taken.count == 0:
            self.taken = self.source.take(self.begin + self.done, self._length(self.done))
        if self.taken.count == 0:
            self.reason = Reason.BATCHES

    def _length(self, done: int) -> int:
        """Steps of the chunk that begins after so many steps."""
        options, every = self.options, self.options.evaluate and self.options.evaluate.every
        bounds = [self.chunk, self.capacity, options.steps - done]
        bounds += [k - done % k for k in (every, self._checkpoint_every) if k]
        if options.stop.seconds is not None and options.chunk is None:
            left = options.stop.seconds - self.recorder.elapsed
            bounds.append(max(int(left / self.pace), 1))
        return max(min(bounds), 0)

    @property
    def _checkpoint_every(self) -> int | None:
        return None if self.options.checkpoints is None else self.options.checkpoints.every

    def _call(self, count: int) -> tuple[jax.Array, dict[str, jax.Array]]:
        stop, dtype = self.options.stop, jnp.result_type(float)
        bounds = Bounds(*(jnp.asarray(-jnp.inf if b is None else b, dtype) for b in (stop.loss, stop.gradient)))
        shared, entries = self.source.shared, self.taken.entries
        arguments = (self.carry, shared, entries, jnp.int32(count), self.rng, bounds)
        with self.interrupts.held():
            self.carry, done, rows = self.program(*arguments)
        return done, rows

    def _advance(self) -> None:
        """One chunk; the next one's batches are read while it runs."""
        self._take()
        if self.reason is not None:
            return
        count, start = self.taken.count, self.options.clock()
        done, rows = self._call(count)
        try:
            self._read_ahead(self.done + count)
        finally:
            # The history goes with the parameters, even if reading was broken off.
            with self.interrupts.held():
                columns = self._fetch(done, rows)
                self._record(columns, self.options.clock() - start)
        self._stop_after(columns)

    def _read_ahead(self, following: int) -> None:
        """The batches of the chunk that begins after so many steps."""
        self.taken = Taken(None, 0)
        if following < self.options.steps:
            self.taken = self.source.take(self.begin + following, self._length(following))
            self.reason = Reason.BATCHES if self.taken.count == 0 else None

    @staticmethod
    def _fetch(done: jax.Array, rows: dict[str, jax.Array]) -> Columns:
        ran, columns = jax.device_get((done, rows))
        return {name: column[:ran].copy() for name, column in columns.items()}

    def _record(self, columns: Columns, seconds: float) -> None:
        first, ran = not self.done, len(columns[Metric.STEP])
        self.recorder.add(columns, seconds)
        self.done, self.pace = self.done + ran, max(seconds, 1e-9) / ran
        if self.options.chunk is None:
            self.chunk = max(min(_GROWTH * ran, int(_CHUNK_SECONDS / self.pace)), 1)
        loss = float(columns[Metric.LOSS][0]) if Metric.LOSS in columns else 0.0
        if first and not math.isfinite(loss) and not columns[Metric.ACCEPTED][0]:
            self._fail(f"the loss of the first step is {loss}. {cause_of_refusal(_info(columns, 0))}")
        refused = np.flatnonzero(~columns[Metric.ACCEPTED] | columns.get(Metric.UNDONE, np.zeros(ran, bool)))
        try:
            for i in range(ran) if refused.size else (ran - 1,):
                self.check(_info(columns, i))
        except StepsRefused as error:
            self._fail(str(error))

    def _fail(self, message: str) -> None:
        raise FitFailed(message, self._result(Reason.STEPS)) from None

    def _stop_after(self, columns: Columns) -> None:
        stop = self.options.stop
        if stop.gradient is not None and Metric.GRADIENT_NORM not in columns:
            raise ValueError(
                'Stop(gradient=...) reads gradient_norm: give the method metrics=(MetricRecord("gradient_norm"),).'
            )
        if _at_most(columns, Metric.LOSS, stop.loss):
            self.reason = Reason.LOSS
        elif _at_most(columns, Metric.GRADIENT_NORM, stop.gradient):
            self.reason = Reason.GRADIENT
        elif self.done >= self.options.steps:
            self.reason = Reason.STEPS
        elif stop.seconds is not None and self.recorder.elapsed >= 0.99 * stop.seconds:
            self.reason = Reason.SECONDS

    # Between chunks.

    def _due(self, every: int | None) -> bool:
        return every is None or self.done % every == 0

    def _evaluate(self) -> None:
        if self.evaluator is None or self.recorder.last_evaluation.get("step") == self.done:
            return
        values, _ = self.evaluator(self.carry.params, self.carry.state.model_state)
        self.recorder.add_evaluation(self.done, values)

    def _stale(self) -> Reason | None:
        patience = self.options.stop.patience
        if patience is None:
            return None
        history = self.recorder.history()
        if self.evaluator is None:
            steps, values, sign = np.arange(1, len(history) + 1), history[Metric.LOSS], 1
        else:
            steps, values = history.evaluations["step"], history.measures[0][1]
            sign = -1 if self.evaluator.evaluate.largest else 1
        best = steps[np.nanargmin(sign * values)] if np.isfinite(values).any() else 0
        return Reason.PATIENCE if self.done - best >= patience else None

    def _arrays(self) -> PyTree:
        best = None
        if self.evaluator is not None:
            best = self.evaluator.best or (self.carry.params, self.carry.state.model_state)
        return self.carry, self.rng, best

    def _snapshot(self) -> Snapshot:
        value = math.nan if self.evaluator is None else self.evaluator.value
        numbers = {"done": self.done, "begin": self.begin, "value": value}
        return Snapshot(self._arrays(), self.recorder.history(), numbers)

    def _result(self, reason: Reason) -> FitResult:
        params, state = self.carry.params, self.carry.state
        best = (params, state.model_state)
        if self.evaluator is not None:
            best = self.evaluator.best or best
        elif self.carry.best is not None and math.isfinite(self.carry.best.loss):
            best = (self.carry.best.params, self.carry.best.model_state)
        return FitResult(params, state, *best, self.recorder.history(), reason)


class _Interrupts:
    """Ctrl-C while a program takes over donated arrays would lose them: it is noted, and the run ends behind the chunk.

    Attributes:
      pending: whether there was one.
    """

    def __init__(self) -> None:
        self.pending, self._held = False, False

    @contextlib.contextmanager
    def deferred(self) -> Generator[None]:
        """Python's handler is replaced meanwhile; in other threads than the main one there is none to replace."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGINT, self._note)
        try:
            yield
        finally:
            # `None` is a handler that was not set from Python, and cannot be set again from there.
            if before is not None:
                signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def held(self) -> Generator[None]:
        """No interrupt is raised meanwhile."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        again, self.pending = self.pending, True
        if again and not self._held:
            raise KeyboardInterrupt


def _at_most(columns: Columns, metric: Metric, bound: float | None) -> bool:
    """What the program has seen of the last step, in the very dtype in which it compared."""
    if bound is None or metric not in columns:
        return False
    column = columns[metric]
    return bool(column[-1] <= np.asarray(bound, jnp.result_type(float)).astype(column.dtype))


def _info(columns: Columns, step: int) -> dict[str, Any]:
    return {name: column[step] for name, column in columns.items()}


def _shardings(tree: PyTree) -> list[Any]:
    return [leaf.sharding for leaf in jax.tree.leaves(tree)]
