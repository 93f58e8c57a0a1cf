"""Conjugate gradients on many independent systems at once; see `api`."""

from __future__ import annotations

from curvax.kernels._batched import BatchedSolution
from curvax.kernels.batched_cg.api import BATCHED_CG, BATCHED_CG_PRODUCT, OPS, batched_cg

__all__ = ["BATCHED_CG", "BATCHED_CG_PRODUCT", "OPS", "BatchedSolution", "batched_cg"]
