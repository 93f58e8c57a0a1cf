"""`hutchinson_reduce`: the mean over probes of z * C z, without and with AdaHessian's means over rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench import run
from bench.suites.kernels.case import REFERENCE, Case, implementations, over_and_over, repeats
from curvax.kernels.diagonal_update.workloads import WORKLOADS
from curvax.kernels.hutchinson_reduce import OPS, hutchinson_reduce
from curvax.kernels.tree_cg.workloads import Workload

_FLOAT = 4


def cases(quick: bool) -> Iterator[Case]:
    """One probe and eight, entry by entry and by rows."""
    for work in WORKLOADS[:1] if quick else WORKLOADS[:2]:
        size = sum(int(np.prod(shape)) for shape in work.shapes)
        for probes in (1, 8):
            count = repeats(max(2, min(200, 20_000_000 // (probes * size))), len(work.shapes))
            for rows in (False, True):
                yield Case(
                    f"hutchinson_reduce, {probes} probes{', row means' if rows else ''}, {work.name}",
                    f"{size} floats",
                    lambda work=work, probes=probes, rows=rows, count=count: _candidates(work, probes, rows, count),
                    count,
                    (2 * probes + (not rows)) * size * _FLOAT,
                )


def _candidates(work: Workload, probes: int, rows: bool, count: int) -> list[run.Candidate]:
    rng = np.random.default_rng(0)
    z, c = ([jnp.asarray(rng.normal(size=(probes, *shape)), jnp.float32) for shape in work.shapes] for _ in range(2))
    axes = tuple((len(shape) - 1,) if rows and len(shape) > 1 else () for shape in work.shapes)
    results = []
    for name in implementations(OPS, z, c):

        def body(last: Any, fixed: Any, name: Any = name) -> Any:
            z, c = fixed
            # Hangs on the last result: without that one evaluation would serve all rounds.
            one = 1 + 0 * last[0].ravel()[0]
            return hutchinson_reduce([one * leaf for leaf in z], c, axes, implementation=name)

        step = over_and_over(body, count)
        first = hutchinson_reduce(z, c, axes, implementation=name)
        baseline, goal = (None, None) if name == REFERENCE else (REFERENCE, 1.0)
        results.append(
            run.Candidate(
                name,
                lambda carry, step=step: step(carry, (z, c)),
                lambda first=first: jax.tree.map(jnp.copy, first),
                baseline=baseline,
                goal=goal,
            )
        )
    return results
