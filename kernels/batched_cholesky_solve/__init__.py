"""Cholesky solves of many independent systems at once; see `api`."""

from __future__ import annotations

from curvax.kernels._batched import BatchedSolution
from curvax.kernels.batched_cholesky_solve.api import BATCHED_CHOLESKY_SOLVE, OPS, batched_cholesky_solve

__all__ = ["BATCHED_CHOLESKY_SOLVE", "OPS", "BatchedSolution", "batched_cholesky_solve"]
