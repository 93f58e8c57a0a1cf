"""What steps launch and how much memory they take on an H200, from programs compiled for one that is not there.

Counts and not times: an operation that XLA turns into one kernel or copy on the device counts as one launch. Needs
JAX's CUDA plugin (`make test-gpu-compile` sets one up in .venv-gpu); kernels in C++ need curvax built with
CURVAX_CUDA=ON, and those in Triton jax-triton.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator

import jax

from bench.schema import Row
from bench.suites import gpu_inner
from curvax.kernels import Backend

# The steps and the compiler are the tests' own.
from tests.lowering import h200, steps

SUITE = "gpu_compile"
PRODUCTS = "the products alone"
REFERENCE = "curvax, backend=reference"
_BACKENDS: tuple[Backend, ...] = ("reference", "native", "pallas", "triton")


@dataclasses.dataclass(frozen=True)
class _Program:
    provider: str
    compiled: jax.stages.Compiled


def run_suite(quick: bool = False, only: str = "") -> Iterator[list[Row]]:
    """Rows, case by case; a backend whose kernels do not occur has no rows.

    Args:
      quick: the first case only.
      only: substring of the case names to run.
    """
    reason = h200.missing()
    if reason is not None:
        raise SystemExit(f"gpu_compile: {reason}")
    for preset, network in steps.CASES[:1] if quick else steps.CASES:
        case = f"{preset}, {network.name}"
        if only in case:
            results = [*_products(preset, network), *_steps(preset, network)]
            yield _rows(case, f"batch {network.batch}", results, REFERENCE)
    if only in gpu_inner.CASE and not quick:
        results = [_Program(name, h200.compile_for_h200(f, *args)) for name, f, args in gpu_inner.programs()]
        yield _rows(gpu_inner.CASE, gpu_inner.X, results, gpu_inner.PLAIN)


def _products(preset: str, network: steps.Network) -> Iterator[_Program]:
    if preset == "sgn_ce":
        function, args = steps.products(network)
        yield _Program(PRODUCTS, h200.compile_for_h200(function, *args))


def _steps(preset: str, network: steps.Network) -> Iterator[_Program]:
    for backend in _BACKENDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a fallback; a backend that falls back everywhere has no rows
            function, args = steps.step(preset, network, backend)
            compiled = h200.compile_for_h200(function, *args)
        if backend == "reference" or _own_kernels(compiled):
            yield _Program(f"curvax, backend={backend}", compiled)


def _own_kernels(compiled: jax.stages.Compiled) -> bool:
    return any(target.startswith(steps.OWN_KERNELS) for target in h200.custom_calls(compiled))


def _rows(case: str, x: str, results: list[_Program], baseline: str) -> list[Row]:
    rows: list[Row] = []
    for each in results:
        outside, loop = h200.kernel_counts(each.compiled)["ENTRY"], h200.busiest_loop(each.compiled)
        own = sum(n for target, n in h200.custom_calls(each.compiled).items() if target.startswith(steps.OWN_KERNELS))
        values: dict[str, float] = {"launches outside loops": outside.total(), "own kernels": own}
        if loop:
            values["launches per iteration"] = loop.total()
        values["MiB temp"] = h200.temp_bytes(each.compiled) / 2**20
        for metric, value in values.items():
            rows.append(_row(case, x, each.provider, metric, value, rows, baseline))
    return rows


def _row(case: str, x: str, provider: str, metric: str, value: float, before: list[Row], baseline: str) -> Row:
    """A row, with its ratio to the baseline's."""
    base = next((r for r in before if r.metric == metric and r.provider == baseline), None)
    ratio = value / base.p50 if base is not None and base.p50 else None
    to = None if ratio is None else baseline
    return Row(SUITE, case, provider, metric, x, value, value, value, ratio, to, device=h200.PLATFORM)
