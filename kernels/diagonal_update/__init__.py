"""The vector work of Sophia and AdaHessian over all leaves of a pytree; see `api`."""

from __future__ import annotations

from curvax.kernels.diagonal_update.api import (
    DIAGONAL_ACCUMULATE,
    DIAGONAL_UPDATE,
    OPS,
    diagonal_accumulate,
    diagonal_update,
)
from curvax.kernels.diagonal_update.rule import (
    AccumulateRule,
    DenominatorRule,
    DiagonalEstimate,
    UpdateRule,
    UpdateScalars,
)

__all__ = [
    "DIAGONAL_ACCUMULATE",
    "DIAGONAL_UPDATE",
    "OPS",
    "AccumulateRule",
    "DenominatorRule",
    "DiagonalEstimate",
    "UpdateRule",
    "UpdateScalars",
    "diagonal_accumulate",
    "diagonal_update",
]
