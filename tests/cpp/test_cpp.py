"""Builds the C++ tests of this folder under sanitizers and runs them; needs no GPU and no CUDA.

The CUDA kernels and handlers are compiled as plain C++ against cuda_emulator.h. A binary is built once per content of
csrc/ and tests/cpp/.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

MEMORY = "address,undefined"
THREADS = "thread"


# What a program needs beside its own source: sources under csrc/, and sanitizers other than MEMORY.
PANELS = ("batched", "batched_handlers", "gram", "large_cholesky", "linalg/triangle", "panels", "simd")
LINALG = (
    *("large_cholesky", "panels", "simd"),
    *(f"linalg/{path.stem}" for path in sorted((ROOT / "csrc" / "cpu" / "linalg").glob("*.cc"))),
)
SOURCES = {
    "test_diagonal_handlers": ("cpu/diagonal.cc", "cpu/diagonal_simd.cc", "cpu/simd.cc"),
    "test_handlers": ("cpu/tree_cg.cc", "cpu/simd.cc"),
    "test_linalg": tuple(f"cpu/{name}.cc" for name in LINALG),
    "test_panels": tuple(f"cpu/{name}.cc" for name in PANELS),
    "test_threads": tuple(f"cpu/{name}.cc" for name in dict.fromkeys((*PANELS, *LINALG, "tree_cg"))),
}
SANITIZERS = {"test_threads": THREADS}
PROGRAMS = sorted(path.stem for path in HERE.glob("test_*.cc"))


def compiler() -> str:
    """The C++ compiler; skips without one."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no C++ compiler: {name} is not on PATH")
    return path


def command(sanitizers: str) -> list[str]:
    """The compiler with its flags. Not optimized: compiling takes longer than running."""
    flags = "-std=c++17 -O0 -g1 -Wall -Wextra -Werror -Wno-unknown-pragmas -pthread".split()
    sanitize = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    return [compiler(), *flags, *sanitize, f"-I{ROOT / 'csrc'}", f"-I{HERE}", "-isystem", jax.ffi.include_dir()]


@cache
def lacking(sanitizers: str) -> str | None:
    """Why programs cannot be built or run with these sanitizers; None if they can."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "main.cc")
        source.write_text("int main() {}\n")
        built = run([*command(sanitizers), source, "-o", Path(folder, "main")])
        done = run([Path(folder, "main")]) if built.returncode == 0 else built
    return None if done.returncode == 0 else f"the compiler's sanitizers {sanitizers} do not work: {done.stderr[:200]}"


def run(arguments: list[str | Path], timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=timeout)


def build(program: str, sanitizers: str) -> Path:
    """The program, built unless it stands in build/cpp already."""
    sources = [HERE / f"{program}.cc", *(ROOT / "csrc" / source for source in SOURCES.get(program, ()))]
    line = [*command(sanitizers), *sources]
    digest = hashlib.sha256(" ".join(map(str, line)).encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HERE.glob("*.h"), HERE / f"{program}.cc"]):
        digest.update(path.name.encode() + path.read_bytes())
    binary = ROOT / "build" / "cpp" / f"{program}-{digest.hexdigest()[:16]}"
    if binary.exists():
        return binary
    binary.parent.mkdir(parents=True, exist_ok=True)
    for old in binary.parent.glob(f"{program}-*"):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=binary.parent) as folder:
        # Under its own name at once: another process may build or run the same.
        done = run([*line, "-o", Path(folder, "program")])
        assert done.returncode == 0, done.stderr
        Path(folder, "program").replace(binary)
    return binary


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str) -> None:
    sanitizers = SANITIZERS.get(program, MEMORY)
    reason = lacking(sanitizers)
    if reason is not None:
        pytest.skip(reason)
    done = run([build(program, sanitizers)])
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), f"{done.stdout}\n{done.stderr}"
