"""Errors that suggest the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest known word, or the whole list if none is close."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(choices)}."


def described(value: Any) -> str:
    """A value as an error names it: 'the class KFAC', 'a str'."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}"


def check_instance(name: str, value: Any, kind: type[Any], *, optional: bool = False) -> None:
    """Raises TypeError for an option that is no instance of a module's class, nor `None` where that may be.

    Args:
      name: of the option.
      value: what it is.
      kind: the class.
      optional: whether `None` does without.
    """
    if isinstance(value, kind) or (optional and value is None):
        return
    package = ".".join(kind.__module__.split(".")[:2])
    wanted = f"an instance, {value.__name__}(...)" if isinstance(value, type) else f"a {package}.{kind.__name__}"
    raise TypeError(f"{name} is {described(value)}: pass {wanted}{', or None to do without' if optional else ''}.")


def respelled(owner: str, given: Mapping[str, Any], spellings: Mapping[str, str]) -> dict[str, Any]:
    """The keywords under the names that curvax has for them; TypeError if one is given under both."""
    for word, ours in spellings.items():
        if word in given and ours in given:
            raise TypeError(f"{owner}: {word} and {ours} are one thing: give {ours} alone.")
    return {spellings.get(word, word): value for word, value in given.items()}


def check_keywords(
    owner: str, given: Iterable[str], known: Iterable[str], instead: Mapping[str, str] | None = None
) -> None:
    """Raises TypeError for the first keyword that is not known, with what to write instead or the nearest that is."""
    choices = set(known)
    for word in given:
        if word in choices:
            continue
        if instead is not None and word in instead:
            raise TypeError(f"{owner} has no keyword '{word}': {instead[word]}")
        raise TypeError(f"{owner} has no keyword '{word}'.{nearest(word, choices)}")
