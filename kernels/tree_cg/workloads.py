"""Named vectors for the tests and benchmarks of tree_cg."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """A pytree vector: the shapes of its leaves.

    Attributes:
      name: as benchmarks print it.
      shapes: one per leaf.
      note: where such a vector comes from.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    note: str


WORKLOADS = (
    Workload("leaf_270k", ((270_000,),), "a raveled small MLP"),
    Workload(
        "mlp_784",
        ((784, 256), (256,), (256, 256), (256,), (256, 10), (10,)),
        "an MLP 784-256-256-10: two leaves hold almost everything",
    ),
    Workload("leaves_8x30k", ((30_000,),) * 8, "small enough that waking threads can cost more than they bring"),
    Workload("leaves_50x200k", ((200_000,),) * 50, "a 25-layer network: many leaves, beyond the caches"),
    Workload("leaf_10m", ((10_000_000,),), "one leaf beyond the caches"),
)
