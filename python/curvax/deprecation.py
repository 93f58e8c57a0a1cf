"""Names that a release still takes and the next one will not."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any


def moved(former: str, present: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module under its former name.

    Args:
      former: the module's former name, `"curvax.optax"`.
      present: the module that has everything now, `"curvax.transforms"`.

    Returns:
      name -> the attribute of that name of the present module, with a DeprecationWarning that names both.
    """

    def attribute(name: str) -> Any:
        value = getattr(importlib.import_module(present), name)
        warnings.warn(
            f"{former}.{name} is {present}.{name} now: the former name goes with the next release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return value

    return attribute
