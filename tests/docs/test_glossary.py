"""Every word of the glossary lives where it says."""

from __future__ import annotations

import functools
import importlib
import pathlib
import re

import pytest

import curvax.kernels

pytestmark = pytest.mark.fast

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "glossary.md"
ROWS = [line for line in PAGE.read_text().splitlines() if line.startswith("| ") and not line.startswith("| word")]


def _places() -> list[str]:
    return sorted({place for row in ROWS for place in re.findall(r"`([^`]+)`", row.split("|")[-2])})


@pytest.mark.parametrize("place", _places())
def test_places_exist(place: str) -> None:
    if place.endswith((".py", "/")):
        roots = [pathlib.Path(curvax.__file__).parent, pathlib.Path(curvax.kernels.__file__).parent.parent]
        assert any((root / place).exists() for root in roots)
        return
    module, *names = place.split(".")
    owner = importlib.import_module(f"curvax.{module}")
    assert functools.reduce(getattr, names, owner) is not None


def test_every_word_has_a_place() -> None:
    assert len(ROWS) > 25
    assert all("`" in row.split("|")[-2] for row in ROWS)
