"""Residuals of the softmax cross entropy at labels drawn from the softmax itself; see `api`."""

from __future__ import annotations

from curvax.kernels.sampled_softmax_residual.api import OPS, SAMPLED_SOFTMAX_RESIDUAL, sampled_softmax_residual

__all__ = ["OPS", "SAMPLED_SOFTMAX_RESIDUAL", "sampled_softmax_residual"]
