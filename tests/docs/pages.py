"""The Python of a page, run as a reader would: top to bottom, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from tests.oracle.compiling import quick_jit

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
X64 = 'jax.config.update("jax_enable_x64", True)'


def blocks(page: Path) -> list[str]:
    """The page's blocks of Python that are to run."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Runs a page and returns its names.

    A page without imports goes on from the first block of docs/start.md, as that page says. JAX's promotion of dtypes
    is a reader's; 64-bit types end with the page, and what it jits is compiled in a hurry.
    """
    own = blocks(page)
    scope: dict[str, Any] = {"__name__": page.stem, "quick_jit": quick_jit}
    if "import curvax\n" not in "".join(own):
        own = [blocks(DOCS / "start.md")[0], *own]
    program = "\n".join(own).replace(X64, "").replace("jax.jit", "quick_jit")
    with jax.enable_x64(X64 in "".join(own)), jax.numpy_dtype_promotion("standard"):
        exec(compile(program, str(page), "exec", dont_inherit=True), scope)
    return scope
