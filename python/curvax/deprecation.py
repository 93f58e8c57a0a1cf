"""Names that a release still takes and the next one will not.

A module under a former name is one line, `__getattr__ = moved("curvax.optax", "curvax.transforms")`; a module some of
whose names have changed has `__getattr__ = former_names(__name__, {"Record": "curvax.telemetry.MetricRecord"})`. Both
give what has the name now, with one warning that says so and points to who asked.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any


def warn_former(former: str, present: str, *, stacklevel: int = 2) -> None:
    """Warns that `former` is `present` now.

    Args:
      former, present: as a user writes them, `"curvax.optax.scale_by_ggn"`.
      stacklevel: 2 blames whoever called the function that calls this one, as in `warnings.warn`.
    """
    warnings.warn(
        f"{former} is {present} now: the former name goes with the next release.",
        DeprecationWarning,
        stacklevel=stacklevel + 1,
    )


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
        warn_former(f"{former}.{name}", f"{present}.{name}")
        return value

    return attribute


def former_names(module: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module some of whose names have changed.

    Args:
      module: its `__name__`.
      names: former name in it -> full present name, `"curvax.telemetry.MetricRecord"`.

    Returns:
      name -> what has the present name, with a DeprecationWarning; AttributeError for any other name.
    """

    def attribute(name: str) -> Any:
        present = names.get(name)
        if present is None:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        owner, _, attribute_name = present.rpartition(".")
        value = getattr(importlib.import_module(owner), attribute_name)
        warn_former(f"{module}.{name}", present)
        return value

    return attribute
