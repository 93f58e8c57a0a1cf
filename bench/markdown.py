"""Tables of the rows of every suite, written beside the rows.

python -m bench.markdown [FOLDER]

For each `<suite>.jsonl` of the folder and those below it this writes `<suite>.md`; the folder is `bench/results` unless
another is named. `tests/bench/test_tables.py` compares the committed files with what this makes.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence

from bench import schema, tables
from bench.libraries import CURVAX, SOMAX
from bench.schema import Row
from bench.suites import compile as compilation
from bench.suites import growth, scale
from bench.suites.lanes import DIAGONAL, PARAM_CG, PICKED, ROW_CG, ROW_CHOLESKY
from bench.suites.layerwise.study import RATE
from bench.suites.linalg.factorizations import ALONE, FREE
from bench.suites.linalg.steps import UNSET
from bench.suites.physics import table as physics
from bench.suites.robustness import table as robustness
from bench.suites.structure.exact import GENERIC
from bench.suites.structure.measure import TOO_LARGE, TOO_LONG
from bench.suites.structure.quantities import GRADIENT
from bench.suites.untuned import table as untuned
from bench.tables import Key, groups, value
from curvax.pipes import until_closed

COMMAND = "python -m bench.markdown"


def main(arguments: list[str] | None = None) -> None:
    """Writes a table beside every file of rows."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("folder", nargs="?", type=pathlib.Path, default=schema.RESULTS)
    for path in files(parser.parse_args(arguments).folder):
        target = path.with_suffix(".md")
        target.write_text(document(path))
        print(target)


def files(folder: pathlib.Path = schema.RESULTS) -> list[pathlib.Path]:
    """All files of rows below a folder."""
    return sorted(folder.rglob("*.jsonl"))


def document(path: pathlib.Path) -> str:
    """The page of a file of rows: where they come from, then their tables."""
    rows = schema.read(path)
    lines = [
        f"# {path.stem}",
        "",
        f"`{COMMAND}` makes this page from `{path.name}`. `bench/README.md` says what it means.",
        "",
        *origins(rows),
        "",
        *TABLES.get(path.stem, tables.plain)(rows),
    ]
    return "\n".join(lines).rstrip() + "\n"


def origins(rows: Sequence[Row]) -> Iterator[str]:
    """Where and of which commits the rows are, one line per day, device and set of versions."""
    commits: dict[tuple[str, str, str], dict[str, None]] = {}
    for r in rows:
        commits.setdefault((r.date, r.device, r.versions), {})[r.commit] = None
    for (date, device, versions), names in commits.items():
        yield f"- {date}, commit {', '.join(names)}; {device}; {versions}."


def structure(rows: Sequence[Row]) -> Iterator[str]:
    """Steps beside python-somax and the generic route, lanes, quantities over a gradient, exponents, goals."""
    grouped = groups([r for r in rows if not r.metric.startswith("exponent")])
    yield from _steps({k: v for k, v in grouped.items() if any(r.provider == GENERIC for r in v)})
    yield from _lanes({k: v for k, v in grouped.items() if k[0].startswith("lanes, ")})
    yield from _quantities({k: v for k, v in grouped.items() if any(r.provider == GRADIENT for r in v)})
    yield from _exponents([r for r in rows if r.metric.startswith("exponent")])
    yield from _goals(rows)


def lanes(rows: Sequence[Row]) -> Iterator[str]:
    """Every lane's time and prediction, and the planner's pick."""
    yield "| model | x | param CG | row CG | row Cholesky | picked | over the best |"
    yield "|---|---|---|---|---|---|---|"
    for (case, x), group in groups(rows).items():
        pick = next((r for r in group if r.metric == PICKED), None)
        if pick is not None:
            times = [_with_prediction(group, p) for p in (PARAM_CG, ROW_CG, ROW_CHOLESKY)]
            yield f"| {case} | {x} | {' | '.join(times)} | {pick.provider} | {pick.p50:.2f} |"
    yield ""
    yield from (f"{r.case}: {r.p50:.3f} ({r.x})" for r in rows if r.metric == "share")


