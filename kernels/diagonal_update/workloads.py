"""Named parameter trees for the tests and benchmarks of the diagonal methods."""

from __future__ import annotations

from curvax.kernels.tree_cg.workloads import Workload

WORKLOADS = (
    Workload(
        "mlp_784",
        ((784, 256), (256,), (256, 256), (256,), (256, 10), (10,)),
        "an MLP 784-256-256-10: two leaves hold almost everything",
    ),
    Workload("leaves_50x200k", ((400, 500),) * 50, "a 25-layer network: many leaves, beyond the caches"),
    Workload("leaf_10m", ((2_500, 4_000),), "one leaf beyond the caches"),
    Workload("small_8x1k", ((32, 32),) * 8, "so small that a call's overhead shows"),
)
