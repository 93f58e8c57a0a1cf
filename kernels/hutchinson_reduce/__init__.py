"""The diagonal that several Hutchinson probes estimate, averaged over blocks; see `api`."""

from __future__ import annotations

from curvax.kernels.hutchinson_reduce.api import HUTCHINSON_REDUCE, OPS, hutchinson_reduce

__all__ = ["HUTCHINSON_REDUCE", "OPS", "hutchinson_reduce"]
