"""Many steps as one compiled program, with parameters and state donated from chunk to chunk.

One program serves chunks of any length, since the number of steps is an operand; so a run's numbers do not depend on
where its chunks end.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from curvax.method import AbstractMethod
from curvax.telemetry import Metric
from curvax.training.batches import DrawInside, draw_key
from curvax.tree import PyTree

Scalars: TypeAlias = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Best:
    """The parameters with the least training loss so far.

    Attributes:
      params, model_state: at the step that reported the loss, before its update.
      loss: infinite until there was one.
    """

    params: PyTree
    model_state: PyTree
    loss: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """What goes from step to step.

    Attributes:
      params, state: of the method.
      carried: what the batches' source carries.
      best: `None` where training loss does not choose parameters.
    """

    params: PyTree
    state: Any
    carried: PyTree
    best: Best | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Scalars at or below which a chunk ends at once; -inf for never."""

    loss: jax.Array
    gradient: jax.Array


Loop: TypeAlias = tuple[jax.Array, jax.Array, Carry, Scalars]
"""Steps done, whether that is enough, the carry, what the steps reported."""
Program: TypeAlias = Callable[..., tuple[Carry, jax.Array, Scalars]]


@functools.lru_cache(maxsize=16)
def compiled_chunk(method: AbstractMethod[Any, Any], draw: DrawInside, capacity: int, *, stacked: bool) -> Program:
    """A jitted function of (carry, shared, entries, count, rng, bounds), which donates the carry.

    It returns (carry, steps done, scalars of the info of each step (capacity,)). Another run of the same method, with
    other parameters, data or seeds, gets the same function, which is compiled already.
    """

    def step(carry: Carry, given: tuple[Any, Any], rng: jax.Array | None) -> tuple[Carry, Scalars]:
        key = draw_key(rng, carry.state.step)
        batch, carried = draw(given, carry.carried, carry.params, key)
        # The step is compiled apart from how its batch came about, so that its rounding is the same for all sources.
        batch = jax.lax.optimization_barrier(batch)
        params, state, info = method.step(carry.params, batch, carry.state, rng)
        scalars = scalars_of(info)
        best = None if carry.best is None else _better(carry.best, carry, scalars)
        return Carry(params, state, carried, best), scalars

    def chunk(
        carry: Carry, shared: Any, entries: Any, count: jax.Array, rng: jax.Array | None, bounds: Bounds
    ) -> tuple[Carry, jax.Array, Scalars]:
        def given(i: jax.Array) -> tuple[Any, Any]:
            return shared, jax.tree.map(lambda x: x[i], entries) if stacked else entries

        def unfinished(loop: Loop) -> jax.Array:
            return (loop[0] < count) & ~loop[1]

        def advance(loop: Loop) -> Loop:
            i, _, carry, rows = loop
            carry, scalars = step(carry, given(i), rng)
            rows = {name: column.at[i].set(scalars[name]) for name, column in rows.items()}
            return i + 1, _reached(scalars, bounds), carry, rows

        shapes = jax.eval_shape(lambda c, g: step(c, g, rng)[1], carry, given(jnp.int32(0)))
        rows = {name: jnp.zeros((capacity,), x.dtype) for name, x in shapes.items()}
        done, _, carry, rows = jax.lax.while_loop(unfinished, advance, (jnp.int32(0), jnp.asarray(False), carry, rows))
        return carry, done, rows

    return jax.jit(chunk, donate_argnums=0)


def scalars_of(info: Mapping[str, Any]) -> Scalars:
    """The scalars of an info, those of what a model returns as aux among them, as "aux/name"."""
    paths, _ = jax.tree_util.tree_flatten_with_path(info)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in paths}
    return {name: jnp.asarray(leaf) for name, leaf in named.items() if jnp.ndim(leaf) == 0}


def _better(best: Best, carry: Carry, scalars: Scalars) -> Best:
    if Metric.LOSS not in scalars:
        return best
    loss = scalars[Metric.LOSS].astype(best.loss.dtype)
    here = Best(carry.params, carry.state.model_state, loss)
    return jax.lax.cond(loss < best.loss, lambda: here, lambda: best)


def _reached(scalars: Scalars, bounds: Bounds) -> jax.Array:
    def below(metric: Metric, bound: jax.Array) -> jax.Array:
        value = scalars.get(metric)
        return jnp.asarray(False) if value is None else value <= bound.astype(value.dtype)

    return below(Metric.LOSS, bounds.loss) | below(Metric.GRADIENT_NORM, bounds.gradient)
