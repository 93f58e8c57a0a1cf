"""Products with the Hessian of the softmax cross entropy in its logits; see `api`."""

from __future__ import annotations

from curvax.kernels.softmax_hvp.api import OPS, SOFTMAX_HVP, softmax_hvp

__all__ = ["OPS", "SOFTMAX_HVP", "softmax_hvp"]
