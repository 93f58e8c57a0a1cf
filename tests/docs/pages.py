"""The Python of a page, run as a reader would: top to bottom, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
X64 = 'jax.config.update("jax_enable_x64", True)'


def blocks(page: Path) -> list[str]:
    """The page's blocks of Python that are to run."""
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(page: Path) -> dict[str, Any]:
    """Runs a page and returns its names.

    A page without imports goes on from the first block of docs/start.md, as that page says. JAX's promotion of dtypes is
    a reader's; 64-bit types end with the page.
    """
    own = blocks(page)
    scope: dict[str, Any] = {"__name__": page.stem}
    if "import curvax\n" not in "".join(own):
        own = [blocks(DOCS / "start.md")[0], *own]
    with jax.enable_x64(any(X64 in block for block in own)), jax.numpy_dtype_promotion("standard"):
        exec(compile("\n".join(own).replace(X64, ""), str(page), "exec", dont_inherit=True), scope)
    return scope
