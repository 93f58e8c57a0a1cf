"""The machine code in curvax._native_cuda: for which GPUs, and whether any kernel lacks registers."""

from __future__ import annotations

import functools
import importlib.util
import pathlib
import re
import shutil
import subprocess

import pytest

from curvax import ffi


@functools.cache
def cuobjdump(option: str) -> str:
    """What CUDA's cuobjdump says of the module; skips without either."""
    status = ffi.native_status("cuda")
    if not status.available:
        pytest.skip(status.reason)
    tool = _tool()
    if tool is None:
        pytest.skip("no cuobjdump: neither CUDA's bin folder on PATH nor the triton package has one")
    spec = importlib.util.find_spec("curvax._native_cuda")
    assert spec is not None and spec.origin is not None
    return subprocess.run([tool, option, spec.origin], capture_output=True, text=True, check=True).stdout


def _tool() -> str | None:
    found = shutil.which("cuobjdump")
    triton = None if found else importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return found
    return next((str(path) for path in pathlib.Path(triton.origin).parent.rglob("bin/cuobjdump")), None)


def test_machine_code_for_every_architecture_that_was_asked_for() -> None:
    elf, ptx = cuobjdump("--list-elf"), cuobjdump("--list-ptx")
    for architecture in ffi.native_status("cuda").build["architectures"].split():
        number, _, kind = architecture.partition("-")
        assert (kind == "virtual") or f"sm_{number}.cubin" in elf, architecture
        assert (kind == "real") or f"sm_{number}.ptx" in ptx, architecture


def test_no_kernel_spills_registers() -> None:
    """But one: batched_cg on 256 unknowns in float32, whose matrix fills registers and shared memory of an sm_80."""
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", _joined())
    assert len(usage) >= 20
    bytes_of = {name: int(stack) + int(local) for name, _, stack, _, local in usage if int(stack) + int(local)}
    full = [name for name in bytes_of if "BatchedCgKernelIffLi256" in name]
    assert all(bytes_of.pop(name) <= 8 for name in full)
    assert not bytes_of


def _joined() -> str:
    return cuobjdump("--dump-resource-usage").replace("\n", " ")
