"""`python -m bench SUITE`, with one of the names in `SUITES`, or `all`, `compare`, `report`."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys
from typing import Any

# One platform for all candidates; the environment's word counts if it has spoken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's threads against XLA's would make every factorization of the peers a lottery. curvax does not look at it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bench import compare, everything, schema
from curvax.pipes import until_closed

SUITES = (
    *("steps", "plan", "structure", "lanes", "kernels", "limits", "layerwise", "linalg", "untuned", "robustness"),
    *("compile", "physics", "vmc", "scale", "estimators", "growth", "operators", "kronecker"),
    *("gpu_compile", "gpu_steps"),
)


def main(arguments: list[str] | None = None) -> int | None:
    """Runs one suite, prints its table while it goes, and writes its rows; or does something with all rows."""
    words = sys.argv[1:] if arguments is None else arguments
    match words[:1]:
        case ["all"]:
            return everything.main(SUITES, words[1:])
        case ["compare"]:
            return compare.main(words[1:])
        case ["report"]:
            return importlib.import_module("bench.report").main(words[1:])
        case _:
            return _run(words)


def _run(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases, few rounds")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text, and write nothing")
    parser.add_argument("--update", action="store_true", help="with --only: replace these cases in the results")
    parser.add_argument("--out", type=pathlib.Path, default=schema.RESULTS, help="folder of the results")
    module = _suite(arguments)
    options = getattr(module, "Options", None)
    if options is not None:
        options.add_to(parser)
    chosen = parser.parse_args(arguments)
    own = () if options is None else (options.of(chosen),)
    # Some of the contenders: those of the results that did not run stay.
    some = any(each.some for each in own)
    print(f"{schema.device()}; {schema.versions()}; commit {schema.commit()}")
    rows: list[schema.Row] = []
    for records in module.run_suite(chosen.quick, chosen.only, *own):
        print(schema.table(records), flush=True)
        rows += records
        # After each case, so that a run that is cut off leaves what it has measured.
        if chosen.update:
            schema.update(rows, chosen.suite, chosen.out, one_by_one=some)
        elif not (chosen.only or some):
            schema.write(rows, chosen.suite, chosen.out)
    if chosen.update or not (chosen.only or some):
        print(f"\n{len(rows)} rows in {chosen.out / chosen.suite}.jsonl; `python -m bench.markdown` makes their table")


def _suite(arguments: list[str]) -> Any:
    """The module of the suite that is asked for; no other is imported, as some need packages that others do not."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("suite", nargs="?")
    name = first.parse_known_args(arguments)[0].suite
    return importlib.import_module(f"bench.suites.{name}") if name in SUITES else None


if __name__ == "__main__":
    sys.exit(until_closed(main))
