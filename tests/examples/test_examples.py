"""Every example, run as a user runs it, on few steps: what it prints and writes is checked against bounds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """Standard output of an example that ends well."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def last(pattern: str, text: str) -> float:
    """The number in the last match."""
    found = re.findall(pattern, text)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[-1])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("digits")
    return folder / "out", run("digits.py", "--quick", cwd=folder)


METHODS = ("gauss_newton", "sgn_ce", "egn_ce", "sophia_g", "adamw")


def test_digits_learn(digits):
    content = json.loads((digits[0] / "digits.json").read_text())
    curves = {curve["name"]: curve for curve in content["curves"]}
    assert set(curves) == set(METHODS)
    for name, curve in curves.items():
        assert max(curve["accuracy"]) > 0.85, f"{name} reaches {max(curve['accuracy']):.2%}"
        assert curve["test_loss"][-1] < curve["test_loss"][0] / 3
        assert curve["compile_seconds"] > 0 and curve["seconds"][-1] > 0
        assert curve["steps"] == sorted(curve["steps"]) and curve["steps"][-1] == content["config"]["steps"]


def test_digits_start_alike_and_exact_and_iterative_solve_agree(digits):
    content = json.loads((digits[0] / "digits.json").read_text())
    curves = {curve["name"]: curve for curve in content["curves"]}
    assert len({(curve["train_loss"][0], curve["test_loss"][0]) for curve in curves.values()}) == 1
    early = slice(1, 3)
    assert curves["sgn_ce"]["train_loss"][early] == pytest.approx(curves["egn_ce"]["train_loss"][early], rel=0.02)


def test_digits_write_a_picture_and_versions(digits):
    folder, _ = digits
    assert (folder / "digits.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((folder / "digits.json").read_text())
    assert {"python", "curvax", "jax", "jaxlib", "optax", "numpy"} <= set(content["versions"])
    assert set(content["config"]["settings"]) == set(METHODS)
    assert (folder / ".gitignore").read_text() == "*\n"


def test_digits_print_plans_progress_and_table(digits):
    text = digits[1]
    assert text.count("plan: lane") == 4
    assert "plan: lane row" in text and "plan: lane diag" in text and "plan: lane param" in text
    assert re.search(r"adamw\s+step   60 of 60\s+test loss \d\.\d+\s+accuracy \d\d\.\d\d%", text)
    for name in METHODS:
        assert re.search(rf"│ {name}\s+│", text), f"{name} is not in the table"


def test_digits_refuse_an_unknown_method():
    done = subprocess.run([sys.executable, str(EXAMPLES / "digits.py"), "sgd"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "there is no method 'sgd'" in done.stderr


def test_poisson_reaches_what_adam_does_not():
    text = run("pinn_poisson.py", "--steps", "150")
    errors = {name: last(rf"{name}\s+step .* error (\S+)", text) for name in ("egn", "spring", "adam")}
    assert errors["egn"] < 2e-6, errors
    assert errors["spring"] < 2e-6, errors
    assert errors["adam"] > 3 * errors["egn"], errors


def test_flax_model_with_batch_norm_and_dropout():
    text = run("flax_nnx.py", "--steps", "40")
    assert last(r"test accuracy (\S+)%", text) > 93


def test_equinox_model_with_a_frozen_layer():
    text = run("equinox_model.py", "--steps", "60")
    assert text.startswith("plan: lane")
    assert last(r"mean square error (\S+)", text) < 0.05
    assert "the frozen frequencies are what they were" in text


def test_optax_chain():
    text = run("optax_chain.py", "--steps", "100")
    start = last(r"start: loss (\S+)", text)
    for name in ("scale_by_ggn", r"MultiSteps\(sgn_ce\)", "adam"):
        assert last(rf"{name}\s+batch +\d+ +loss (\S+)", text) < 0.8 * start, name


def test_language_model_improves_on_its_checkpoint():
    arguments = ("--size", "tiny", "--checkpoint-steps", "10", "--steps", "2", "--parts", "4", "--inner-batch", "4")
    text = run("language_model/train.py", *arguments)
    assert "layers/1" in text and "line search" in text
    start = last(r"checkpoint after 10 AdamW steps: test loss (\S+)", text)
    assert last(r"step +2  test loss (\S+)", text) < start


def test_fashion_without_data_says_where_to_get_it(tmp_path):
    text = run("fashion_mnist.py", "--data", str(tmp_path))
    assert text.count("\n") == 1
    assert "apt-get install dataset-fashion-mnist" in text


@pytest.mark.skipif(
    not Path("/usr/share/datasets/fashion-mnist").exists(), reason="the package dataset-fashion-mnist is not installed"
)
def test_fashion_learns():
    text = run("fashion_mnist.py", "--steps", "16")
    assert last(r"sgn_ce\s+step .* accuracy (\S+)%", text) > 60
    assert last(r"adamw\s+step .* accuracy (\S+)%", text) > 60
