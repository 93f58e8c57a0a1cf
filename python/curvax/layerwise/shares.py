"""Shares of a minibatch: a set of blocks each, whose curvature is taken on the share's examples alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from curvax.curvature import Evaluation
from curvax.layerwise.blocks import ParameterBlocks


@dataclasses.dataclass(frozen=True)
class Shares:
    """Examples and blocks, cut alike.

    Attributes:
      bounds: first example of each share, and the number of examples.
      blocks: the blocks of each share. Neighbors in depth go to different shares, so that all have about the same
        work: the tangent of a deep block passes through few layers, that of a shallow one through many.
    """

    bounds: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(count: int, blocks: ParameterBlocks, examples: int) -> Shares:
        """`count` shares, or one for each block if there are fewer.

        Raises:
          ValueError: there are fewer examples than shares.
        """
        count = min(count, blocks.count)
        if examples < count:
            raise ValueError(
                f"{count} shares need as many examples in every minibatch (or microbatch), and there are {examples}: "
                "make minibatches larger, or shares= smaller."
            )
        return Shares(share_bounds(count, examples), tuple(tuple(range(i, blocks.count, count)) for i in range(count)))

    def cut(self, index: int, weights: jax.Array) -> jax.Array:
        """Share `index` of weights."""
        return weights[self.bounds[index] : self.bounds[index + 1]]

    def evaluation(self, index: int, whole: Evaluation, weights: jax.Array, model_state: Any) -> Evaluation:
        """`whole` on share `index`, with a random key of its own."""
        key = None if whole.model_key is None else jax.random.fold_in(whole.model_key, index)
        if whole.axes is None:
            raise AssertionError("what is cut into shares knows where its examples are.")
        batch = whole.axes.slice(whole.batch, self.bounds[index], self.bounds[index + 1])
        weights = self.cut(index, weights)
        return dataclasses.replace(whole, batch=batch, weights=weights, model_state=model_state, model_key=key)


def share_bounds(count: int, examples: int) -> tuple[int, ...]:
    """First example of each of `count` shares, and the number of examples."""
    return tuple(examples * i // count for i in range(count + 1))
