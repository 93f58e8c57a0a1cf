"""What `make docs` checks of the site it built: links, anchors, and a heading for every public name."""

from __future__ import annotations

import importlib.util
import types
from pathlib import Path

import pytest

import curvax
from tests.docs.pages import DOCS

pytestmark = pytest.mark.fast


def _load(name: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, DOCS / "_site" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(str(DOCS / "_site"))
    return _load("public_names")


def test_public_names_are_those_that_a_user_reaches(names: types.ModuleType) -> None:
    modules = names.public_modules()
    for module, members in modules.items():
        owner = curvax if module == "curvax" else getattr(curvax, module.removeprefix("curvax."))
        assert [name for name in members if not hasattr(owner, name)] == [], module
    reached = {name for name in vars(curvax) if not name.startswith("_")}
    modules_of_curvax = {name for name in reached if isinstance(vars(curvax)[name], types.ModuleType)}
    assert set(modules["curvax"]) == reached - modules_of_curvax - {"importlib"}
    assert "CG" in modules["curvax.solvers"] and "Metric" in modules["curvax.telemetry"]
    assert names.origin("curvax.solvers", "CG") == "curvax.solvers.conjugate_gradient.CG"


def test_broken_links_anchors_and_missing_names_are_faults(
    names: types.ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check = _load("check_site")
    monkeypatch.setattr(check, "public_modules", lambda: {"curvax": ["Term", "Terms"]})
    (tmp_path / "page").mkdir()
    (tmp_path / "index.html").write_text(
        '<a href="page/#here"></a><a href="page/#gone"></a><a href="https://a.b/c"></a>'
    )
    (tmp_path / "page" / "index.html").write_text('<h2 id="here"></h2><p id="curvax.Term"></p><img src="no.png">')
    assert check.main(tmp_path) == 1
    *faults, summary = capsys.readouterr().out.splitlines()
    assert faults == [
        "index.html: no anchor for page/#gone.",
        "page/index.html: the image no.png has no alternative text.",
        "page/index.html: no file for no.png.",
        "curvax.Terms is on no page: has it a docstring, and does docs/_site/public_names.py see it?",
    ]
    assert summary == "2 pages, 4 links, 4 faults"
