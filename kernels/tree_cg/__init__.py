"""The vector work of one conjugate gradient iteration over all leaves of a pytree; see `api`."""

from __future__ import annotations

from curvax.kernels.tree_cg.api import CG_DIRECTION, CG_UPDATE, DOTS, OPS, cg_direction, cg_update, dots

__all__ = ["CG_DIRECTION", "CG_UPDATE", "DOTS", "OPS", "cg_direction", "cg_update", "dots"]
