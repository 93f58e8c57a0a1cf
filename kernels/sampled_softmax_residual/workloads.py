"""Named rows for the tests and benchmarks of sampled_softmax_residual: those of softmax_hvp, without tangents."""

from __future__ import annotations

from curvax.kernels.softmax_hvp import workloads

WORKLOADS = tuple(work for work in workloads.WORKLOADS if work.tangents == 1)
