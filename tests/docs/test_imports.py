"""Imports run one way: a module takes what it needs from the layers below its own, and from its own package."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

import curvax
import curvax.kernels

pytestmark = pytest.mark.fast

# From the top: each line may import from the lines below it, and its members not from one another.
LAYERS = """
__main__
cli
optax
layerwise
transforms
methods
method
execute
plan
optimizers
chain
preconditioners
estimators damping
curvature
solvers
structure
output_space
losses eigenbases
kernels
ffi
loops live
jaxprs
deprecation keys keywords numbers pipes requirements result spelling state_version telemetry tree versions work
"""
RANK = {name: rank for rank, line in enumerate(reversed(LAYERS.split("\n"))) for name in line.split()}

# Names that the lowest layers take from a neighbor of their own line.
NEIGHBORS = {("telemetry", "requirements"), ("telemetry", "spelling"), ("keywords", "spelling")}


def _packages() -> Iterator[tuple[str, pathlib.Path]]:
    """(layer, file) of every module."""
    root = pathlib.Path(curvax.__file__).parent
    kernels = pathlib.Path(curvax.kernels.__file__).parent
    for file in sorted(root.rglob("*.py")):
        part = file.relative_to(root).parts
        if part != ("__init__.py",) and part[0] != "kernels":
            yield part[0].removesuffix(".py"), file
    for file in sorted(kernels.rglob("*.py")):
        yield "kernels", file


def _imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(layer, line) of every import of a module of curvax, those inside of functions and conditions included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "curvax":
            parts = node.module.split(".")
            names = [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
            yield from ((name, node.lineno) for name in names)


def test_imports_run_one_way() -> None:
    wrong, seen = [], set()
    for layer, file in _packages():
        seen.add(layer)
        for name, line in _imported(ast.parse(file.read_text())):
            if name == layer or (layer, name) in NEIGHBORS:
                continue
            if name not in RANK or RANK[name] >= RANK[layer]:
                wrong.append(f"{file.name}:{line} of {layer} imports {name}")
    assert not wrong, wrong
    assert seen - {"optax"} <= set(RANK), f"a new layer needs a place: {seen - set(RANK)}"


def test_nothing_is_imported_for_type_checkers_alone() -> None:
    """That hides what a module depends on."""
    assert not [file for _, file in _packages() if "TYPE_CHECKING" in file.read_text()]
