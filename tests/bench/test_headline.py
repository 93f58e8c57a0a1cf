"""The numbers that README and docs/choose.md show are those of committed rows."""

from __future__ import annotations

import pathlib

import bench.headline as headline
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("name", sorted(headline.TABLES))
def test_the_table_is_what_the_rows_make(name: str) -> None:
    text = (ROOT / name).read_text()
    assert text == headline.with_table(text, headline.TABLES[name]()), "run python -m bench.headline"
    assert len(list(headline.TABLES[name]())) > 5


def test_a_row_that_is_not_there_is_an_error() -> None:
    with pytest.raises(LookupError, match="0 rows of physics"):
        headline.one("physics", "no such case", "900 + 120 points", "ms/step", "curvax")
