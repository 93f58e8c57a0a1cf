"""Settings and fixtures of the whole suite."""

from __future__ import annotations

import os

from tests import fast_compilation

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Whoever has calibrated this machine sees the plans that the tests expect all the same.
os.environ["CURVAX_CALIBRATION"] = os.path.join(os.path.dirname(__file__), "no_calibration")
fast_compilation.set_up()

import contextlib
import ctypes
import gc
import pathlib
import resource
import sys
from collections.abc import Iterator

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def x64() -> Iterator[None]:
    """64-bit types for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def quick_programs() -> Iterator[None]:
    """What a page of the documentation or another library jits by itself compiles as by `quick_jit`, in one test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """Drops compiled programs between tests once a worker holds a gigabyte: JAX keeps every one of them for ever."""
    yield
    if _resident_bytes() > 1e9:
        jax.clear_caches()
        gc.collect()
        # Without this the allocator keeps what was freed.
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)


def pytest_collection_finish() -> None:
    """Collects garbage seldom: tracing makes many objects, and a pass over all that live takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


def _resident_bytes() -> int:
    """Memory of this process, or 0 where the system does not say."""
    statm = pathlib.Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else 0


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--strict-backend`: tests run under `curvax.strict_backend()`, as where kernels are to be proved.

    `--fast`: the tests marked `fast` alone, some of every layer. A file without the mark is not even imported.
    """
    parser.addoption("--strict-backend", action="store_true", help="a fallback to a reference is an error")
    parser.addoption("--fast", action="store_true", help="the tests marked fast: what a change breaks first")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """Leaves out, under `--fast`, the files in which no test is marked."""
    if not config.getoption("--fast") or not collection_path.match("test_*.py"):
        return None
    return True if "pytest.mark.fast" not in collection_path.read_text() else None


@pytest.fixture(autouse=True)
def strict_backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """`curvax.strict_backend()` if it was asked for and the test is not about fallbacks itself."""
    wanted = request.config.getoption("--strict-backend") and not request.node.get_closest_marker("fallback")
    from curvax.kernels import strict_backend

    with strict_backend() if wanted else contextlib.nullcontext():
        yield


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps what is fast under `--fast`, and skips what needs a GPU where JAX sees none."""
    if config.getoption("--fast"):
        slow = [item for item in items if not item.get_closest_marker("fast")]
        items[:] = [item for item in items if item.get_closest_marker("fast")]
        config.hook.pytest_deselected(items=slow)
    if not any(item.get_closest_marker("gpu") for item in items) or jax.default_backend() == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="JAX sees no GPU"))
