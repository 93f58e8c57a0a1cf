"""Named layers for the benchmarks of gram_accumulate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """One layer and its batch.

    Attributes:
      name: as benchmarks print it.
      groups, per_group: examples, and rows (outputs) of each.
      into, out: width of the layer.
      positions: that it is applied at.
      large: for machines that do some 10^13 operations a second.
      note: where such a layer comes from.
    """

    name: str
    groups: int
    per_group: int
    into: int
    out: int
    positions: int = 1
    large: bool = False
    note: str = ""

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.groups * self.per_group

    @property
    def flops(self) -> float:
        """Of the lower triangle, factors kept."""
        products = self.total**2 * self.out + self.groups**2 * self.into
        return float(self.positions**2 * products)

    @property
    def bytes(self) -> float:
        """Half the float32 matrix read and written, and the factors read."""
        factors = self.positions * (self.groups * self.into + self.total * self.out)
        return 4.0 * (self.total**2 + factors)


WORKLOADS = (
    Workload("batch 128 x 10, 785 to 256", 128, 10, 785, 256, note="first layer of an MLP on MNIST, bias included"),
    Workload("batch 128 x 1, 785 to 256", 128, 1, 785, 256, note="the same with one output"),
    Workload("batch 128 x 9, 785 to 256", 128, 9, 785, 256, note="the same with softmax rows, one less than classes"),
    Workload("batch 32 x 10, 785 to 256", 32, 10, 785, 256, note="the same with a small batch"),
    Workload("batch 64 x 4, 4 positions of 256 to 256", 64, 4, 256, 256, positions=4, note="a layer over 4 tokens"),
    Workload("batch 2048 x 1, 1024 to 1024", 2048, 1, 1024, 1024, note="regression with a large batch"),
    Workload("batch 512 x 10, 1024 to 1024", 512, 10, 1024, 1024, large=True, note="5120 rows"),
    Workload("batch 16384 x 1, 1024 to 1024", 16384, 1, 1024, 1024, large=True, note="a matrix of 1 GiB"),
)
