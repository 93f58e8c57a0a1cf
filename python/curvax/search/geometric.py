"""What searches over 1, ratio, ratio^2, ... have in common."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Self

import jax
import jax.numpy as jnp

from curvax.search.base import StepSearch, check_counts


@dataclasses.dataclass(frozen=True)
class GeometricSearch(StepSearch):
    """A search that looks at a geometric series of step sizes; an implementor says which of them it takes.

    Attributes:
      candidates: step sizes in the series.
      ratio: of one to the one before, between 0 and 1.
      every, chunk: see `StepSearch`.
    """

    candidates: int = 10
    ratio: float = 0.5
    every: int = 1
    chunk: int | None = None

    kind: ClassVar[str]
    """What error messages call it."""

    def __post_init__(self) -> None:
        check_counts(self.kind, candidates=self.candidates, every=self.every, chunk=self.chunk)
        self._check_fraction("ratio")

    def _check_fraction(self, name: str) -> None:
        if not 0 < getattr(self, name) < 1:
            raise ValueError(f"{name} of a {self.kind} must be between 0 and 1, not {getattr(self, name)}.")

    @property
    def steps(self) -> str:
        """The series in words."""
        return f"{self.candidates} step sizes from 1 down, ratio {self.ratio:.3g}"

    @property
    def evaluations(self) -> int:
        return self.candidates + 1

    def with_chunk(self, chunk: int | None) -> Self:
        return dataclasses.replace(self, chunk=chunk)

    def step_sizes(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """1, ratio, ratio^2, ...: (candidates,)."""
        return jnp.asarray([self.ratio**i for i in range(self.candidates)], dtype)
