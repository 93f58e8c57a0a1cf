"""Exponents p of time ~ size^p, fitted to the measured steps over the batch and over the width."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Sequence

from bench import run
from bench.schema import Row

_MLP = re.compile(r"(?P<preset>\w+), mlp 784-(?P<width>\d+)-(?P=width)-(?P<outputs>\d+)")
_Points = dict[float, float]


def tables(suite: str, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """One row per case, provider and metric with at least three sizes."""
    over_batch: dict[tuple[str, str, str], _Points] = collections.defaultdict(dict)
    over_width: dict[tuple[str, str, str], _Points] = collections.defaultdict(dict)
    for row in rows:
        batch, results = float(row.x.removeprefix("batch ")), _MLP.fullmatch(row.case)
        if row.metric not in ("ms/step", "MiB temp"):
            continue
        over_batch[row.case, row.provider, row.metric][batch] = row.p50
        if results is not None and batch == 128:
            case = f"{results['preset']}, mlp 784-w-w-{results['outputs']}, batch 128"
            over_width[case, row.provider, row.metric][float(results["width"])] = row.p50
    for axis, groups in (("batch", over_batch), ("width", over_width)):
        fitted = [_row(suite, axis, *key, points) for key, points in groups.items() if len(points) > 2]
        if fitted:
            yield fitted


def _row(suite: str, axis: str, case: str, provider: str, metric: str, points: _Points) -> Row:
    sizes = sorted(points)
    slope = run.exponent(sizes, [points[s] for s in sizes])
    name, x = f"exponent of {metric} over {axis}, {case}", f"{axis} {sizes[0]:g} to {sizes[-1]:g}"
    return Row(suite, name, provider, f"exponent, {metric}", x, slope, slope, slope)
