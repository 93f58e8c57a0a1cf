"""A short table of rows: what each implementation takes, against its baseline and against the memory's bandwidth.

python -m bench.summary FOLDER
"""

from __future__ import annotations

import pathlib
import sys

from bench import schema
from bench.schema import Row
from bench.tables import share_of_copy
from curvax.pipes import until_closed


def main(folder: pathlib.Path) -> None:
    """Prints the summary of every `*.jsonl` in the folder."""
    rows = [row for path in sorted(folder.glob("*.jsonl")) for row in schema.read(path)]
    if not rows:
        print(f"no rows in {folder}")
        return
    first = rows[0]
    print(f"{first.device}; {first.versions}; commit {first.commit}, {first.date}")
    for row in rows:
        if row.suite == "limits":
            print(f"{row.case:<16}{row.provider:<22}{row.x:>18}{row.p50:>12.4g} {row.metric}")
    print(f"{'case':<64}{'provider':<30}{'p50':>10}  {'ratio':>7}{'of copy':>9}")
    for row in rows:
        if row.suite != "limits" and row.metric in ("us", "ms/step"):
            print(_line(row, rows))


def _line(row: Row, rows: list[Row]) -> str:
    share = share_of_copy(row, [r for r in rows if r.suite == row.suite])
    ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
    return (
        f"{f'{row.case} [{row.x}]'[:63]:<64}{row.provider[:29]:<30}{row.p50:>10.4g}  {ratio:>7}{share:>9} {row.metric}"
    )


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else schema.RESULTS
    sys.exit(until_closed(lambda: main(folder)))
