"""The reference: a page for each public module, and one for the presets.

A hook of mkdocs (mkdocs.yml). The page of a module has all of its public names, so none is forgotten; docstrings come
from mkdocstrings. Presets take their keywords from classes of options, which only the running package puts together, so
their page is made from `curvax.describe`.
"""

from __future__ import annotations

import inspect
import pathlib
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from public_names import origin, public_modules

import curvax

PRESETS = "reference/presets.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages."""
    for module, names in public_modules().items():
        page = f"reference/{module.removeprefix('curvax.')}.md"
        files.append(File.generated(config, page, content=_module(module, names)))
    sections = [_preset(curvax.describe(name)) for name in curvax.list_methods()]
    intro = "# Presets\n\nAll keywords with their defaults; [methods](../methods.md) says what the presets are for.\n\n"
    files.append(File.generated(config, PRESETS, content=intro + "\n".join(sections)))
    return files


def _module(module: str, names: list[str]) -> str:
    if module == "curvax":
        names = [name for name in names if name not in curvax.list_methods()]
    # A function behind a module of the same name is not reached from the package: it is named by where it is.
    hidden = [where for name in names if (where := origin(module, name)).endswith(f".{name}.{name}")]
    parts = [f"# {module}", f"::: {module}\n    options:\n      members: [{', '.join(names)}]"]
    parts += [f"::: {where}\n    options:\n      show_root_heading: true" for where in hidden]
    if module == "curvax":
        parts.insert(1, "Presets have [a page of their own](presets.md).")
    return "\n\n".join(parts) + "\n"


def _preset(info: curvax.MethodInfo) -> str:
    lines = [f"## `{info.name}` {{: #curvax.{info.name} }}", "", info.description, "", info.doc or "", ""]
    lines += ["| keyword | default | meaning |", "|---|---|---|"]
    for name, parameter in info.signature.parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        lines.append(f"| `{name}` | {_cell(default)} | {_cell(info.keywords.get(name, ''))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
