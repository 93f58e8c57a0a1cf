"""README and every page run, top to bottom; README stays short, and pages that list things list all of them."""

from __future__ import annotations

import enum
import re
from pathlib import Path

import pytest

from curvax.losses import BatchFault
from curvax.solvers import Result
from tests.docs.pages import DOCS, ROOT, blocks, run

README = ROOT / "README.md"
PAGES = sorted(page for page in DOCS.rglob("*.md") if blocks(page))
CHECKED_BELOW = {"structure", "layerwise", "batches", "physics", "vmc", "optax", "fit", "meshes"}
WITH_A_FILE = {"extending"}  # test_extending.py

pytestmark = pytest.mark.usefixtures("quick_programs")


def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(blocks(README)) == 1
    run(README)
    printed = capsys.readouterr().out
    assert "plan: lane" in printed and "accepted True" in printed


@pytest.mark.fast
def test_readme_is_short() -> None:
    assert len(README.read_text().split()) < 900


@pytest.mark.fast
def test_every_preset_is_on_the_page_of_methods() -> None:
    import curvax

    text = (DOCS / "methods.md").read_text()
    assert [name for name in curvax.list_methods() if f"`{name}`" not in text] == []


@pytest.mark.fast
@pytest.mark.parametrize("codes", [Result, BatchFault])
def test_every_code_is_on_the_page_of_troubles(codes: type[enum.IntEnum]) -> None:
    text = (DOCS / "troubleshooting.md").read_text()
    assert [code.name for code in codes if f"\n| {code.name} |" not in text] == []


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page.stem not in CHECKED_BELOW | WITH_A_FILE],
    ids=lambda page: str(page.relative_to(DOCS)),
)
def test_the_page_runs(page: Path) -> None:
    scope = run(page)
    assert "info" not in scope or bool(scope["info"]["finite"])


def test_the_structure_page_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = DOCS / "structure.md"
    run(page)
    said = re.findall(r"^# (\[.*)$", "".join(blocks(page)), flags=re.MULTILINE)
    assert len(said) == 3 and capsys.readouterr().out.splitlines() == said


def test_the_layerwise_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run(DOCS / "layerwise.md")
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("6 inner steps", "layers/1", "5 step sizes and 0 on 2 minibatches"))


def test_the_page_on_batches_runs() -> None:
    assert bool(run(DOCS / "batches.md")["info"]["accepted"])


def test_the_page_on_physics_runs() -> None:
    scope = run(DOCS / "physics.md")
    assert (
        float(scope["error"]) < 2e-3
        and bool(scope["info"]["finite"])
        and set(scope["batch"]["weights"]) == set(scope["terms"])
    )


def test_the_page_on_variational_monte_carlo_runs() -> None:
    scope = run(DOCS / "vmc.md")
    assert bool(scope["info"]["accepted"]) and scope["params"]["w"].dtype == complex


def test_the_optax_page_runs() -> None:
    scope = run(DOCS / "optax.md")
    assert scope["state_specs"][0].mean == scope["specs"]
    assert int(scope["optimizer"].step[...]) == 1


def test_the_page_on_fit_runs(capsys: pytest.CaptureFixture[str]) -> None:
    scope = run(DOCS / "fit.md")
    assert scope["result"].history["loss"][-1] < scope["results"]["adam"].history["loss"][-1] / 10
    assert len(scope["saved"].history) == 60 and len(scope["drawn"].history) == 20
    assert "adam  step 60 of 60" in capsys.readouterr().out


def test_the_page_on_meshes_runs() -> None:
    scope = run(DOCS / "meshes.md")
    assert bool(scope["info"]["finite"])
    assert scope["params"]["w1"].sharding.spec == scope["specs"]["w1"]
