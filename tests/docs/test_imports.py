"""Imports run one way: a module takes what it needs from the layers below its own, and from its own package.

The contract is `import_contract.toml` beside this file.
"""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import tomllib
from collections.abc import Iterator

import pytest

import curvax
import curvax.kernels

pytestmark = pytest.mark.fast

CONTRACT = tomllib.loads(pathlib.Path(__file__).with_name("import_contract.toml").read_text())
RANK = {name: rank for rank, line in enumerate(reversed(CONTRACT["layers"])) for name in line.split()}
NEIGHBORS = {tuple(pair) for pair in CONTRACT["neighbors"]}
ORDERS: dict[str, list[str]] = CONTRACT["reading_order"]


@dataclasses.dataclass(frozen=True)
class Module:
    """A module of curvax, by the parts of its name: `("structure", "rows")`, a package by its own."""

    parts: tuple[str, ...]
    file: pathlib.Path

    @property
    def layer(self) -> str:
        return self.parts[0]


def _modules() -> Iterator[Module]:
    root, kernels = (pathlib.Path(package.__file__ or "").parent for package in (curvax, curvax.kernels))
    for start, before in ((root, ()), (kernels, ("kernels",))):
        for file in sorted(start.rglob("*.py")):
            parts = (*before, *file.relative_to(start).with_suffix("").parts)
            # In a wheel the kernels lie inside of the package, in a checkout beside it.
            if parts != ("__init__",) and (before or parts[0] != "kernels"):
                yield Module(parts[:-1] if parts[-1] == "__init__" else parts, file)


MODULES = {module.parts: module for module in _modules()}


def _imported(module: Module) -> Iterator[tuple[tuple[str, ...], int]]:
    """(parts of a module of curvax, line) of every import, those inside of functions and conditions included."""
    for node in ast.walk(ast.parse(module.file.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module.file}:{node.lineno}: write the whole name of the module."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            parts = tuple(name.split("."))
            if parts[0] == "curvax" and len(parts) > 1:
                # Of a name inside of a module, the module.
                while parts[1:] not in MODULES and len(parts) > 2:
                    parts = parts[:-1]
                yield parts[1:], node.lineno


def test_imports_run_one_way() -> None:
    wrong = []
    for module in MODULES.values():
        for (name, *_), line in _imported(module):
            if name == module.layer or (module.layer, name) in NEIGHBORS:
                continue
            if name not in RANK or RANK[name] >= RANK[module.layer]:
                wrong.append(f"{module.file.name}:{line} of {module.layer} imports {name}")
    assert not wrong, wrong
    layers = {module.layer for module in MODULES.values()} - set(CONTRACT["aliases"])
    assert layers <= set(RANK), f"a new layer needs a place: {layers - set(RANK)}"


def test_no_import_leads_back() -> None:
    """Not even inside of a function, where Python would let it pass."""
    edges = {m.parts: {name for name, _ in _imported(m)} & set(MODULES) - {m.parts} for m in MODULES.values()}
    done: set[tuple[str, ...]] = set()

    def visit(parts: tuple[str, ...], path: list[tuple[str, ...]]) -> None:
        assert parts not in path, " -> ".join(map(".".join, [*path[path.index(parts) :], parts]))
        if parts not in done:
            for name in sorted(edges[parts]):
                visit(name, [*path, parts])
            done.add(parts)

    for parts in sorted(edges):
        visit(parts, [])


def test_the_files_of_a_package_are_in_reading_order() -> None:
    for package, order in ORDERS.items():
        files = {parts[1] for parts in MODULES if parts[0] == package and len(parts) == 2}
        assert sorted(order) == sorted(files)
        story = ast.get_docstring(ast.parse(MODULES[package,].file.read_text())) or ""
        assert [name for name in re.findall(r"`(\w+)\.py`", story) if name in files] == order
        for name in order:
            below = order[: order.index(name)]
            taken = {parts[1] for parts, _ in _imported(MODULES[package, name]) if parts[0] == package and parts[1:]}
            assert taken <= set(below), f"{package}/{name}.py imports {taken - set(below)}, which come after it."


def test_nothing_is_imported_for_type_checkers_alone() -> None:
    """That hides what a module depends on."""
    assert not [module.file for module in MODULES.values() if "TYPE_CHECKING" in module.file.read_text()]
