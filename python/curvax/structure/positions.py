"""What the positions inside a model weigh, and inputs in which nothing is left of what weighs nothing.

A loss weighs the positions of its outputs (tokens, pixels). The weight of a position inside the model follows from the
outputs that it reaches (`curvax.structure.reach`):

1. Where the model acts on positions by themselves, a position has the mean weight of the outputs that it reaches.
2. Where it mixes them (attention, a kernel of several taps, pooling), all positions of an example share its weight
   evenly; but of an example that is masked in part, those to which no output of any weight reaches back have none:
   their cotangents are zero.
3. Weights that are alike within an example leave all of its positions alike.

    outputs of three tokens, the last one masked             1    1    0
    a layer that acts by token                               1    1    0
    a layer below causal attention                           1    1    0      token 3 reaches the masked output alone
    a layer below attention to all tokens                   2/3  2/3  2/3

What weighs nothing has the inputs of what counts, so that nothing of its own is left (`fill_idle_leaves`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.jaxprs import Path, Program
from curvax.structure.batch_axes import BatchAxes
from curvax.structure.capture import Capture, Factors
from curvax.structure.reach import ProgramReach, Reach, reach_of
from curvax.structure.uses import LayerUse


@dataclasses.dataclass(frozen=True)
class LossWeights:
    """The weights of a loss on a batch.

    Attributes:
      values: (B, ...) effective weights, shaped like positions or like outputs (`Loss.effective_weights`).
      outputs_ndim: number of axes of the outputs.
      axes: number of axes of the weights that the batch has; 0 for none, which are alike everywhere.
    """

    values: jax.Array
    outputs_ndim: int
    axes: int

    @staticmethod
    def of(weights: jax.Array, outputs: Any, given: object) -> LossWeights:
        """Of effective weights, outputs and the batch's own weights or `None`."""
        return LossWeights(weights, len(outputs.shape), 0 if given is None else np.ndim(given))  # type: ignore[arg-type]

    @property
    def flat(self) -> jax.Array:
        """(B, entries)."""
        return self.values.reshape(self.values.shape[0], -1)

    @property
    def examples(self) -> jax.Array:
        """(B,) weights of the examples."""
        return jnp.sum(self.flat, axis=1)

    @property
    def masks(self) -> bool:
        """Whether examples may weigh nothing."""
        return self.axes > 0

    @property
    def within(self) -> bool:
        """Whether weights may differ within an example."""
        return self.axes > 1 and math.prod(self.values.shape[1:]) > 1

    def flattened(self, outputs: jax.Array) -> LossWeights:
        """The same for outputs that are flattened to (B, entries)."""
        shape = (*self.values.shape, *[1] * (outputs.ndim - self.values.ndim))
        weights = jnp.broadcast_to(self.values.reshape(shape), outputs.shape).reshape(outputs.shape[0], -1)
        return LossWeights(weights, 2, self.axes)

    def reach(self, capture: Capture, steps: frozenset[Path] = frozenset()) -> ProgramReach:
        """Which weights of its example the arguments and some steps of a model reach."""
        return self.reach_in(capture.model.program, steps)

    def reach_in(self, program: Program, steps: frozenset[Path] = frozenset()) -> ProgramReach:
        """The same of the program of a model on one example."""
        shape = self.values.shape[1:]
        numbers = np.arange(math.prod(shape), dtype=np.int64).reshape(1, *shape)
        outputs = Reach.of(numbers.reshape(*numbers.shape, *[1] * (self.outputs_ndim - numbers.ndim)))
        return reach_of(program, [outputs], steps)


def position_weights(capture: Capture, factors: Factors, weights: LossWeights) -> list[jax.Array]:
    """The weights of the positions of every layer use, per layer use (B, T).

    Args:
      capture: the model.
      factors: of all examples.
      weights: of the loss.
    """
    uses, dtype = capture.structure.uses, capture.dtype
    # 3. All alike.
    if not weights.within:
        each = weights.examples.astype(dtype)[:, None]
        return [jnp.broadcast_to(each / use.positions, (each.shape[0], use.positions)) for use in uses]
    steps = weights.reach(capture, frozenset(path for use in uses for path in use.paths)).steps
    flat = weights.flat.astype(dtype)
    reaches = [functools.reduce(Reach.__or__, (steps[path] for path in use.paths)) for use in uses]
    return [_of_use(use, reach, flat, d) for use, reach, d in zip(uses, reaches, factors.cotangents, strict=True)]


