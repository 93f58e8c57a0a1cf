"""Flax's serialization for the states of all methods, where Flax was imported after they were made."""

from __future__ import annotations

import importlib

from curvax.execute import MethodState, register
from curvax.layerwise.state import OuterState


def register_with_flax() -> None:
    """Registers the states of methods with `flax.serialization`, so that `to_bytes` and `from_bytes` take them.

    `method.init` does so by itself if the program has imported Flax by then. Bytes carry the stamp of the state
    (`state.stamp`), and `from_bytes` refuses those of another method.

    Raises:
      ImportError: there is no Flax.
    """
    serialization = importlib.import_module("flax.serialization")
    for kind in (MethodState, OuterState):
        register(kind, serialization)