def layerwise(rows: Sequence[Row]) -> Iterator[str]:
    """Costs of inner loops, then runs to the target: median seed, and the range of all where they differ."""
    for (case, x), group in groups(rows).items():
        if "inner loop" in case or "head" in case:
            yield from (f"\n{case} ({x})\n", *_costs(group))
        elif "to test loss" in case:
            yield from (f"\n{case} ({x})\n", *_runs(group, rows))


def linalg(rows: Sequence[Row]) -> Iterator[str]:
    """Factorizations beside LAPACK, then steps beside the best that its threads allow."""
    grouped = groups(rows)
    heads = ("operation", "matrices", f"{ALONE}, ms", f"{FREE}, ms", "curvax, ms", "over one thread", "of a product")
    yield f"| {' | '.join(heads)} |"
    yield "|---|---|---|---|---|---|---|"
    for (case, x), group in grouped.items():
        ours = next((r for r in group if (r.provider, r.metric) == (CURVAX, "GFLOP/s")), None)
        if ours is not None:
            times = [_number(value(group, p, "ms")) for p in (ALONE, FREE, CURVAX)]
            over = next(r for r in group if (r.provider, r.metric) == (CURVAX, "ms"))
            yield f"| {case} | {x} | {' | '.join(times)} | {_ratio(over)} | {100 * (ours.ratio or 0):.0f} % |"
    yield ""
    yield f"| step | machine | {UNSET}, ms | with the best setting, ms | ratio |"
    yield "|---|---|---|---|---|"
    for (case, x), group in grouped.items():
        own = next((r for r in group if r.provider == UNSET), None)
        if own is not None and own.baseline is not None:
            best = value(group, own.baseline, own.metric)
            yield f"| {case} | {x} | {own.p50:.4g} | {_number(best)} ({own.baseline}) | {_ratio(own)} |"


def _runs(group: Sequence[Row], rows: Sequence[Row]) -> Iterator[str]:
    yield "| method | steps | of SOAP's | tokens | ms/step | s to the target | test loss |"
    yield "|---|---|---|---|---|---|---|"
    for provider in dict.fromkeys(r.provider for r in group):
        own = {r.metric: r for r in group if r.provider == provider}
        steps, each = own.get("steps"), milliseconds(rows, own["test loss"])
        cells = [
            "not reached" if steps is None else _spread(steps),
            "" if steps is None else _ratio(steps),
            "" if steps is None else f"{own['tokens'].p50 / 1e6:.2f}M",
            "" if each is None else f"{each:.0f}",
            "" if steps is None or each is None else f"{steps.p50 * each / 1e3:.1f}",
            f"{own['test loss'].p50:.3f}",
        ]
        yield f"| {provider} | {' | '.join(cells)} |"


def milliseconds(rows: Sequence[Row], row: Row) -> float | None:
    """What a step of the method of a row of the layerwise suite costs, from the rows of the same batch."""
    method = row.provider.rpartition(RATE)[0]
    return value([r for r in rows if r.x == row.x and "cost of a step" in r.case], method, "ms/step")


def _costs(rows: Sequence[Row]) -> Iterator[str]:
    yield "| method | p50 | ratio | to |"
    yield "|---|---|---|---|"
    for r in rows:
        yield f"| {r.provider} | {r.p50:.1f} {r.metric} | {_ratio(r)} | {r.baseline or ''} |"


def _ratio(row: Row) -> str:
    goal = {None: "", True: f" (goal {row.goal or 0:.3g} met)", False: f" (goal {row.goal or 0:.3g} missed)"}
    return "" if row.ratio is None else f"{row.ratio:.2f}{goal[row.meets_goal]}"


def _spread(row: Row) -> str:
    low, high = (f"{v:.0f}" for v in (row.p20, row.p80))
    return f"{row.p50:.0f}" if low == high else f"{row.p50:.0f} ({low} to {high})"


