"""One self-contained page of all measurements, made from rows and from nothing else.

python -m bench report [FOLDER] [--out build/bench.html]

Every suite has a section: the question it answers (the first line of its module), a picture of its ratios, one of the
distance to the machine's limit where that was measured, and its table.
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Sequence

from bench import schema
from bench.report import page

COMMAND = "python -m bench report"


def main(arguments: Sequence[str] | None = None) -> None:
    """Writes the page and prints its path."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=schema.RESULTS, help="folder of the rows")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/bench.html"), help="file to write")
    chosen = parser.parse_args(arguments)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(page.document(chosen.folder))
    print(chosen.out)
