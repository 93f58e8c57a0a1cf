"""What a Triton kernel takes of a multiprocessor, from the cubin that Triton builds without a device."""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

CAPABILITIES = (80, 90, 100)


@dataclasses.dataclass(frozen=True)
class Resources:
    """Resources of one compiled kernel.

    Attributes:
      registers: per thread.
      spilled: bytes of stack and local memory per thread: registers that did not fit.
      shared: bytes of shared memory per block.
      tensor_cores: matrix instructions in the PTX, by name.
    """

    registers: int
    spilled: int
    shared: int
    tensor_cores: Mapping[str, int]


def build(
    kernel: Any, pointers: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int, stages: int
) -> Resources:
    """Compiles a `triton.jit` function for a compute capability (90 for an H100) and reads its resources.

    Args:
      kernel: the function.
      pointers: its pointer arguments, name -> element type ("fp32"), in order; all 16-byte aligned, as XLA's are.
      constants: its compile-time arguments.
      capability: of `CAPABILITIES`.
      warps: per block.
      stages: of the software pipeline.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: f"*{kind}" for name, kind in pointers.items()} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))}
    source = ASTSource(kernel, signature, dict(constants), aligned)
    options = {"num_warps": warps, "num_stages": stages}
    compiled: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    matrix = {name: compiled.asm["ptx"].count(name) for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")}
    return Resources(
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_cores={name: count for name, count in matrix.items() if count},
    )


def _resource_usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [_cuobjdump(), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", text)}


def _cuobjdump() -> str:
    """The triton package carries one."""
    import triton

    carried = next(pathlib.Path(str(triton.__file__)).parent.rglob("bin/cuobjdump"), None)
    found = str(carried) if carried is not None else shutil.which("cuobjdump")
    if found is None:
        raise RuntimeError("no cuobjdump: neither triton nor CUDA's bin directory has one.")
    return found
