"""Builds the C++ tests of this folder under sanitizers and runs them; needs no GPU and no CUDA.

The CUDA kernels and handlers are compiled as plain C++ against cuda_emulator.h. A source is compiled once per content
of itself and of the headers of csrc/ and tests/cpp/.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent

MEMORY = "address,undefined"
THREADS = "thread"


# What a program needs beside its own source: sources under csrc/, and sanitizers other than MEMORY.
SIMD = tuple(f"simd/{name}" for name in ("avx2", "avx512f", "baseline", "instruction_set", "kernels"))
PANELS = ("batched_handlers", "gram", "large_cholesky", "linalg/triangle", *SIMD)
LINALG = (
    "large_cholesky",
    *(f"linalg/{path.stem}" for path in sorted((ROOT / "csrc" / "cpu" / "linalg").glob("*.cc"))),
    *SIMD,
)
SOURCES = {
    "test_cpu_math": SIMD,
    "test_diagonal_handlers": ("diagonal", *SIMD),
    "test_handlers": ("tree_cg", *SIMD),
    "test_linalg": LINALG,
    "test_panels": PANELS,
    "test_threads": tuple(dict.fromkeys((*PANELS, *LINALG, "tree_cg"))),
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
        linked = run([*command(sanitizers), source, "-o", Path(folder, "main")])
        done = run([Path(folder, "main")]) if linked.returncode == 0 else linked
    return None if done.returncode == 0 else f"the compiler's sanitizers {sanitizers} do not work: {done.stderr[:200]}"


def run(arguments: list[str | Path], timeout: int = 900) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, timeout=timeout)


def built(kind: str, name: str, line: list[str | Path], content: Sequence[Path]) -> Path:
    """What `line` makes with `-o` and its file: build/cpp/kind-name-digest, built unless it stands there already."""
    digest = hashlib.sha256(" ".join(map(str, line)).encode())
    for path in content:
        digest.update(path.name.encode() + path.read_bytes())
    target = ROOT / "build" / "cpp" / f"{kind}-{name}-{digest.hexdigest()[:16]}"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    for old in target.parent.glob(f"{kind}-{name}-{'[0-9a-f]' * 16}"):
        old.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Under its own name at once: another process may build or run the same.
        done = run([*line, "-o", Path(folder, "result")])
        assert done.returncode == 0, done.stderr
        Path(folder, "result").replace(target)
    return target


def compiled(source: Path, sanitizers: str) -> Path:
    """The object file of a source, which several programs share."""
    headers = sorted(path for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".cc")
    name = "-".join(source.relative_to(ROOT).with_suffix("").parts)
    content = [source, *headers, *sorted(HERE.glob("*.h"))]
    return built(sanitizers.replace(",", "-"), name, [*command(sanitizers), "-c", source], content)


def build(program: str, sanitizers: str) -> Path:
    """The program of a test."""
    sources = [HERE / f"{program}.cc", *(ROOT / "csrc" / "cpu" / f"{name}.cc" for name in SOURCES.get(program, ()))]
    objects = [compiled(source, sanitizers) for source in sources]
    return built("program", program, [*command(sanitizers), *objects], objects)


@pytest.mark.parametrize("program", PROGRAMS)
def test_program(program: str) -> None:
    sanitizers = SANITIZERS.get(program, MEMORY)
    reason = lacking(sanitizers)
    if reason is not None:
        pytest.skip(reason)
    done = run([build(program, sanitizers)])
    assert done.returncode == 0 and done.stdout.endswith("ok\n"), f"{done.stdout}\n{done.stderr}"


# Instructions that only some x86-64 processors have, as objdump prints them: VEX and EVEX mnemonics begin with v.
WIDE = re.compile(r"\tv[a-z]|%[yz]mm")
# The sets whose code may have them, by how a symbol's name spells their tag.
TAGS = {"4Avx2": re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])|%k[0-7]"), "7Avx512f": None}


def misplaced(disassembly: str) -> list[str]:
    """The instructions that a processor may meet though it lacks them."""
    misplaced, symbol = [], ""
    for line in disassembly.splitlines():
        if head := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            symbol = head[1]
        elif WIDE.search(line):
            tags = [forbidden for tag, forbidden in TAGS.items() if tag in symbol]
            if not tags or (tags[0] is not None and tags[0].search(line)):
                misplaced.append(f"{symbol}:{line}")
    return misplaced


def test_wide_instructions_stay_in_code_of_their_set() -> None:
    """What a wide set's code shares with other code, such as std::max, is compiled for any processor.

    Not optimized, as here, nothing of it is inlined, and the linker takes either file's version. On other processors
    than x86-64 the files of wide sets compile to nothing.
    """
    if shutil.which("objdump") is None or lacking(MEMORY) is not None:
        pytest.skip("needs objdump and the sanitizers")
    with_wide = []
    for name in dict.fromkeys(name for names in SOURCES.values() for name in names):
        listing = run(["objdump", "-d", "--no-show-raw-insn", compiled(ROOT / "csrc" / "cpu" / f"{name}.cc", MEMORY)])
        assert misplaced(listing.stdout) == []
        if WIDE.search(listing.stdout):
            with_wide.append(name)
    assert with_wide == (["simd/avx2", "simd/avx512f"] if platform.machine() == "x86_64" else [])
