"""The tables under `bench/results` are those that the rows make, and the README has none of its own."""

from __future__ import annotations

import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import bench.markdown as markdown
import bench.schema as schema
import bench.tables as tables

README = ROOT / "bench" / "README.md"
# What `bench/gpu.sh` leaves in `results/gpu` is not committed.
ROWS = [path for path in markdown.files() if path.parent.name != "gpu"]


@pytest.mark.parametrize("path", ROWS, ids=lambda p: p.relative_to(schema.RESULTS).as_posix())
def test_committed_table_is_what_the_rows_make(path):
    committed = path.with_suffix(".md")
    assert committed.exists(), f"run {markdown.COMMAND}"
    assert committed.read_text() == markdown.document(path), f"{committed.name} is stale: run {markdown.COMMAND}"


def test_every_table_has_rows():
    assert {path.with_suffix(".jsonl") for path in schema.RESULTS.rglob("*.md")} == set(markdown.files())


def test_readme_quotes_and_pastes_no_rows():
    """The columns of a row are the README's only table; a table of figures belongs beside its rows."""
    heads = [line for line in README.read_text().splitlines() if line.startswith("|---")]
    assert heads == ["|---|---|"]


def test_readme_links_every_table():
    text = README.read_text()
    pages = [path.with_suffix(".md").relative_to(README.parent).as_posix() for path in ROWS]
    assert [page for page in pages if f"({page})" not in text] == []


def test_a_goal_and_a_share_of_the_bandwidth_are_shown(tmp_path):
    slow = schema.Row("kernels", "dots", "reference", "us", "8 floats", 1.0, 2.0, 3.0)
    fast = schema.Row("kernels", "dots", "native", "us", "8 floats", 1.0, 1.0, 1.0, 0.5, "reference", 0.8)
    rate = schema.Row("kernels", "dots", "native", "GB/s", "8 floats", 1.0, 1.0, 1.0, 0.25, "memory copy")
    rows = [slow, fast, rate]
    assert "| dots | 8 floats | native | us | 1 | 1 | 1 | 0.5 | reference | 0.8 met |" in list(tables.plain(rows))
    assert list(tables.kernels(rows))[-1].endswith("| 0.5 | reference | 25 % |")
    assert len(list(tables.kernels(rows))) == 4
    page = markdown.document(schema.write(rows, "kernels", tmp_path))
    assert page.startswith("# kernels\n") and f"commit {slow.commit}; {slow.device}" in page
