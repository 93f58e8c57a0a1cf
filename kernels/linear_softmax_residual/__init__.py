"""Softmax cross entropy and its gradient through a linear head, in the memory of a few rows of logits; see `api`."""

from __future__ import annotations

from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Tangent
from curvax.kernels.linear_softmax_residual.api import (
    LINEAR_SOFTMAX_RESIDUAL,
    OPS,
    linear_softmax_loss,
    linear_softmax_residual,
)

__all__ = ["LINEAR_SOFTMAX_RESIDUAL", "OPS", "Cotangents", "Tangent", "linear_softmax_loss", "linear_softmax_residual"]
