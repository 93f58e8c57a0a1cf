"""What every keyword of its type must be, so that a slip is told where it is made and not from inside a step."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from curvax.spelling import described

_SWITCHES, _COUNTS, _NUMBERS = ("bool",), ("int", "int | None"), ("float", "float | None")
_RATES = ("ScalarOrSchedule | None",)
_MAPPINGS = ("Mapping[str, Any]", "Mapping[str, Any] | None")


def check_fields(options: Any) -> None:
    """Raises TypeError for a field of a dataclass that is annotated as a number, switch or mapping and is none.

    What may be traced or a schedule is annotated otherwise, and checked where it is used.
    """
    for field in dataclasses.fields(options):
        value, kind = getattr(options, field.name), str(field.type)
        if value is None and kind.endswith("None"):
            continue
        if kind in _SWITCHES and not isinstance(value, bool | np.bool_):
            raise TypeError(f"{field.name} is {described(value)}: pass True or False.")
        if kind in _COUNTS and (isinstance(value, bool) or not isinstance(value, numbers.Integral)):
            raise TypeError(f"{field.name} is {described(value)}: pass a whole number.")
        if kind in _NUMBERS and (isinstance(value, str | bool | Mapping) or callable(value)):
            raise TypeError(f"{field.name} is {described(value)}: pass a number.")
        if kind in _RATES and isinstance(value, str | bool | Mapping):
            raise TypeError(f"{field.name} is {described(value)}: pass a number or an Optax schedule.")
        if kind in _MAPPINGS and not isinstance(value, Mapping):
            raise TypeError(f"{field.name} is {described(value)}: pass a mapping from names to values.")
