"""How the tests run Mosaic kernels: compiled on an NVIDIA GPU, in Pallas' interpreter with race detection elsewhere."""

from __future__ import annotations

from typing import Any

import jax

from curvax.kernels import _mosaic


def interpret() -> Any:
    """What to pass as `interpret`: nothing on a GPU, where the interpreter's callbacks would only be slow."""
    return None if jax.default_backend() == "gpu" else _mosaic.interpreter()
