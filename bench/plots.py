"""Pictures of the structure and layerwise suites, from their rows.

python -m bench.plots [FOLDER]
"""

from __future__ import annotations

import math
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench import schema
from bench.libraries import CURVAX, SOMAX
from bench.markdown import milliseconds
from bench.schema import Row
from bench.suites.lanes import DIAGONAL, PARAM_CG, ROW_CG, ROW_CHOLESKY
from bench.suites.layerwise.setting import MAIN
from bench.suites.layerwise.study import RATE
from bench.suites.structure.exact import GENERIC
from bench.tables import value

_STEPS = {SOMAX: "C3", GENERIC: "C1", CURVAX: "C0"}
_LANES = {PARAM_CG: "C2", ROW_CG: "C4", ROW_CHOLESKY: "C0", DIAGONAL: "C7"}
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("egn_ce, mlp 784-256-256-10", "exact step, cross entropy, 10 classes", _STEPS),
    ("egn_mse, mlp 784-256-256-1", "exact step, squared error, 1 output", _STEPS),
    ("egn_mse, pinn 5x64, float64", "exact step, PINN 5x64, float64", _STEPS),
    ("lanes, cross entropy, mlp 784-256-256-10", "lanes, cross entropy, 10 classes", _LANES),
)


def main(folder: pathlib.Path) -> list[pathlib.Path]:
    """Draws `structure.png` and `layerwise.png` beside the rows that are in the folder and returns their paths."""
    return [draw(folder) for name, draw in _PICTURES.items() if (folder / f"{name}.jsonl").exists()]


def structure(folder: pathlib.Path) -> pathlib.Path:
    """Time of a step against the batch, in four panels."""
    rows = schema.read(folder / "structure.jsonl")
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(4 * len(_PANELS), 3.6), layout="constrained")
    for axis, (case, title, colors) in zip(axes, _PANELS, strict=True):
        _panel(axis, [r for r in rows if r.case == case], title, colors)
    return _saved(figure, rows[0], folder / "structure.png")


def layerwise(folder: pathlib.Path) -> pathlib.Path:
    """Steps and seconds to the target loss against tokens per step: median seed, and the range of all."""
    rows = schema.read(folder / "layerwise.jsonl")
    runs = [r for r in rows if r.metric == "steps" and MAIN.size in r.case and "ablations" not in r.case]
    runs.sort(key=_tokens)
    names = dict.fromkeys(r.provider.rpartition(RATE)[0] for r in runs)
    figure, axes = plt.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for number, name in enumerate(names):
        own = [r for r in runs if r.provider.rpartition(RATE)[0] == name]
        steps = np.asarray([(r.p50, r.p20, r.p80) for r in own])
        seconds = steps * np.asarray([[(milliseconds(rows, r) or math.nan) / 1e3] for r in own])
        style = {"color": f"C{number % 10}", "marker": "os^v"[number // 10], "markersize": 4, "capsize": 2}
        for axis, values in zip(axes, (steps, seconds), strict=True):
            middle, low, high = np.where(np.isfinite(values), values, values[:, :1]).T
            axis.errorbar([_tokens(r) for r in own], middle, (middle - low, high - middle), label=name, **style)
    for axis, label in zip(axes, ("steps to the target", "seconds to the target"), strict=True):
        axis.set(xlabel="tokens per step", ylabel=label, xscale="log", yscale="log")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize="x-small")
    return _saved(figure, runs[0], folder / "layerwise.png")


def _tokens(row: Row) -> int:
    return int(row.x.split()[0])


def _saved(figure: Any, row: Row, path: pathlib.Path) -> pathlib.Path:
    figure.suptitle(f"{row.device}, commit {row.commit}, {row.date}", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Any, rows: Sequence[Row], title: str, colors: dict[str, str]) -> None:
    batches = sorted({int(r.x.removeprefix("batch ")) for r in rows if r.x.startswith("batch ")})
    for provider, color in colors.items():
        results = {b: value([r for r in rows if r.x == f"batch {b}"], provider, "ms/step") for b in batches}
        points = {b: t for b, t in results.items() if t is not None}
        if points:
            axis.plot(list(points), list(points.values()), "o-", color=color, label=provider, markersize=4)
    axis.set(title=title, xlabel="batch", ylabel="ms/step", xscale="log", yscale="log")
    axis.set_xticks(batches, [str(b) for b in batches], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="x-small")


_PICTURES = {"structure": structure, "layerwise": layerwise}

if __name__ == "__main__":
    print(*main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else schema.RESULTS))
