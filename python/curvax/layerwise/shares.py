"""Shares of a minibatch: a set of blocks each, whose curvature is taken on the share's examples alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from curvax.curvature import Evaluation
from curvax.layerwise.blocks import Blocks


@dataclasses.dataclass(frozen=True)
class Shares:
    """Examples and blocks, cut alike.

    Attributes:
      bounds: first example of each share, and the number of examples.
      blocks: the blocks of each share. Neighbours in depth go to different shares, so that all have about the same
        work: the tangent of a deep block passes through few layers, that of a shallow one through many.
    """

    bounds: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(count: int, blocks: Blocks, batch: Any) -> Shares:
        """`count` shares, or one for each block if there are fewer.

        Raises:
          ValueError: the batch has no common leading axis, or fewer examples than shares.
        """
        sizes = {x.shape[0] if x.ndim else 0 for x in jax.tree.leaves(batch)}
        count = min(count, blocks.count)
        if len(sizes) != 1 or min(sizes) < count:
            raise ValueError(
                f"{count} shares need as many examples in every minibatch (or microbatch), but its leading axes are "
                f"{sorted(sizes)}: make minibatches larger, or shares= smaller."
            )
        examples = sizes.pop()
        bounds = tuple(examples * i // count for i in range(count + 1))
        return Shares(bounds, tuple(tuple(range(i, blocks.count, count)) for i in range(count)))

    def cut(self, index: int, values: Any) -> Any:
        """Share `index` of arrays with a leading axis of examples."""
        return jax.tree.map(lambda x: x[self.bounds[index] : self.bounds[index + 1]], values)

    def evaluation(self, index: int, whole: Evaluation, omega: jax.Array, model_state: Any) -> Evaluation:
        """`whole` on share `index`, with a random key of its own."""
        key = None if whole.model_key is None else jax.random.fold_in(whole.model_key, index)
        batch, omega = self.cut(index, (whole.batch, omega))
        return dataclasses.replace(whole, batch=batch, omega=omega, model_state=model_state, model_key=key)
