"""Numbers that a caller may trace, as `optax.inject_hyperparams` does with every one: checked where they are known."""

from __future__ import annotations

import operator
from typing import TypeAlias

import jax

Number: TypeAlias = float | jax.Array
"""A real number, possibly traced."""

Count: TypeAlias = int | jax.Array
"""An integer, possibly traced."""


def is_known(*values: Number | None) -> bool:
    """Whether none of the values is traced, so that Python can look at them."""
    return not any(isinstance(value, jax.core.Tracer) for value in values)


def check_fraction(name: str, value: Number) -> None:
    """Raises ValueError for a known number that is not in [0, 1), where the decays of averages are."""
    if is_known(value) and not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}.")


def check_positive(name: str, value: Number) -> None:
    """Raises ValueError for a known number that is not positive."""
    if is_known(value) and not value > 0:
        raise ValueError(f"{name} must be positive, got {value}.")


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
