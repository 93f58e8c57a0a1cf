"""Line search over a geometric grid of step sizes, all candidates in one batched forward pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from curvax.curvature import Evaluation
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
        for field in ("candidates", "minibatches"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} of a line search must be at least 1, not {getattr(self, field)}.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk of a line search must be at least 1 or None, not {self.chunk}.")
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio of a line search must be between 0 and 1, not {self.ratio}.")

    def step_sizes(self, dtype: Any) -> jax.Array:
        """0, then the candidates from the largest to the smallest: (candidates + 1,)."""
        return jnp.asarray([0.0, *(self.ratio**i for i in range(self.candidates))], dtype)

    def parts(self, batch: Any, axes: BatchAxes) -> Parts:
        """The search batch in minibatches."""
        for examples in axes.sizes(batch):
            if examples == 0 or examples % self.minibatches:
                raise ValueError(
                    f"the search batch has {examples} examples: give it a multiple of the line search's "
                    f"{self.minibatches} minibatches."
                )
        return axes.parts(batch, None, self.minibatches)

    def losses(
        self,
        value: Callable[[PyTree, Evaluation], jax.Array],
        at: Callable[[jax.Array], PyTree],
        step_sizes: jax.Array,
        evaluation: Evaluation,
        parts: Parts,
    ) -> jax.Array:
        """Mean loss over the minibatches for each step size.

        Args:
          value: (trainable parameters, evaluation) -> loss.
          at: step size -> trainable parameters.
          step_sizes: (n,).
          evaluation: everything else but the batch.
          parts: the batch, from `parts`.
        """

        def loss(step_size: jax.Array) -> jax.Array:
            params = at(step_size)

            def one(examples: Any) -> jax.Array:
                return value(params, dataclasses.replace(evaluation, batch=parts.part(examples)))

            if self.minibatches == 1:
                return one([x[0] for x in parts.held])
            return jnp.mean(jax.lax.map(one, parts.held))

        if self.chunk is None:
            return jax.vmap(loss)(step_sizes)
        return jax.lax.map(loss, step_sizes, batch_size=self.chunk)
