"""The former name of `curvax.transforms`, which stood in the way of `import optax`; it goes with the next release."""

from __future__ import annotations

from curvax.deprecation import moved

__getattr__ = moved("curvax.optax", "curvax.transforms")
