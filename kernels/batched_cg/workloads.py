"""Named systems for the tests and benchmarks of batched_cg and batched_cholesky_solve."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Many systems of one size.

    Attributes:
      systems: how many.
      n: unknowns of each.
      condition: of each matrix; eigenvalues are spaced geometrically.
      note: where such systems come from.
    """

    systems: int
    n: int
    condition: float
    note: str

    @property
    def name(self) -> str:
        """As benchmarks print it."""
        return f"{self.systems} x {self.n}, condition {self.condition:g}"


WORKLOADS = (
    Workload(1024, 64, 100, "the blocks of a block-diagonal curvature"),
    Workload(1, 8, 100, "a single tiny system: what a call costs"),
    Workload(4096, 8, 100, "many tiny blocks"),
    Workload(1024, 16, 100, "one vector of the processor per row"),
    Workload(256, 32, 1e4, "ill-conditioned"),
    Workload(4096, 64, 100, "beyond the caches"),
    Workload(1024, 64, 1e4, "ill-conditioned"),
    Workload(16, 100, 100, "rows that are no whole vectors"),
    Workload(256, 128, 100, "beyond the first-level cache"),
    Workload(1, 256, 100, "one larger system"),
    Workload(64, 256, 1e4, "larger and ill-conditioned"),
)
