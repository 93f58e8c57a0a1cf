"""When and whether the native handlers are registered; each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from curvax import ffi


def run(code: str) -> str:
    """Standard output of a fresh Python; fails the test with its traceback."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


CALL = """
import jax, jax.numpy as jnp
from curvax.kernels import report
from curvax.kernels.tree_cg import dots
v = jnp.arange(4, dtype=jnp.float32)
assert float(jax.jit(lambda v: dots([(v, v)])[0])(v)) == 14
(record,) = report()
"""


def test_import_registers_nothing() -> None:
    run(
        "import sys, curvax, curvax.ffi, curvax.kernels.tree_cg\n"
        "assert 'curvax._native_cpu' not in sys.modules\n"
        "import jax\n"
        "assert jax.numpy.ones(2).sum() == 2\n"
        "assert 'curvax._native_cpu' not in sys.modules\n"
    )


def test_first_use_registers() -> None:
    if not ffi.native_status().available:
        pytest.skip(ffi.native_status().reason)
    run(
        CALL + "import sys\nassert 'curvax._native_cpu' in sys.modules\nassert record.choice.implementation == 'native'"
    )


ABSENT = """
import importlib.util
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if "_native" in name else find_spec(name, package)
"""


def test_an_absent_module_falls_back_and_says_so() -> None:
    run(
        ABSENT
        + CALL
        + "assert record.choice.implementation == 'reference', record\n"
        + "assert 'curvax._native_cpu is not installed (a pure Python install)' in record.choice.reason, record\n"
        + "from curvax import ffi\n"
        + "assert not ffi.native_status().available\n"
        + "assert ffi.native_status().build == {}\n"
        + "from curvax.kernels import Unsupported\n"
        + "try:\n    dots([(v, v)], implementation='native')\n"
        + "except Unsupported as error:\n    assert 'not installed' in str(error)\n"
        + "else:\n    raise AssertionError\n"
    )


BROKEN = """
import importlib.machinery, importlib.util, sys
class Loader:
    def create_module(self, spec): return None
    def exec_module(self, module): raise ImportError("undefined symbol: oops")
class Finder:
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(name, Loader()) if name == "curvax._native_cpu" else None
sys.meta_path.insert(0, Finder())
"""


def test_a_broken_module_is_an_error_and_not_absent() -> None:
    run(
        BROKEN
        + "from curvax.kernels.tree_cg import dots\nimport jax.numpy as jnp\nv = jnp.ones(3)\n"
        + "try:\n    dots([(v, v)])\n"
        + "except ImportError as error:\n"
        + "    assert 'installed but cannot be imported (undefined symbol: oops): reinstall' in str(error), error\n"
        + "else:\n    raise AssertionError('a broken module passed as absent')\n"
    )


def test_a_module_for_a_newer_jaxlib_is_refused_and_jax_lives() -> None:
    if not ffi.native_status().available:
        pytest.skip(ffi.native_status().reason)
    run(
        "from curvax import ffi\n"
        + "ffi._running_ffi_api = lambda: (0, 0)\n"
        + CALL
        + "assert record.choice.implementation == 'reference', record\n"
        + "assert 'upgrade jaxlib or rebuild curvax' in record.choice.reason, record\n"
        + "try:\n    ffi.require_native()\n"
        + "except RuntimeError as error:\n    assert 'built on XLA FFI' in str(error)\n"
        + "else:\n    raise AssertionError\n"
    )


def build(major: int, minor: int, version: str = "0.10.2") -> dict[str, object]:
    return {"ffi_api": (major, minor), "jaxlib": version}


@pytest.mark.parametrize(
    ("built", "running", "taken"),
    [((0, 3), (0, 3), True), ((0, 3), (0, 5), True), ((0, 5), (0, 3), False), ((0, 9), (1, 0), False)],
)
def test_version_rule(
    monkeypatch: pytest.MonkeyPatch, built: tuple[int, int], running: tuple[int, int], taken: bool
) -> None:
    monkeypatch.setattr(ffi, "_running_ffi_api", lambda: running)
    refusal = ffi._version_refusal(build(*built))
    assert (refusal is None) == taken
    if refusal is not None:
        assert f"{built[0]}.{built[1]}" in refusal
        assert f"{running[0]}.{running[1]}" in refusal


