"""The page on extensions runs, top to bottom, and each of its modules is planned like ours."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from curvax.methods import registry

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
SETUP, *EXTENSIONS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)


def test_each_extension_is_short() -> None:
    assert len(EXTENSIONS) == 7, "a loss, an estimator, a solver, a preconditioner, a damping policy, an op, a preset"
    assert max(len(block.splitlines()) for block in EXTENSIONS) < 40


@pytest.mark.usefixtures("quick_programs")
def test_the_page_runs_and_its_plans_show_every_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "_PRESETS", dict(registry._PRESETS))  # the page's preset ends with the test
    exec(compile("\n".join((SETUP, *EXTENSIONS)), str(PAGE), "exec", dont_inherit=True), {"__name__": "extending"})
    printed = capsys.readouterr().out
    plans = printed.split("plan: lane")[1:]
    for plan, module in zip(
        plans,
        ("of Binomial", "MeanCurvature()", "conjugate residuals", "Largest(every=5", "damping: geometric (0.7)",
         "signed_root", "conjugate residuals"),
        strict=True,
    ):  # fmt: skip
        assert module in plan and "step, on average" in plan
    assert "Gauss-Newton by conjugate residuals." in printed
