"""The page: a table of contents, then a section per file of rows."""

from __future__ import annotations

import ast
import html
import pathlib
from collections.abc import Iterator

import markdown

from bench import schema
from bench.markdown import TABLES, files, origins
from bench.report import pictures
from bench.tables import plain

_SUITES = pathlib.Path(__file__).parents[1] / "suites"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
img { max-width: 100%; background: white; border-radius: 4px; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 2px 8px; border-bottom: 1px solid #8884; text-align: left; }
li, small { overflow-wrap: anywhere; }
"""


def document(folder: pathlib.Path) -> str:
    """The page of every file of rows in a folder and below it."""
    paths = files(folder)
    contents = " · ".join(f'<a href="#{_name(path, folder)}">{_name(path, folder)}</a>' for path in paths)
    return "\n".join(
        (
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><title>curvax: benchmarks</title>',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<style>{_STYLE}</style></head><body>",
            "<h1>curvax: benchmarks</h1>",
            "<p>Made from the rows of <code>bench/results</code> and from nothing else. A ratio is the median over",
            "rounds of two times of the same round; below 1 is faster.</p>",
            f"<p>{contents}</p>",
            *(part for path in paths for part in _section(path, _name(path, folder))),
            "</body></html>\n",
        )
    )


def question(suite: str) -> str:
    """What a suite asks: the first line of its module, which is not imported, as some need packages of their own."""
    path = _SUITES / f"{suite}.py"
    path = path if path.exists() else _SUITES / suite / "__init__.py"
    return (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()[0] if path.exists() else ""


def _name(path: pathlib.Path, folder: pathlib.Path) -> str:
    return str(path.relative_to(folder).with_suffix(""))


def _section(path: pathlib.Path, name: str) -> Iterator[str]:
    rows = schema.read(path)
    yield f'<h2 id="{name}">{name}</h2>'
    yield f"<p>{html.escape(question(path.stem))}</p>"
    for title, draw in (("Ratios", pictures.times), ("Distance to the limit", pictures.limits)):
        drawn = draw(rows)
        yield from (f"<h3>{title}</h3>" for _ in drawn[:1])
        yield from (f'<img alt="{html.escape(label)}" src="{picture}">' for label, picture in drawn)
    yield "<details><summary>Table</summary><div class=wide>"
    yield _html("\n".join((*origins(rows), "", *TABLES.get(path.stem, plain)(rows))))
    yield "</div></details>"


def _html(text: str) -> str:
    return markdown.markdown(html.escape(text, quote=False), extensions=["tables", "sane_lists"])
