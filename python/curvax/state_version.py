"""The version of the form that states have, so that a state of another version is refused in one sentence.

States of methods hold it as a static field; states of `curvax.optimizers`, which are named tuples, write it when they
are pickled. Checkpointers that store the leaves of a tree alone (Orbax, `numpy.savez`) store no static field: put
`state.stamp` beside the leaves, and give it to `state.check_stamp` (docs/optax.md).
"""

from __future__ import annotations

from typing import Any

STATE_VERSION = 2
"""Raised by every release whose states have other fields, or other meanings of them."""


def check_state_version(owner: str, version: Any) -> None:
    """Raises ValueError for a state of another version.

    Args:
      owner: name of the state's class.
      version: what the state says, `None` if it says nothing.
    """
    if version == STATE_VERSION:
        return
    other = "without a version" if version is None else f"of version {version}"
    raise ValueError(
        f"this {owner} is {other}, and this release of curvax takes version {STATE_VERSION}: call init again, or go on "
        "with the release that made it."
    )


def pickled(state: tuple[Any, ...]) -> tuple[Any, ...]:
    """The `__reduce__` of a named tuple: its fields, and the version of their form."""
    return _unpickled, (type(state), STATE_VERSION, tuple(state))


def _unpickled(kind: type[Any], version: int, fields: tuple[Any, ...]) -> Any:
    check_state_version(kind.__name__, version)
    return kind(*fields)
