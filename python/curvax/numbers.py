"""Numbers that a caller may trace, as `optax.inject_hyperparams` does with every one: checked where they are known."""

from __future__ import annotations

import math
import operator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

Number: TypeAlias = float | jax.Array
"""A real number, possibly traced."""

Count: TypeAlias = int | jax.Array
"""An integer, possibly traced."""


def is_known(*values: Number | None) -> bool:
    """Whether none of the values is traced, so that Python can look at them."""
    return not any(isinstance(value, Tracer) for value in values)


def as_dtype(value: Number, dtype: Any) -> Number:
    """A number to compute with in `dtype`: a Python number as it is, an array cast."""
    return value if isinstance(value, int | float) else jnp.asarray(value, dtype)


def root(value: Number) -> Number:
    """The square root, by Python's precision where the number is Python's."""
    return math.sqrt(value) if isinstance(value, int | float) else jnp.sqrt(value)


def shown(value: Number) -> str:
    """The number for people."""
    return f"{value:g}" if is_known(value) else "traced"


def check_fraction(name: str, value: Number) -> None:
    """Raises ValueError for a known number that is not in [0, 1), where the decays of averages are."""
    if is_known(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_positive(name: str, value: Number) -> None:
    """Raises ValueError for a known number that is not positive and finite."""
    if is_known(value) and not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}.")


def check_not_negative(name: str, value: Number) -> None:
    """Raises ValueError for a known number that is negative or not finite."""
    if is_known(value) and not 0 <= value < math.inf:
        raise ValueError(f"{name} must be non-negative and finite, got {value}.")


def whole(name: str, value: int | jax.Array) -> int:
    """A number that shapes what is computed, as a Python integer.

    Raises:
      TypeError: it is traced, or no integer.
    """
    if not is_known(value):
        raise TypeError(
            f"{name} is traced, and it shapes what is computed: pass a Python integer; "
            f"optax.inject_hyperparams leaves it one with static_args=({name!r},)."
        )
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}.") from None
