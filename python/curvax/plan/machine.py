"""What predicted work takes on a machine, in seconds, from a few rates: to choose between solvers, and no more.

Rates of a kind of device are those that `curvax calibrate` has measured and stored for it, else those written here.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import jax

from curvax.work import Cost


@dataclasses.dataclass(frozen=True)
class Machine:
    """Rates of a machine.

    Work takes the sum of what its parts take; that overlaps nothing and errs by less than two where one part matters.

    Attributes:
      name: and where the rates come from.
      flops, convolution: matrix products and convolutions in float32, FLOP/s.
      narrowing: how many times as long they take in float64.
      bandwidth, cached: bytes per second from memory and from the cache.
      cache: bytes that stay in the cache.
      launch: seconds per operation.
      factorization: FLOP/s of a large Cholesky factorization in float32.
      half_rate: size of the matrix at which it reaches half of that.
    """

    name: str
    flops: float
    convolution: float
    narrowing: float
    bandwidth: float
    cached: float
    cache: float
    launch: float
    factorization: float
    half_rate: float

    def seconds(self, cost: Cost, itemsize: int = 4) -> float:
        """Predicted time of some work whose numbers take `itemsize` bytes.

        Bytes come from the cache as far as what is alive fits there.
        """
        narrow = self.narrowing if itemsize > 4 else 1.0
        near = min(1.0, self.cache / cost.memory) if cost.memory else 1.0
        traffic = cost.bytes * (near / self.cached + (1 - near) / self.bandwidth)
        # n^3 / 3 operations: panels of a small matrix leave the products in it too small for the rate.
        side = (3 * cost.factorization) ** (1 / 3)
        factorization = cost.factorization * narrow / self.factorization * (1 + self.half_rate / max(side, 1.0))
        products = (cost.flops - cost.factorization - cost.convolution) * narrow / self.flops
        convolutions = cost.convolution * narrow / self.convolution
        return products + convolutions + traffic + cost.launches * self.launch + factorization

    def __str__(self) -> str:
        return (
            f"{self.name}: matrix products {self.flops / 1e9:g} GFLOP/s, memory {self.bandwidth / 1e9:g} GB/s, "
            f"Cholesky {self.factorization / 1e9:g} GFLOP/s, {self.launch * 1e6:g} us a launch"
        )


CPU = Machine(
    name="CPU, measured on 2 cores",
    flops=2.5e11,
    convolution=1.2e11,
    narrowing=2.0,
    bandwidth=1.4e10,
    cached=4.5e10,
    cache=1.4e7,
    launch=5e-7,
    factorization=2.6e11,
    half_rate=300.0,
)
"""AMD EPYC, 2 cores, jax 0.10.2: single products of 8 to 256 rows ran at 140 to 440 GFLOP/s, transposed ones at 70 to
205, whole solves in C++ of 640, 1,152 and 2,560 float32 unknowns at 110, 189 and 211. The rest was fitted to the
quotients of whole steps (`python -m bench lanes`)."""

GPU = Machine(
    name="GPU, partly measured on an H200",
    flops=5.1e13,
    convolution=5.1e13,
    narrowing=2.0,
    bandwidth=4.1e12,
    cached=4.1e12,
    cache=5e7,
    launch=1.3e-6,
    factorization=1e13,
    half_rate=4000.0,
)
"""NVIDIA H200: float32 products at highest precision and copies as measured (`bench/results/h200`); a launch follows
from a step of `sgn_ce` with 20 iterations of 34 launches and 105 more in 1.04 ms. Convolutions, float64 and the
factorization are guesses."""


def memory() -> int | None:
    """Bytes that arrays of the default device may take up in all; `None` where that is not known."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # no such function on Windows, no such name elsewhere
        return None


def machine() -> Machine:
    """The machine that JAX's default backend runs on: as calibrated, else as written here; TPUs count as GPUs.

    Raises:
      ValueError: a stored calibration can't be read.
    """
    return _stored(calibration_file()) or uncalibrated()


def uncalibrated() -> Machine:
    """What is known of such a machine without `curvax calibrate`."""
    return CPU if jax.default_backend() == "cpu" else GPU


def calibration_file() -> Path:
    """Where the rates of the default device are stored.

    In the folder that the environment variable `CURVAX_CALIBRATION` names, else in `curvax` in the user's cache.
    """
    named = os.environ.get("CURVAX_CALIBRATION")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kind = re.sub(r"[^a-z0-9]+", "-", jax.local_devices()[0].device_kind.lower()).strip("-")
    return (Path(named) if named else cache / "curvax") / f"{jax.default_backend()}-{kind}.json"


def store(rates: Machine) -> Path:
    """Stores the rates of the default device for all later processes; answers where.

    Plans that this process has made stay as they are.
    """
    path = calibration_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: no other process reads half a file.
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(dataclasses.asdict(rates), indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    _stored.cache_clear()
    return path


@functools.cache
def _stored(path: Path) -> Machine | None:
    """A calibration, read once: a plan must not change under a running program."""
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        rates = Machine(**values)
        numbers = [value for name, value in values.items() if name != "name"]
        sound = all(isinstance(value, int | float) and 0 < value < float("inf") for value in numbers)
    except (OSError, TypeError, ValueError) as error:
        raise ValueError(_unreadable(path)) from error
    if not sound:
        raise ValueError(_unreadable(path))
    return rates


def _unreadable(path: Path) -> str:
    return f"{path} is no calibration of this version of curvax: delete it, or run `curvax calibrate` again."
