"""The command line: what each command prints, and with which code it ends."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import pathlib
import subprocess
import sys

import jax
import pytest

import curvax
from curvax import cli, ffi, kernels, methods

ROOT = pathlib.Path(__file__).parents[2]
PRESETS = tuple(methods.list_methods())


def usage_error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a usage error prints, checked to be exit code 2 and one sentence in its last line."""
    try:
        code = cli.main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("curvax")
    return line


@pytest.mark.fast
def test_methods_lists_every_preset_on_a_line(capsys):
    assert cli.main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name, description in methods.list_methods().items():
        assert any(line.startswith(name) and line.endswith(description) for line in lines)


@pytest.mark.parametrize("name", PRESETS)
def test_methods_shows_each_keyword_with_default_and_text(capsys, name):
    assert cli.main(["methods", name]) == 0
    text = capsys.readouterr().out
    info = curvax.describe(name)
    assert info.description in text and info.doc in text
    for word, parameter in info.signature.parameters.items():
        line = next(line for line in text.splitlines() if line.split("=")[0].split(" (")[0] == f"  {word}")
        if parameter.default is parameter.empty:
            assert "(required)" in line
        else:
            assert f"{word}={parameter.default!r}" in line
    assert "relative residual at which CG stops" in text or "tol" not in info.signature.parameters


