"""What a change did: new rows beside those of a commit, and which ratios became worse by more than their spread.

python -m bench steps --out /elsewhere && python -m bench compare /elsewhere
python -m bench compare --against HEAD~20        # the committed rows of two commits

Only ratios are compared, as a machine that others use gives no times worth comparing across days. The spread of a
ratio is taken from the percentiles of its own row, (p80 - p20) / p50, the larger one of the two days.

    old ratio 0.50, times 9 to 11 around 10 (spread 0.2);  new ratio 0.58: 1.16 times, within the spread
                                                           new ratio 0.65: 1.30 times, worse
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from bench import schema
from bench.schema import Row
from bench.tables import larger_is_better

COMMAND = "python -m bench compare"


@dataclasses.dataclass(frozen=True)
class Change:
    """One ratio on two days.

    Attributes:
      old, new: the rows.
    """

    old: Row
    new: Row

    @property
    def factor(self) -> float:
        """How many times worse the new ratio is; below 1 is better, whatever the metric."""
        assert self.old.ratio is not None and self.new.ratio is not None
        factor = self.new.ratio / self.old.ratio
        return 1 / factor if larger_is_better(self.new.metric) else factor

    @property
    def spread(self) -> float:
        """Relative spread of the noisier of the two rows."""
        return max((row.p80 - row.p20) / row.p50 for row in (self.old, self.new) if row.p50)

    @property
    def is_worse(self) -> bool:
        """Whether it is worse by more than the spread."""
        return self.factor > 1 + self.spread

    @property
    def is_better(self) -> bool:
        """Whether it is better by more than the spread."""
        return 1 / self.factor > 1 + self.spread


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints every ratio that changed by more than its spread; the exit status is 1 if one became worse."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=schema.RESULTS, help="folder of the new rows")
    parser.add_argument("--against", default="HEAD", metavar="COMMIT", help="the commit of the old rows")
    chosen = parser.parse_args(arguments)
    found = []
    for path in sorted(chosen.folder.glob("*.jsonl")):
        found += changes(committed(path.stem, chosen.against), schema.read(path))
    print(*report(found), sep="\n")
    return any(change.is_worse for change in found)


def committed(suite: str, commit: str) -> list[Row]:
    """A suite's rows as of a commit; none where it had none."""
    here = pathlib.Path(__file__).parent
    command = ["git", "show", f"{commit}:./results/{suite}.jsonl"]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return [Row(**json.loads(line)) for line in done.stdout.splitlines()] if done.returncode == 0 else []


def changes(old: Sequence[Row], new: Sequence[Row]) -> list[Change]:
    """The rows that both have, with a positive ratio to the same baseline."""
    before = {_identity(row): row for row in old if row.ratio}
    return [Change(before[_identity(row)], row) for row in new if row.ratio and _identity(row) in before]


def report(found: Sequence[Change]) -> Iterator[str]:
    """The worse ones, the worst first, then the better ones."""
    worse = sorted((c for c in found if c.is_worse), key=lambda c: -c.factor)
    better = sorted((c for c in found if c.is_better), key=lambda c: c.factor)
    for title, some in (("worse", worse), ("better", better)):
        for change in some:
            yield f"{title}: {_name(change.new)}: {change.old.ratio:.3g} -> {change.new.ratio:.3g}" + (
                f" of {change.new.baseline} (spread {100 * change.spread:.0f} %)"
            )
    yield f"{len(found)} ratios: {len(worse)} worse, {len(better)} better, the rest within their spread"


def _identity(row: Row) -> tuple[str, ...]:
    return (row.suite, row.case, row.x, row.provider, row.metric, row.baseline or "")


def _name(row: Row) -> str:
    return f"{row.suite}, {row.case} [{row.x}], {row.provider}, {row.metric}"


if __name__ == "__main__":
    sys.exit(main())