def _of_use(use: LayerUse, reach: Reach, flat: jax.Array, d: jax.Array) -> jax.Array:
    # 1. Positions by themselves.
    spans = Spans(use.by_position(reach.first, np.min), use.by_position(reach.last, np.max))
    if spans.disjoint:
        return spans.means(flat) * (flat.shape[1] / use.positions)
    # 2. Positions that mix: those that count share the weight of their example.
    alive = spans.counted(flat) & jnp.any(d != 0, axis=(1, 3, 4))
    if math.prod(use.output_shape[i] for i in use.position_axes) == flat.shape[1]:
        # As many positions as the loss weighs are its tokens or pixels: one that counts does so even if its cotangent
        # is zero by chance, of a unit that is off or a softmax of one key.
        alive |= jnp.tile(flat != 0, (1, use.positions // flat.shape[1]))
    alive = jnp.where(_partial(flat), alive, jnp.ones_like(alive))
    count = jnp.maximum(jnp.sum(alive, axis=1, keepdims=True), 1).astype(flat.dtype)
    return jnp.where(alive, jnp.sum(flat, axis=1, keepdims=True) / count, jnp.zeros((), flat.dtype))


def _partial(flat: jax.Array) -> jax.Array:
    """(B, 1) whether an example is masked in part or as a whole."""
    return jnp.any(flat == 0, axis=1, keepdims=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Spans:
    """The weights that positions reach: runs of their numbers.

    Attributes:
      first, last: (T,) int64; `last` is less than `first` where none is reached.
    """

    first: np.ndarray
    last: np.ndarray

    @property
    def reached(self) -> np.ndarray:
        """(T,) whether there are any."""
        return self.last >= self.first

    @functools.cached_property
    def _distinct(self) -> tuple[np.ndarray, np.ndarray]:
        """(distinct spans (S, 2) in order, (T,) which of them each position has; 0 where it has none)."""
        pairs = np.stack([self.first, self.last], axis=1)
        distinct, places = np.unique(pairs[self.reached], axis=0, return_inverse=True)
        which = np.zeros(len(pairs), np.int32)
        which[self.reached] = places.reshape(-1)
        return distinct, which

    @property
    def disjoint(self) -> bool:
        """Whether positions act by themselves: none reaches a part of what another one does."""
        distinct, _ = self._distinct
        clear = bool(np.all(distinct[1:, 0] > distinct[:-1, 1]))
        return clear and (len(distinct) > 1 or len(self.first) == 1)

    @property
    def one_to_one(self) -> bool:
        """Whether positions act by themselves and no two of them reach the same."""
        return self.disjoint and len(self._distinct[0]) == np.sum(self.reached)

    def means(self, flat: jax.Array) -> jax.Array:
        """(B, T) means of the weights (B, entries) that positions reach.

        A position that reaches none has the mean of its example, as where nothing is masked, or zero if something is.
        """
        distinct, which = self._distinct
        lengths = distinct[:, 1] - distinct[:, 0] + 1
        places = (distinct[:, :1] + np.arange(lengths.max(initial=1))).astype(np.int32)
        inside = places <= distinct[:, 1:]
        reached = flat[:, np.where(inside, places, 0)] * jnp.asarray(inside, flat.dtype)
        means = jnp.sum(reached, axis=2) / jnp.asarray(lengths, flat.dtype)
        if self.reached.all():
            return means[:, which]
        idle = jnp.where(_partial(flat), jnp.zeros((), flat.dtype), jnp.mean(flat, axis=1, keepdims=True))
        return jnp.where(self.reached, jnp.take(means, which, axis=1) if len(distinct) else idle, idle)

    def counted(self, flat: jax.Array) -> jax.Array:
        """(B, T) whether positions reach a weight that is not zero."""
        before = jnp.cumsum(flat != 0, axis=1, dtype=jnp.int32)
        before = jnp.pad(before, ((0, 0), (1, 0)))
        first, end = (np.where(self.reached, x, 0).astype(np.int32) for x in (self.first, self.last + 1))
        return before[:, end] > before[:, first]


def fill_idle_inputs(capture: Capture, inputs: Sequence[jax.Array], weights: LossWeights | None) -> list[jax.Array]:
    """`fill_idle_leaves` of the inputs of a captured model; `weights` are `None` if all examples count."""
    if weights is None:
        return list(inputs)
    return fill_idle_leaves(lambda: capture.model.program, capture.model.axes, inputs, weights)


def fill_idle_leaves(
    single: Callable[[], Program], axes: BatchAxes, inputs: Sequence[jax.Array], weights: LossWeights
) -> list[jax.Array]:
    """Inputs in which examples and positions of no weight have the inputs of others: nothing is left of their own.

    The derivatives of a model at an input that nobody counts need not be finite, and zero times infinity is no zero.
    An example of zero weight takes all of its inputs from the first one that counts; where the model acts on positions
    by themselves, a position of zero weight takes them from the first one of its example that counts.

    Args:
      single: makes the program of the model on one example.
      axes: which leaves of the inputs hold the examples; the others stay as they are.
      inputs: leaves of the inputs.
      weights: of the loss.
    """
    if not weights.masks:
        return list(inputs)
    inputs, own = list(inputs), [i for i, axis in enumerate(axes.axes) if axis is not None]
    # Positions within each example, then whole examples.
    if weights.within:
        reaches = weights.reach_in(single()).arguments[-len(inputs) :]
        for i in own:
            inputs[i] = _fill_idle_positions(inputs[i], reaches[i], weights.flat)
    counted = jnp.any(weights.flat != 0, axis=1)
    for i in own:
        inputs[i] = jnp.where(_like(counted, inputs[i]), inputs[i], _first(inputs[i], counted, 0))
    return inputs


def _fill_idle_positions(x: jax.Array, reach: Reach, flat: jax.Array) -> jax.Array:
    """One leaf of the inputs (B, ...); its axes of positions are the most behind the first whose spans are disjoint."""
    for axes in range(x.ndim - 1, 0, -1) if reach.ndim == x.ndim else ():
        shape = x.shape[1 : 1 + axes]
        first, last = (
            np.broadcast_to(join(part, axis=(0, *range(1 + axes, x.ndim))), shape).ravel()
            for part, join in ((reach.first, np.min), (reach.last, np.max))
        )
        spans = Spans(first, last)
        if spans.one_to_one:
            positions = x.reshape(x.shape[0], len(first), *x.shape[1 + axes :])
            counted = spans.counted(flat)
            # What reaches nothing is left alone, and lends itself to nobody.
            return jnp.where(
                _like(counted | ~jnp.asarray(spans.reached), positions), positions, _first(positions, counted, 1)
            ).reshape(x.shape)
    return x


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
    return mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim))


def _first(x: jax.Array, counted: jax.Array, axis: int) -> jax.Array:
    """The first entry of `x` along `axis` that counts, the axis kept.

    It is found by a sum with one term: a lookup would gather a batch that is sharded over devices. Where nothing counts
    any finite number will do: ones, of which logarithm, root and quotient have a slope.
    """
    first = _like(counted & (jnp.cumsum(counted, axis, dtype=jnp.int32) == 1), x)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):
        # A random key is as good as another.
        return jax.lax.slice_in_dim(x, 0, 1, axis=axis)
    if x.dtype == jnp.bool_:
        return jnp.any(x & first, axis, keepdims=True)
    entry = jnp.sum(jnp.where(first, x, jnp.zeros_like(x)), axis, keepdims=True, dtype=x.dtype)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return entry
    return jnp.where(_like(jnp.any(counted, axis, keepdims=True), x), entry, jnp.ones_like(entry))
