"""The README's Python blocks run, top to bottom, as one program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import pytest

README = Path(__file__).parents[2] / "README.md"


def test_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(blocks) >= 4
    exec(compile("\n".join(blocks), str(README), "exec"), {"__name__": "readme"})
    printed = capsys.readouterr().out
    assert "plan: lane" in printed and "accepted True" in printed


@pytest.mark.fast
def test_every_preset_is_in_the_readme() -> None:
    import curvax

    text = README.read_text()
    assert [name for name in curvax.list_methods() if f"`{name}`" not in text] == []


def test_the_structure_page_runs_and_prints_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = README.parent / "docs" / "structure.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(block, str(page), "exec"), {"__name__": "structure"})
    said = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# [")]
    assert len(said) == 3 and capsys.readouterr().out.splitlines() == said


def test_the_layerwise_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = README.parent / "docs" / "layerwise.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    exec(compile(block, str(page), "exec"), {"__name__": "layerwise"})
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("6 inner steps", "layers/1", "5 step sizes and 0 on 2 minibatches"))


def test_the_page_on_batches_runs() -> None:
    page = README.parent / "docs" / "batches.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    scope = {"__name__": "batches"}
    exec(compile(block, str(page), "exec"), scope)
    assert bool(scope["info"]["accepted"])  # type: ignore[index]


def test_the_page_on_operators_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = README.parent / "docs" / "operators.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {"__name__": "operators"}
    exec(compile(block, str(page), "exec"), scope)
    assert "sharpness" in capsys.readouterr().out and scope["sample"]["w1"].shape == (8, 16)


def test_the_page_on_physics_runs(x64: None) -> None:
    page = README.parent / "docs" / "physics.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {"__name__": "physics"}
    exec(compile(block.replace('jax.config.update("jax_enable_x64", True)', ""), str(page), "exec"), scope)
    assert (
        scope["error"] < 2e-3
        and bool(scope["info"]["finite"])
        and set(scope["batch"]["weights"]) == set(scope["terms"])
    )


@jax.numpy_dtype_promotion("standard")
def test_the_page_on_variational_monte_carlo_runs(x64: None) -> None:
    page = README.parent / "docs" / "vmc.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    scope = {"__name__": "vmc"}
    exec(compile(block.replace('jax.config.update("jax_enable_x64", True)', ""), str(page), "exec"), scope)
    assert bool(scope["info"]["accepted"])  # type: ignore[index]
    assert scope["params"]["w"].dtype == complex  # type: ignore[index]


@jax.numpy_dtype_promotion("standard")  # Optax's schedules and Flax rely on promotion
def test_the_optax_page_runs() -> None:
    page = README.parent / "docs" / "optax.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    found: dict[str, Any] = {"__name__": "optax_page"}
    exec(compile("\n".join(blocks), str(page), "exec"), found)
    assert found["state_specs"][0].mean == found["specs"]
    assert int(found["optimizer"].step[...]) == 1
