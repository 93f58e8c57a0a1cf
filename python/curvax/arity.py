"""Functions of users that take other arguments than they will be called with: told before anything is traced."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any


def check_takes(
    name: str, function: Callable[..., Any], arguments: Sequence[str], keywords: Sequence[str] = ()
) -> None:
    """Raises TypeError unless `function(*arguments, **keywords)` is a call that its signature allows.

    Args:
      name: of the option that the function is given by.
      function: the function; one without a signature is believed.
      arguments: names of what it is called with by position, in order.
      keywords: names of what it is called with by keyword.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*arguments, **dict.fromkeys(keywords))
    except TypeError:
        call = ", ".join([*arguments, *(f"{word}={word}" for word in keywords)])
        raise TypeError(f"{name} is called as {name}({call}), and this one takes {signature}: write it so.") from None
