"""Compiles the suite's programs quickly: they are small, and XLA's compiler takes longer than they do.

One LLVM module per program instead of one per thread, and fusions by the older emitter, which writes less code. The
level of optimization stays the users', for rounding is part of what the tests check; `quick_jit` lowers it where a test
compares with a tolerance. A compilation cache for the run was tried: writing it took more than it saved.
"""

from __future__ import annotations

import importlib.metadata
import os

# XLA stops the process at a flag it does not know, so the flags are for the versions on which they were tried.
FLAGS = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
TRIED = ("0.10.", "0.11.")


def set_up() -> None:
    """Sets the flags for this process and for those it starts; what the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    if importlib.metadata.version("jaxlib").startswith(TRIED) and FLAGS not in flags:
        os.environ["XLA_FLAGS"] = f"{FLAGS} {flags}".strip()
