"""Adding one layer's inner products of row factors to a Gram matrix; see `api`."""

from __future__ import annotations

from curvax.kernels.gram_accumulate.api import GRAM_ACCUMULATE, OPS, gram_accumulate, gram_of_layers

__all__ = ["GRAM_ACCUMULATE", "OPS", "gram_accumulate", "gram_of_layers"]
