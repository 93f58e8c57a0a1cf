"""`python -m bench steps|plan|structure|lanes|kernels|limits|layerwise|linalg|gpu_compile|gpu_steps`."""

from __future__ import annotations

import argparse
import importlib
import os
import pathlib
import sys

# One platform for all candidates; the environment's word counts if it has spoken.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# LAPACK's threads against XLA's would make every factorisation of the peers a lottery. curvax does not look at it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from bench import schema
from curvax.pipes import until_closed

SUITES = ("steps", "plan", "structure", "lanes", "kernels", "limits", "layerwise", "linalg", "gpu_compile", "gpu_steps")


def main(arguments: list[str] | None = None) -> None:
    """Runs one suite, prints its table while it goes, and writes its rows."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--quick", action="store_true", help="a smoke run: small cases, few rounds")
    parser.add_argument("--only", default="", help="run the cases whose name holds this text, and write nothing")
    parser.add_argument("--update", action="store_true", help="with --only: replace these cases in the results")
    parser.add_argument("--out", type=pathlib.Path, default=schema.RESULTS, help="folder of the results")
    chosen = parser.parse_args(arguments)
    print(f"{schema.device()}; {schema.versions()}; commit {schema.commit()}")
    rows: list[schema.Row] = []
    # A suite is imported when it is asked for: some need packages that others do not.
    for found in importlib.import_module(f"bench.suites.{chosen.suite}").run_suite(chosen.quick, chosen.only):
        print(schema.table(found), flush=True)
        rows += found
        if not chosen.only:
            # After each case, so that a run that is cut off leaves what it has measured.
            schema.write(rows, chosen.suite, chosen.out)
        elif chosen.update:
            schema.update(rows, chosen.suite, chosen.out)
    if chosen.update or not chosen.only:
        print(f"\n{len(rows)} rows in {chosen.out / chosen.suite}.jsonl")


if __name__ == "__main__":
    sys.exit(until_closed(main))
