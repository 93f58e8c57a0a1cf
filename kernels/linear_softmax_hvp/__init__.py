"""Gauss-Newton products through a linear softmax head, in the memory of a few rows of logits; see `api`."""

from __future__ import annotations

from curvax.kernels.linear_softmax_hvp.api import LINEAR_SOFTMAX_HVP, OPS, linear_softmax_hvp
from curvax.kernels.linear_softmax_hvp.blocks import Cotangents, Tangent

__all__ = ["LINEAR_SOFTMAX_HVP", "OPS", "Cotangents", "Tangent", "linear_softmax_hvp"]
