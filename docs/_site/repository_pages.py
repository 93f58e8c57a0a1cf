"""Pages of the site that stand elsewhere in the repository, and links between all of them.

A hook of mkdocs (mkdocs.yml). README.md is the front page, bench/ the page on benchmarks with a page for each table of
rows, CHANGELOG.md and CONTRIBUTING.md are pages, and so is each file of examples/. Every page links as in the
repository, `[x](../bench/README.md)`, so that links work in an editor and on the site; here they get the addresses of
the site. A link to what is no page is a warning, and the strict build stops at it.
"""

from __future__ import annotations

import logging
import os
import pathlib
import posixpath
import re
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = pathlib.Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.hooks.repository_pages")

ALONE = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
SECTIONS = {"benchmarks": "Benchmarks", "examples": "Examples", "reference": "Reference"}
ELSEWHERE = "How to"
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s]+)(\))")
CODE = re.compile(r"(^```.*?^```$|^ {4,}.*?$|`[^`\n]*`)", flags=re.DOTALL | re.MULTILINE)


def place(path: str) -> str | None:
    """Where a file of the repository, or a folder, stands on the site; `None` for what does not."""
    if path in ALONE:
        return ALONE[path]
    if path in ("examples", "bench/results"):
        return {"examples": "examples/index.md", "bench/results": "benchmarks/index.md"}[path]
    if path == "bench/README.md":
        return "benchmarks/index.md"
    if path.startswith("examples/") and path.endswith(".py"):
        return path.removesuffix(".py") + ".md"
    for folder, target in (("docs/", ""), ("bench/results/", "benchmarks/")):
        if path.startswith(folder):
            return target + path.removeprefix(folder)
    return None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not stand in docs/."""
    examples = sorted((ROOT / "examples").rglob("[!_]*.py")) + sorted((ROOT / "examples").rglob("__main__.py"))
    texts = {path: (ROOT / path).read_text() for path in (*ALONE, "bench/README.md")}
    for path in sorted((ROOT / "bench/results").rglob("*.md")):
        texts[_relative(path)] = path.read_text()
    for path, text in texts.items():
        files.append(File.generated(config, place(path) or "", content=_relinked(text, path)))
    for path in examples:
        text = path.read_text()
        title = f"# {_relative(path)}\n\n```python\n{text}```\n"
        files.append(File.generated(config, place(_relative(path)) or "", content=title))
    files.append(File.generated(config, "examples/index.md", content=_table_of(examples)))
    for path in sorted((ROOT / "bench/results").rglob("*.png")):
        files.append(File.generated(config, place(_relative(path)) or "", abs_src_path=str(path)))
    _complete(config.nav or [], [file.src_uri for file in files.documentation_pages()])
    return files


def _complete(nav: list[dict[str, list[Any]]], pages: list[str]) -> None:
    """Adds the pages that the navigation does not name, each to the section of its folder."""
    sections = {title: content for entry in nav for title, content in entry.items()}
    entries = [entry for content in sections.values() for entry in content]
    named = {page for entry in entries for page in (entry.values() if isinstance(entry, dict) else (entry,))}
    for page in sorted(set(pages) - named):
        folder, _, name = page.rpartition("/") if page.split("/")[0] not in SECTIONS else page.partition("/")
        entry = {name.removesuffix(".md"): page} if folder in SECTIONS else page
        sections[SECTIONS.get(folder, ELSEWHERE)].append(entry)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links of pages in docs/ get their addresses on the site."""
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, f"docs/{page.file.src_uri}")


def _table_of(examples: list[pathlib.Path]) -> str:
    lines = ["# Examples", "", "Each runs as it is, from the root of a checkout, and prints what it does.", ""]
    for path in examples:
        first = path.read_text().removeprefix('"""').split("\n")[0].removesuffix('"""')
        lines.append(
            f"- [`{_relative(path)}`]({_relative(path).removeprefix('examples/').removesuffix('.py')}.md): {first}"
        )
    return "\n".join(lines) + "\n"


def _relative(path: pathlib.Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _relinked(text: str, source: str) -> str:
    """The text of a file of the repository, with the links of its page."""
    here = posixpath.dirname(place(source) or "")

    def link(match: re.Match[str]) -> str:
        before, target, behind = match.groups()
        address, mark, anchor = target.partition("#")
        if not address or re.match(r"\w+:", address):
            return match.group()
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), address))
        where = place(path)
        if where is None or not (ROOT / path).exists():
            LOG.warning("%s links to %s, which is no page of the site.", source, target)
            return match.group()
        return before + os.path.relpath(where, here or ".").replace(os.sep, "/") + mark + anchor + behind

    parts = CODE.split(text)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(parts))
