"""Compiles the suite's programs quickly: most of its time is XLA's compiler, not the programs.

Two measures, both before JAX is imported. The level of optimization stays the users', for rounding is part of what the
tests check.

1. Flags: one LLVM module per program instead of one per thread, and fusions by the older emitter (less code).
2. A compilation cache in a new folder per run, which the workers and their subprocesses share: a program that two
   tests compile is compiled once.
"""

from __future__ import annotations

import atexit
import importlib.metadata
import os
import shutil
import tempfile

# XLA stops the process at a flag it does not know, so the flags are for the versions on which they were tried.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
TRIED = ("0.10.", "0.11.")


def set_up() -> None:
    """Sets the environment of this process and of those it starts; what the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib").startswith(TRIED) and FLAGS not in flags:
        os.environ["XLA_FLAGS"] = f"{FLAGS} {flags}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="curvax-tests-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = folder
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
