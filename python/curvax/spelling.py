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
