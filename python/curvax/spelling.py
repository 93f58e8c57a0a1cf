"""Errors that suggest the nearest known word."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean ...?' for the closest known word, or the whole list if none is close."""
    choices = sorted(known)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else f" Known: {', '.join(choices)}."


def check_keywords(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first keyword that is not known, naming the nearest that is."""
    choices = set(known)
    for word in given:
        if word not in choices:
            raise TypeError(f"{owner} has no keyword '{word}'.{nearest(word, choices)}")
