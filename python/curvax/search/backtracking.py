"""Backtracking: the largest step size whose decrease of the loss is a share of what the slope promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from curvax.loops import for_loop_body
from curvax.search.base import Line, Searched, at_its_floor, losses_at, slope_of
from curvax.search.geometric import GeometricSearch

_Enough: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""(step sizes, losses there) -> which of them will do."""


@dataclasses.dataclass(frozen=True)
class Backtracking(GeometricSearch):
    """The first step size of 1, ratio, ratio^2, ... that satisfies Armijo's condition, or 0 if none does.

        loss(a) <= loss(0) + sufficient a min(g.d, 0),  and below loss(0)        (Armijo 1966)

    With `chunk` the step sizes are tried so many at a time, and those behind the first that will do are never
    evaluated: `chunk=1` is the textbook's loop, one forward pass where the full step is good. Without it all of them
    are evaluated in one batched pass, which a GPU runs in about the time of one.

    Attributes:
      candidates: step sizes tried; 10, down to 1/512.
      ratio: 1/2.
      every: every how many steps to search; 1. Steps between take the step size of the last search.
      chunk: step sizes evaluated at once; `None` takes as many as fit into memory, all of them where nothing is known.
      sufficient: share of the decrease along the slope that counts; 1e-4 (Nocedal and Wright 2006, section 3.1).

    Raises:
      ValueError: a number out of range.
    """

    sufficient: float = 1e-4

    kind = "backtracking search"
    takes_first = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_fraction("sufficient")

    @property
    def name(self) -> str:
        return f"backtracking over {self.steps}"

    def find(self, line: Line) -> Searched:
        sizes = self.step_sizes(line.dtype)
        before = line.loss_at(jnp.zeros((), line.dtype)) if line.loss is None else line.loss
        slope = jnp.minimum(slope_of(line, "a backtracking search").astype(line.dtype), 0)

        def enough(size: jax.Array, loss: jax.Array) -> jax.Array:
            return (loss <= before + self.sufficient * size * slope) & (loss < before)

        if self.chunk is None or self.chunk >= self.candidates:
            losses = losses_at(line.loss_at, sizes, None)
            first = losses[0]
            good = enough(sizes, losses)
            best = jnp.argmax(good)
            size, after = jnp.where(good[best], sizes[best], 0), jnp.where(good[best], losses[best], first)
        else:
            size, after, first = self._one_chunk_after_another(line, sizes, enough, self.chunk)
        whole = (size == 0) & at_its_floor(line, before, first)
        return Searched(jnp.where(whole, jnp.ones_like(size), size), before, after)

    def _one_chunk_after_another(
        self, line: Line, sizes: jax.Array, enough: _Enough, chunk: int
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(step size or 0, loss there or of the full step, loss of the full step); ends with the first that will do."""
        rounds = -(-self.candidates // chunk)
        # The last chunk is filled up with the smallest step size.
        filled = jnp.concatenate([sizes, jnp.broadcast_to(sizes[-1], (rounds * chunk - self.candidates,))])
        evaluate = for_loop_body(lambda part: losses_at(line.loss_at, part, None))

        def look(at: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            index, _, _, full = at
            part = jax.lax.dynamic_slice(filled, (index * chunk,), (chunk,))
            losses = evaluate(part)
            full = jnp.where(index == 0, losses[0], full)
            good = enough(part, losses)
            best = jnp.argmax(good)
            size = jnp.where(good[best], part[best], jnp.zeros_like(part[0]))
            return index + 1, size, jnp.where(good[best], losses[best], full), full

        nothing = jnp.zeros((), sizes.dtype)
        start = (jnp.zeros((), jnp.int32), nothing, nothing, nothing)
        _, size, after, full = jax.lax.while_loop(lambda at: (at[1] == 0) & (at[0] < rounds), look, start)
        return size, after, full
