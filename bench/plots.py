"""A picture of the structure suite, from its rows.

python -m bench.plots [FOLDER]
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import schema
from bench.libraries import CURVAX, SOMAX
from bench.markdown import value
from bench.schema import Row
from bench.suites.lanes import DIAGONAL, PARAM_CG, ROW_CG, ROW_CHOLESKY
from bench.suites.structure.exact import GENERIC

_STEPS = {SOMAX: "C3", GENERIC: "C1", CURVAX: "C0"}
_LANES = {PARAM_CG: "C2", ROW_CG: "C4", ROW_CHOLESKY: "C0", DIAGONAL: "C7"}
_PANELS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("egn_ce, mlp 784-256-256-10", "exact step, cross entropy, 10 classes", _STEPS),
    ("egn_mse, mlp 784-256-256-1", "exact step, squared error, 1 output", _STEPS),
    ("egn_mse, pinn 5x64, float64", "exact step, PINN 5x64, float64", _STEPS),
    ("lanes, cross entropy, mlp 784-256-256-10", "lanes, cross entropy, 10 classes", _LANES),
)


def main(folder: pathlib.Path) -> pathlib.Path:
    """Draws `structure.png` beside `structure.jsonl` in the folder and returns its path."""
    rows = schema.read(folder / "structure.jsonl")
    figure, axes = plt.subplots(1, len(_PANELS), figsize=(4 * len(_PANELS), 3.6), layout="constrained")
    for axis, (case, title, colours) in zip(axes, _PANELS, strict=True):
        _panel(axis, [r for r in rows if r.case == case], title, colours)
    figure.suptitle(f"{rows[0].device}, commit {rows[0].commit}, {rows[0].date}", fontsize="small")
    path = folder / "structure.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _panel(axis: Any, rows: Sequence[Row], title: str, colours: dict[str, str]) -> None:
    batches = sorted({int(r.x.removeprefix("batch ")) for r in rows if r.x.startswith("batch ")})
    for provider, colour in colours.items():
        found = {b: value([r for r in rows if r.x == f"batch {b}"], provider, "ms/step") for b in batches}
        points = {b: t for b, t in found.items() if t is not None}
        if points:
            axis.plot(list(points), list(points.values()), "o-", color=colour, label=provider, markersize=4)
    axis.set(title=title, xlabel="batch", ylabel="ms/step", xscale="log", yscale="log")
    axis.set_xticks(batches, [str(b) for b in batches], minor=False)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize="x-small")


if __name__ == "__main__":
    print(main(pathlib.Path(sys.argv[1]) if len(sys.argv) > 1 else schema.RESULTS))
