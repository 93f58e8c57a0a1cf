"""Search over a geometric grid of step sizes, all of them in one batched forward pass."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from curvax.search.base import Line, Searched, at_its_floor, losses_at
from curvax.search.geometric import GeometricSearch


@dataclasses.dataclass(frozen=True)
class GridSearch(GeometricSearch):
    """The step size 1, ratio, ratio^2, ... of the smallest loss, or 0 if none is below the loss at the start.

    ENGD-W searches 2^-k for k = 0 .. 30 (arXiv 2505.21404, after Müller and Zeinhofer 2023); Abreu et al. (2025, arXiv
    2510.09378) five powers of 1 / sqrt(2). A step whose full length changes the loss by no more than rounding is taken
    whole: at the floor of its dtype a loss falls for no step size.

    Attributes:
      candidates: step sizes tried; 10, down to 1/512. A direction that needs a smaller one is better damped more.
      ratio: 1/2.
      every: every how many steps to search; 1. Steps between take the step size of the last search.
      chunk: step sizes evaluated at once; `None` takes as many as fit into memory, all of them where nothing is known.

    Raises:
      ValueError: a number out of range.
    """

    kind = "grid search"

    @property
    def name(self) -> str:
        return f"grid of {self.steps}"

    def find(self, line: Line) -> Searched:
        sizes = self.step_sizes(line.dtype)
        if line.loss is None:
            both = losses_at(line.loss_at, jnp.concatenate([jnp.zeros(1, sizes.dtype), sizes]), self.chunk)
            before, losses = both[0], both[1:]
        else:
            before, losses = line.loss, losses_at(line.loss_at, sizes, self.chunk)
        best = jnp.argmin(losses)
        lower = losses[best] < before
        whole = ~lower & at_its_floor(line, before, losses[0])
        best = jnp.where(lower, best, 0)
        size = jnp.where(lower | whole, sizes[best], jnp.zeros((), sizes.dtype))
        return Searched(size, before, losses[best])
