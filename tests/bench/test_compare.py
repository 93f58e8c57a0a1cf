"""A ratio that worsened by more than its spread is flagged, whichever way its metric points, and no other."""

from __future__ import annotations

import dataclasses

import bench.__main__ as command
import bench.compare as compare
import bench.schema as schema
import pytest

OLD = schema.Row("s", "case", "curvax", "ms/step", "x", 9.0, 10.0, 11.0, ratio=0.5, baseline="peer")


@pytest.mark.parametrize(
    ("metric", "ratio", "verdict"),
    [
        ("ms/step", 0.58, (False, False)),
        ("ms/step", 0.65, (True, False)),
        ("ms/step", 0.40, (False, True)),
        ("GB/s", 0.65, (False, True)),
        ("GB/s", 0.40, (True, False)),
    ],
)
def test_change_against_spread(metric, ratio, verdict):
    old = dataclasses.replace(OLD, metric=metric)
    (change,) = compare.changes([old], [dataclasses.replace(old, ratio=ratio)])
    assert change.spread == pytest.approx(0.2)
    assert (change.is_worse, change.is_better) == verdict


def test_only_what_both_have_is_compared():
    others = (
        dataclasses.replace(OLD, ratio=None),
        dataclasses.replace(OLD, baseline="another"),
        dataclasses.replace(OLD, x="y"),
    )
    assert compare.changes([OLD], others) == []


def test_committed_rows_are_no_worse_than_themselves(tmp_path, capsys):
    """The command, end to end, on what is committed and on a copy with one ratio made worse."""
    rows = compare.committed("plan", "HEAD")
    if not rows:
        pytest.skip("no checkout of a repository: there are no committed rows to compare with")
    schema.write(rows, "plan", tmp_path)
    assert command.main(["compare", str(tmp_path)]) == 0
    number = next(i for i, row in enumerate(rows) if row.ratio)
    rows[number] = dataclasses.replace(rows[number], ratio=100 * (rows[number].ratio or 0))
    schema.write(rows, "plan", tmp_path)
    assert command.main(["compare", str(tmp_path)]) == 1
    assert "worse: plan" in capsys.readouterr().out