@pytest.mark.parametrize("command", [["curvax", "methods"], ["curvax", "methods", "sgn_ce"], ["bench.summary"]])
def test_a_reader_that_stops_reading_is_no_error(command, tmp_path):
    """As in `curvax doctor | head -1`; the pipe is closed before anything is written."""
    if command[0] == "bench.summary":
        pytest.importorskip("bench", reason="the benchmarks are in the source checkout")
        command = [*command, str(tmp_path)]
    child = subprocess.Popen(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    said = child.stderr.read()
    child.stderr.close()
    assert child.wait(timeout=120) == 141 and said == ""


def test_unknown_preset_names_the_nearest(capsys):
    assert "Did you mean 'sgn_ce'?" in usage_error(capsys, "methods", "sgnce")
    assert "Did you mean 'egn_mse'?" in usage_error(capsys, "plan", "egnmse")


@pytest.mark.parametrize("name", PRESETS)
def test_plan_of_every_preset(capsys, name):
    assert cli.main(["plan", name, "--batch", "8", "--widths", "5,6", "--classes", "3"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    # A wave function has one output.
    network = "5-6-1 network (43 parameters)" if name == "vmc" else "5-6-3 network (57 parameters)"
    assert first == f"{name} on a {network}, batch 8"
    assert rest[0].startswith("plan: lane")
    assert any("step, on average" in line for line in rest), "no cost"


@pytest.mark.fast
def test_plan_follows_options(capsys):
    options = ["--option", "maxiter=7", "--option", "lam_policy=trust_region", "--option", "lam_kwargs={'every': 5}"]
    assert cli.main(["plan", "sgn_ce", *options]) == 0
    text = capsys.readouterr().out
    assert "at most 7 iterations" in text
    assert "every 5 steps" in text


def test_plan_follows_the_shapes(capsys):
    lanes = {}
    for batch, widths in ((2, "64,64"), (256, "4")):
        assert cli.main(["plan", "gauss_newton", "--batch", str(batch), "--widths", widths, "--classes", "2"]) == 0
        lanes[batch] = capsys.readouterr().out.splitlines()[1]
    assert lanes[2] != lanes[256]


def test_plan_shows_why_a_backend_is_not_taken(capsys):
    assert cli.main(["plan", "sgn_ce", "--backend", "triton"]) == 0
    captured = capsys.readouterr()
    assert "fell back: dots has no triton implementation" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--option", "lamo=3"], "Did you mean 'lam0'?"),
        (["--option", "lam0"], "KEY=VALUE"),
        (["--option", "lam0=-1"], "lam0 must be at least 0"),
        (["--option", "predict_fn=f"], "predict_fn belongs to the built-in network"),
        (["--option", "plan=on"], 'plan must be "shared" or "off"'),
        (["--batch", "0"], "not a whole number above 0"),
        (["--widths", "8,"], "not a whole number above 0"),
        (["--backend", "cuda"], "invalid choice"),
        (["--frob"], "unrecognized arguments: --frob"),
    ],
)
def test_plan_usage_errors(capsys, arguments, sentence):
    assert sentence in usage_error(capsys, "plan", "sgn_ce", *arguments)


@pytest.mark.parametrize(
    ("setup", "sentence"),
    [
        ("train.setup", "diagnose takes MODULE:FUNCTION, such as train:setup"),
        ("nowhere_at_all:setup", "No module named 'nowhere_at_all'"),
        ("json:setup", "module 'json' has no attribute 'setup'"),
        ("os:getcwd", "must return (predict_fn, loss, params, data), not a str"),
    ],
)
def test_diagnose_usage_errors(capsys, setup, sentence):
    assert sentence in usage_error(capsys, "diagnose", setup)


def test_doctor_calls_every_implementation(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert f"jax       {jax.__version__}" in text
    assert "nothing is broken" in text and "BROKEN" not in text
    assert f"{jax.devices()[0].platform}:0" in text
    for op in cli._ops():
        for variant in op.variants:
            lines = [line for line in text.splitlines() if line.split()[:2] == [op.name, variant.name]]
            assert len(lines) == 1, f"{op.name} {variant.name}"
    if ffi.native_status().available:
        assert text.count("agrees with the reference") >= 3


def test_doctor_has_a_call_for_every_op():
    assert {op.name for op in cli._ops()} == {check.op.name for check in cli._CHECKS}


def test_doctor_reports_a_native_module_that_cannot_be_imported(capsys, monkeypatch):
    def broken(platform: ffi.Platform = "cpu") -> ffi.Status:
        raise ImportError("curvax._native_cpu is installed but cannot be imported (a symbol is missing)")

    monkeypatch.setattr(ffi, "native_status", broken)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "BROKEN" in text and "a symbol is missing" in text
    assert "cg_update reference works" in " ".join(text.split())


def test_doctor_takes_an_absent_native_module_for_healthy(capsys, monkeypatch):
    monkeypatch.setattr(ffi, "native_status", lambda platform="cpu": ffi.Status(False, "it is not installed"))
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "absent  it is not installed" in text


def test_doctor_notices_wrong_numbers(capsys, monkeypatch):
    def skewed(name: kernels.Implementation) -> list[jax.Array]:
        return [jax.numpy.asarray(1.0 if name == "reference" else 1.1)]

    wrong = dataclasses.replace(cli._CHECKS[-1], call=skewed, op=_always(cli._CHECKS[-1].op))
    monkeypatch.setattr(cli, "_CHECKS", (*cli._CHECKS[:-1], wrong))
    assert cli.main(["doctor"]) == 1
    assert "does not agree with the reference" in capsys.readouterr().out


def _always(op: kernels.Op) -> kernels.Op:
    """The op with variants that have no objection."""
    return dataclasses.replace(op, variants=tuple(kernels.Variant(v.name) for v in op.variants))


def test_doctor_warns_outside_the_tested_range(capsys, monkeypatch):
    real = importlib.metadata.version
    fake = {"jax": "0.99.0", "optax": "0.1.0"}
    monkeypatch.setattr(importlib.metadata, "version", lambda name: fake.get(name) or real(name))
    cli.main(["doctor"])
    text = capsys.readouterr().out
    assert "jax       0.99.0       WARNING: curvax is tested with" in text
    if cli._requirements():
        assert "optax     0.1.0        WARNING: curvax is tested with 0.2.8 and newer: upgrade." in text


def test_bench_outside_of_a_checkout_says_where_it_lives(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert "bench/ of curvax's source checkout" in usage_error(capsys, "bench")


def test_bench_passes_arguments_and_exit_code_on(monkeypatch, tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "__main__.py").write_text("import sys; sys.exit(len(sys.argv))\n")
    (tmp_path / "pyproject.toml").write_text('name = "curvax"\n')
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path / "below")
    assert cli.main(["bench", "steps", "--quick"]) == 3


def test_no_command_and_an_unknown_one(capsys):
    assert "COMMAND" in usage_error(capsys)
    assert "invalid choice: 'frob'" in usage_error(capsys, "frob")


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "curvax", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"curvax {curvax.__version__}\n")
