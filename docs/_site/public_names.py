"""The public names of curvax: what each public module offers, read from its source.

A module offers what it lists in `__all__`; a package without the list what it imports as itself (`from x import Y as
Y`); any other module what it defines without an underscore. Public modules are `curvax` and those that it imports as
itself.
"""

from __future__ import annotations

import ast
import pathlib

SOURCE = pathlib.Path(__file__).parents[2] / "python" / "curvax"
FORMER = {"curvax.optax"}  # a former name, which warns


def public_modules() -> dict[str, list[str]]:
    """The names of each public module, by the module's name."""
    top = _names(SOURCE / "__init__.py")
    files = {name: file for name in top if (file := _file(name)) is not None}
    modules = {"curvax": [name for name in top if name not in files]}
    modules |= {f"curvax.{name}": _names(file) for name, file in files.items()}
    return {module: names for module, names in modules.items() if module not in FORMER}


def origin(module: str, name: str) -> str:
    """Where a public name is defined: `curvax.solvers.CG` is `curvax.solvers.conjugate_gradient.CG`."""
    file = _file(module.removeprefix("curvax").removeprefix(".").replace(".", "/"))
    for node in ast.parse(file.read_text()).body if file is not None else ():
        if isinstance(node, ast.ImportFrom) and any(alias.asname == name for alias in node.names):
            return origin(node.module or "", name)
    return f"{module}.{name}"


def _file(name: str) -> pathlib.Path | None:
    candidates = (SOURCE / name / "__init__.py", SOURCE / f"{name or '__init__'}.py")
    return next((file for file in candidates if file.exists()), None)


def _names(file: pathlib.Path) -> list[str]:
    body = ast.parse(file.read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and "__all__" in _targets(node):
            return list(ast.literal_eval(node.value))
    if file.name == "__init__.py":
        imports = [node for node in body if isinstance(node, ast.ImportFrom)]
        return [alias.name for node in imports for alias in node.names if alias.asname == alias.name]
    defined = [name for node in body for name in _targets(node)]
    return [name for name in defined if not name.startswith("_")]


def _targets(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]
