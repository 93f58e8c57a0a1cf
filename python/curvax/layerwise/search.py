"""The line search behind an inner loop: `curvax.search.GridSearch` on minibatches of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature import Evaluation
from curvax.search import GridSearch
from curvax.search.base import check_counts
from curvax.structure.batch_axes import BatchAxes, Parts
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class LineSearch:
    """The step size with the smallest loss on fresh data, or no step if none is below the loss where it started.

    Candidates are ratio^i for i = 0 .. candidates - 1 (Abreu et al. 2025, arXiv 2510.09378), and 0, which rejects.

    Attributes:
      candidates: step sizes tried; 5 as in the paper at 45M parameters (10 at 150M).
      ratio: 1 / sqrt(2), the paper's.
      minibatches: how many parts of the step's batch, each as large as an inner minibatch, the search looks at; the
        paper takes as many as inner steps, 1 is the least.
      chunk: candidates evaluated at once, each with a copy of the parameters and of the activations; `None` for all.

    Raises:
      ValueError: a number out of range.
    """

    candidates: int = 5
    ratio: float = 0.5**0.5
    minibatches: int = 1
    chunk: int | None = None

    def __post_init__(self) -> None:
        counts = {"candidates": self.candidates, "minibatches": self.minibatches, "chunk": self.chunk}
        check_counts("line search", **counts)
        _ = self.grid  # which looks at the ratio

    @property
    def grid(self) -> GridSearch:
        """What chooses the step size."""
        return GridSearch(self.candidates, self.ratio, chunk=self.chunk)

    def parts(self, batch: Any, axes: BatchAxes) -> Parts:
        """The search batch in minibatches."""
        for examples in axes.sizes(batch):
            if examples == 0 or examples % self.minibatches:
                raise ValueError(
                    f"the search batch has {examples} examples: give it a multiple of the line search's "
                    f"{self.minibatches} minibatches."
                )
        return axes.parts(batch, None, self.minibatches)

    def mean_loss(
        self, value: Callable[[PyTree, Evaluation], jax.Array], params: PyTree, evaluation: Evaluation, parts: Parts
    ) -> jax.Array:
        """Mean loss over the minibatches.

        Args:
          value: (trainable parameters, evaluation) -> loss.
          params: trainable.
          evaluation: everything else but the batch.
          parts: the batch, from `parts`.
        """

        def one(examples: Any) -> jax.Array:
            return value(params, dataclasses.replace(evaluation, batch=parts.part(examples)))

        if self.minibatches == 1:
            return one([x[0] for x in parts.held])
        return jnp.mean(jax.lax.map(one, parts.held))
