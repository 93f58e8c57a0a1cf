"""Every example, run as a user runs it, on few steps: what it prints and writes is checked against bounds."""

from __future__ import annotations

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
        # On models this small the compiler's optimizations take longer than they save.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def last(pattern: str, text: str) -> float:
    """The number in the last match."""
    found = re.findall(pattern, text, flags=re.MULTILINE)
    assert found, f"{pattern!r} is not in:\n{text}"
    return float(found[-1])


def test_the_demo_on_physics_at_a_tiny_size(tmp_path):
    text = run("demo_pinn.py", "gauss_newton", "Adam", "--seconds", "1", cwd=tmp_path)
    errors = {name: last(rf"^{name} .*?(\d\.\de[+-]\d\d)", text) for name in ("gauss_newton", "Adam")}
    assert errors["gauss_newton"] < 1, errors  # a second, on however busy a machine, is no time to compare
    assert "What you see: after 1 s the error of gauss_newton, untuned, is" in text
    assert (tmp_path / "demo_pinn.png").read_bytes().startswith(b"\x89PNG")


def test_the_demo_on_digits_at_a_tiny_size(tmp_path):
    names = ("gauss_newton", "AdamW")
    text = run("digits.py", *names, "--steps", "60", "--batch", "32", "--picture", "out/digits.png", cwd=tmp_path)
    for name in names:
        assert last(rf"^{name} .*?(\d\d\.\d\d)%", text) > 85, name
    assert "s to 95%" in text and "What you see: " in text
    assert (tmp_path / "out" / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / ".gitignore").read_text() == "*\n"


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
