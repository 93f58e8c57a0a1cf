"""A step size from the quadratic model alone, without a look at the loss."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from curvax.numbers import Number, check_positive, shown
from curvax.search.base import Line, Searched, StepSearch, check_counts, slope_of


@dataclasses.dataclass(frozen=True)
class QuadraticModel(StepSearch):
    """The step size at which the quadratic model along the update is least, but at most `longest`.

    With the exact curvature C of the step's batch the model is a g.d + a^2 (d.Cd + lam d.d) / 2, least at

        a = -g.d / (d.Cd + lam d.d)                                  (Martens and Grosse 2015, section 7)

    whatever the approximate inverse that d came from. A mean of gradients may point uphill on one batch: then d is as
    long as the same slope downhill would have it. Where the model has no minimum along d, d is taken up to `longest`.
    One curvature product a search, no forward pass more than that.

    Attributes:
      longest: largest step size, may be traced; 1, so that it shortens updates and does not lengthen them. `None` is
        no bound: the learning rate cancels out, and a step follows the noise of its batch (the paper has batches that
        grow).
      every: every how many steps to search; 1. Steps between take the step size of the last search.

    Raises:
      ValueError: a number out of range.
    """

    longest: Number | None = 1.0
    every: int = 1
    needs_product = True

    def __post_init__(self) -> None:
        check_counts("quadratic search", every=self.every)
        if self.longest is not None:
            check_positive("longest of a quadratic search", self.longest)

    @property
    def name(self) -> str:
        bound = "" if self.longest is None else f", at most {shown(self.longest)}"
        return f"minimum of the quadratic model{bound}"

    @property
    def evaluations(self) -> int:
        return 0

    def find(self, line: Line) -> Searched:
        slope = slope_of(line, "a quadratic search")
        if line.bend is None:
            raise ValueError("a quadratic search needs curvature products along the update, and this line has none.")
        bend = line.bend()
        curved = bend > 0
        least = jnp.abs(slope) / jnp.where(curved, bend, jnp.ones_like(bend))
        most = jnp.asarray(1.0 if self.longest is None else self.longest, least.dtype)
        size = jnp.where(curved, least if self.longest is None else jnp.minimum(least, most), most)
        known = jnp.isfinite(slope) & jnp.isfinite(bend)
        missing = jnp.full_like(size, jnp.nan)
        return Searched(jnp.where(known, size, jnp.zeros_like(size)), missing, missing)
