"""The page has a section, a picture and a table for every file of rows, and comes out the same twice."""

from __future__ import annotations

import re
import subprocess
from types import SimpleNamespace

import bench.__main__ as command
import bench.everything as everything
import bench.schema as schema

ROWS = [
    schema.Row("steps", "case <a>", "peer", "ms/step", "x", 1.0, 2.0, 3.0),
    schema.Row("steps", "case <a>", "curvax", "ms/step", "x", 1.0, 1.0, 1.0, ratio=0.5, baseline="peer"),
    schema.Row("steps", "case <a>", "curvax", "GB/s", "x", 1.0, 1.0, 1.0, ratio=0.9, baseline="memory copy"),
]


def test_page(tmp_path):
    schema.write(ROWS, "steps", tmp_path)
    pages = []
    for name in ("a.html", "b.html"):
        command.main(["report", str(tmp_path), "--out", str(tmp_path / name)])
        pages.append((tmp_path / name).read_text())
    page = pages[0]
    assert page == pages[1]
    assert '<h2 id="steps">' in page and "case &lt;a&gt;" in page and "<table>" in page
    labels = re.findall(r'<img alt="([^"]+)"', page)
    assert labels == ["ms/step over peer", "GB/s over memory copy"]
    # Nothing is fetched from elsewhere.
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)


def test_all_says_what_it_leaves_out_and_what_failed(monkeypatch, capsys):
    def run(words, **options):
        failed = words[3] == "plan"
        return SimpleNamespace(returncode=int(failed), stdout="12 rows\n", stderr="ValueError: no\n")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(everything, "PACKAGES", {"vmc": "no_such_package"})
    assert everything.main(("steps", "plan", "vmc", "gpu_steps"), ["--quick"]) == 1
    steps, plan, vmc = capsys.readouterr().out.splitlines()
    assert steps.startswith("steps") and steps.endswith("12 rows")
    assert plan.endswith("FAILED: ValueError: no") and vmc.endswith("left out: no_such_package is not installed")