def test_without_headers_the_release_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffi, "_running_ffi_api", lambda: None)
    monkeypatch.setattr(ffi, "version", lambda package: "0.10.2.dev7")
    assert ffi._version_refusal(build(0, 3, "0.10.2")) is None
    assert "newer than the running" in (ffi._version_refusal(build(0, 3, "0.11.0")) or "")


def test_this_jaxlib_says_its_ffi_version() -> None:
    version = ffi._running_ffi_api()
    assert version is not None
    assert version >= (0, 3)


def test_build_facts() -> None:
    status = ffi.native_status()
    if not status.available:
        pytest.skip(status.reason)
    assert set(status.build) == {"ffi_api", "jaxlib", "operands", "compiler", "simd_levels", "simd"}
    assert status.build["simd"] in status.build["simd_levels"]
    assert status.build["jaxlib"] in status.reason


def test_a_module_from_older_sources_is_refused() -> None:
    assert ffi._stale({"operands": 2}, 2) is None
    assert "rebuild" in (ffi._stale({}, 2) or "") and "rebuild" in (ffi._stale({"operands": 3}, 2) or "")


class Driver:
    """Stands for the CUDA module on a machine with this driver."""

    def __init__(self, version: tuple[int, int] | None):
        self.driver_version = lambda: version


@pytest.mark.parametrize(
    ("runtime", "driver", "taken"),
    [
        ((13, 0), (13, 2), True),
        ((13, 2), (13, 0), True),
        ((12, 8), (13, 0), True),
        ((13, 0), (12, 9), False),
        ((13, 0), None, True),
    ],
)
def test_driver_rule(runtime: tuple[int, int], driver: tuple[int, int] | None, taken: bool) -> None:
    refusal = ffi._driver_refusal({"runtime": runtime}, Driver(driver))  # pyright: ignore[reportArgumentType]
    assert (refusal is None) == taken
    if refusal is not None:
        assert "built with CUDA 13.0, and the driver serves 12.9: update the driver or build curvax" in refusal


def cuda() -> ffi.Status:
    """The status of the CUDA module; skips where it was not built."""
    status = ffi.native_status("cuda")
    if not status.available:
        pytest.skip(status.reason)
    return status


def test_cuda_build_facts() -> None:
    status = cuda()
    assert set(status.build) == {"ffi_api", "jaxlib", "operands", "compiler", "runtime", "architectures", "block"}
    assert status.build["jaxlib"] in status.reason and status.build["architectures"] in status.reason
    assert status.build["block"] == 4096


def test_cuda_handlers_may_be_recorded_into_graphs() -> None:
    """Each handler says of itself that XLA may record it into a command buffer."""
    cuda()
    from curvax import _native_cuda  # pyright: ignore[reportAttributeAccessIssue]

    handlers = _native_cuda.handlers()
    assert handlers and all(_native_cuda.graph_safe(handler) for handler in handlers.values())


def test_cuda_handlers_leave_the_cpu_alone() -> None:
    """Registering for CUDA in a process without a GPU changes nothing for the CPU."""
    cuda()
    run(
        "from curvax import ffi\n"
        "assert ffi.native_status('cuda').available\n"
        + CALL
        + "assert record.choice.implementation == ('native' if ffi.native_status().available else 'reference')\n"
    )


def test_an_absent_cuda_module_says_how_to_get_it() -> None:
    run(
        ABSENT
        + "from curvax import ffi\n"
        + "status = ffi.native_status('cuda')\n"
        + "assert not status.available and status.build == {}\n"
        + "assert 'pip install . -C cmake.define.CURVAX_CUDA=ON' in status.reason, status\n"
    )