def _steps(grouped: dict[Key, list[Row]]) -> Iterator[str]:
    yield "| step | x | python-somax, ms | every leaf by reverse mode, ms | curvax, ms | somax / curvax | MiB temp |"
    yield "|---|---|---|---|---|---|---|"
    for (case, x), rows in grouped.items():
        cells = [_time(rows, provider) for provider in (SOMAX, GENERIC, CURVAX)]
        theirs, ours = value(rows, SOMAX, "ms/step"), value(rows, CURVAX, "ms/step")
        times = f"{theirs / ours:.0f}" if theirs and ours else ""
        memory = [value(rows, provider, "MiB temp") for provider in (SOMAX, GENERIC, CURVAX)]
        yield f"| {case} | {x} | {' | '.join(cells)} | {times} | {' / '.join(map(_number, memory))} |"
    yield ""


def _time(rows: Sequence[Row], provider: str) -> str:
    for metric, unit in ((TOO_LONG, "s, left out"), (TOO_LARGE, "GiB, left out")):
        if (left := value(rows, provider, metric)) is not None:
            return f"{left:.3g} {unit}"
    return _number(value(rows, provider, "ms/step"))


def _number(measured: float | None) -> str:
    return "-" if measured is None else f"{measured:.4g}"


def _lanes(grouped: dict[Key, list[Row]]) -> Iterator[str]:
    providers = (PARAM_CG, ROW_CG, ROW_CHOLESKY, DIAGONAL)
    yield f"| loss and model, ms/step | x | {' | '.join(providers)} |"
    yield "|---|---|" + "---|" * len(providers)
    for (case, x), rows in grouped.items():
        yield f"| {case.removeprefix('lanes, ')} | {x} | {' | '.join(_time(rows, p) for p in providers)} |"
    yield ""


def _quantities(grouped: dict[Key, list[Row]]) -> Iterator[str]:
    yield "| quantity | provider | ms | over the gradient | goal |"
    yield "|---|---|---|---|---|"
    for (case, x), rows in grouped.items():
        for row in rows:
            if row.metric == "ms" and row.provider != GRADIENT:
                goal = "" if row.goal is None else f"{row.goal:g}"
                yield f"| {case}, {x} | {row.provider} | {row.p50:.4g} | {row.ratio:.2f} | {goal} |"
    yield ""


def _exponents(rows: Sequence[Row]) -> Iterator[str]:
    yield "| growth of time | over | exponent: " + ", ".join((SOMAX, "reverse mode", CURVAX)) + " |"
    yield "|---|---|---|"
    for (case, x), group in groups([r for r in rows if r.metric.endswith("ms/step")]).items():
        name = re.sub(r"^exponent of ms/step over \w+, ", "", case)
        slopes = [_number(value(group, p, "exponent, ms/step")) for p in (SOMAX, GENERIC, CURVAX)]
        yield f"| {name} | {x} | {', '.join(slopes)} |"
    yield ""


def _goals(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.meets_goal is not None:
            verdict = f"goal {row.goal:g}: {'met' if row.meets_goal else 'missed'}"
            yield f"- {row.case} [{row.x}], {row.provider} over {row.baseline}: {row.ratio:.4g} ({verdict})"


def _with_prediction(rows: Sequence[Row], provider: str) -> str:
    measured, predicted = value(rows, provider, "ms/step"), value(rows, provider, "ms/step, predicted")
    return f"{_number(measured)} ({'-' if predicted is None else f'{predicted:.3g}'})"


TABLES: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "structure": structure,
    "lanes": lanes,
    "layerwise": layerwise,
    "linalg": linalg,
    "untuned": untuned.table,
    "robustness": robustness.table,
    "physics": physics.table,
    "kernels": tables.kernels,
    "kernels_spelt_out": tables.kernels,
    "gpu_compile": tables.programs,
    "compile": compilation.table,
    "scale": scale.table,
    "growth": growth.table,
}

if __name__ == "__main__":
    sys.exit(until_closed(main))
