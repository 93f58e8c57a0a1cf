"""The reference: which names of a module its page shows, and the page of presets.

A hook of mkdocs (mkdocs.yml). A page in docs/reference says `::: curvax.solvers`, and here that becomes all public names of the
module. Presets take their keywords from classes of options, which only the running package puts together, so their page is
made from `curvax.describe`.
"""

from __future__ import annotations

import inspect
import pathlib
import re
import sys

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from public_names import origin, public_modules

import curvax

MODULE = re.compile(r"^::: (curvax[\w.]*)$", flags=re.MULTILINE)
PRESETS = "reference/presets.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the page of presets."""
    sections = [_preset(curvax.describe(name)) for name in curvax.list_methods()]
    intro = "# Presets\n\nAll keywords with their defaults; [methods](../methods.md) says what the presets are for.\n\n"
    files.append(File.generated(config, PRESETS, content=intro + "\n".join(sections)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Every `::: module` gets the public names of the module, presets apart."""
    if not page.file.src_uri.startswith("reference/"):
        return markdown
    modules, presets = public_modules(), curvax.list_methods()

    def members(match: re.Match[str]) -> str:
        module = match.group(1)
        names = [name for name in modules[module] if module != "curvax" or name not in presets]
        # A function behind a module of the same name is not reached from the package: it is named by where it is.
        hidden = [where for name in names if (where := origin(module, name)).endswith(f".{name}.{name}")]
        lines = [f"{match.group()}\n    options:\n      members: [{', '.join(names)}]"]
        return "\n\n".join([*lines, *(f"::: {where}\n    options:\n      show_root_heading: true" for where in hidden)])

    return MODULE.sub(members, markdown)


def _preset(info: curvax.MethodInfo) -> str:
    lines = [f"## `{info.name}` {{: #curvax.{info.name} }}", "", info.description, "", info.doc or "", ""]
    lines += ["| keyword | default | meaning |", "|---|---|---|"]
    for name, parameter in info.signature.parameters.items():
        default = "" if parameter.default is inspect.Parameter.empty else f"`{parameter.default!r}`"
        lines.append(f"| `{name}` | {_cell(default)} | {_cell(info.keywords.get(name, ''))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
