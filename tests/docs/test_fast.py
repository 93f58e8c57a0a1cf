"""`make test-fast` covers every layer: each folder of tests has marked some, or is named here with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.fast
TESTS = Path(__file__).resolve().parents[1]
WITHOUT = {
    "bench": "a benchmark of any use takes longer",
    "cpp": "compiles C++ under sanitizers: `make test-cpp`",
    "examples": "each trains a model",
    "gpu": "needs a GPU",
    "lowering": "needs packages for a GPU: `make test-gpu-compile`",
}


def test_every_layer_has_fast_tests() -> None:
    files = {path: path.read_text() for path in TESTS.rglob("test_*.py")}
    folders = {path.parent.name for path in files}
    marked = {path.parent.name for path, text in files.items() if "pytest.mark.fast" in text}
    assert folders - marked == set(WITHOUT)
