"""The range of JAX versions that curvax is tested with."""

from __future__ import annotations

import warnings

import jax

OLDEST_JAX = (0, 10, 2)
"""Oldest version tested, and required."""

NEWEST_JAX = (0, 12)
"""Newest minor version tested."""


def release(version: str) -> tuple[int, ...]:
    """The leading integers of a version string: "0.12.0.1.dev3" gives (0, 12, 0, 1)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def untested(version: str) -> str | None:
    """One sentence if this JAX version is outside the tested range, else None."""
    numbers = release(version)
    oldest, newest = ".".join(map(str, OLDEST_JAX)), ".".join(map(str, NEWEST_JAX))
    if OLDEST_JAX <= numbers and numbers[: len(NEWEST_JAX)] <= NEWEST_JAX:
        return None
    return f"curvax is tested with jax {oldest} to {newest}.x, and this is {version}: install one of those if in doubt."


def warn_if_untested() -> None:
    """Warns once per process if JAX is outside the tested range."""
    message = untested(jax.__version__)
    if message is not None:
        warnings.warn(message, UserWarning, stacklevel=3)
