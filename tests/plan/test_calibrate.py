"""Calibration: rates of this machine, where they are stored, and that plans follow them."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator

import jax.numpy as jnp
import pytest

import curvax
from curvax import calibrate, cli
from curvax.plan import Plan, machine


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """An empty folder of calibrations."""
    monkeypatch.setenv("CURVAX_CALIBRATION", str(tmp_path / "rates"))
    yield tmp_path / "rates"
    machine._stored.cache_clear()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work of a moment in place of that of a minute."""
    for name, value in {"_STREAM": 2**16, "_NEAR": 2**12, "_SIZES": (2**12, 2**14), "_LAUNCHES": 40}.items():
        monkeypatch.setattr(calibrate, name, value)
    monkeypatch.setattr(calibrate, "_PRODUCTS", ((8, 16, 16),))
    monkeypatch.setattr(calibrate, "_FACTORIZED", (16, 48))
    seconds = calibrate._seconds
    monkeypatch.setattr(calibrate, "_seconds", lambda work, *args, budget=0.0: seconds(work, *args, budget=0.0))


def test_the_command_measures_each_rate_stores_them_and_plans_follow(folder, small, capsys):
    assert machine.machine() is machine.uncalibrated()
    assert cli.main(["calibrate", "--dry-run"]) == 0
    assert "nothing stored" in capsys.readouterr().out and not folder.exists()
    assert cli.main(["calibrate"]) == 0
    (path,) = folder.iterdir()
    assert str(path) in capsys.readouterr().out
    rates = machine.machine()
    assert "calibrated" in rates.name and json.loads(path.read_text()) == dataclasses.asdict(rates)
    for name, value in dataclasses.asdict(rates).items():
        assert name == "name" or (math.isfinite(value) and value > 0), name
    assert rates.narrowing >= 1 and rates.cached >= rates.bandwidth


def test_a_plan_names_the_calibration_and_predicts_from_it(folder):
    def planned() -> Plan:
        params, batch = {"w": jnp.zeros((7, 3))}, {"x": jnp.zeros((5, 7)), "y": jnp.zeros((5, 3))}
        method = curvax.gauss_newton(predict_fn=lambda p, x: x @ p["w"], loss=curvax.losses.SquaredError())
        return method.plan_for(params, batch)

    before = planned()
    cpu = machine.CPU
    slow = {name: getattr(cpu, name) / 100 for name in ("flops", "convolution", "bandwidth", "cached", "factorization")}
    machine.store(dataclasses.replace(cpu, name="a slow one", launch=100 * cpu.launch, **slow))
    after = planned()
    assert "a slow one" in after.explain() and "a slow one" not in before.explain()
    for fast, slower in zip(before.candidates, after.candidates, strict=True):
        assert 50 * fast.seconds < slower.seconds < 150 * fast.seconds


RATES = dataclasses.asdict(machine.CPU)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"name": "x"}', json.dumps(RATES | {"flops": -1.0}), json.dumps(RATES | {"flops": "fast"})],
    ids=["empty", "nothing", "a list", "a name", "a negative rate", "a word for a rate"],
)
def test_a_calibration_that_cannot_be_read_is_an_error_with_its_mend(folder, text):
    machine.store(machine.CPU).write_text(text)
    with pytest.raises(ValueError, match="run `curvax calibrate` again"):
        machine.machine()


def test_two_sizes_give_rate_and_half_size_back(monkeypatch):
    rate, half = 2e11, 30.0
    small, large = 16, 64
    monkeypatch.setattr(calibrate, "_FACTORIZED", (small, large))
    times = iter([n**3 / 3 / rate * (1 + half / n) for n in (small, large)])
    monkeypatch.setattr(calibrate, "_seconds", lambda work, *arguments: next(times))
    assert calibrate._factorization() == pytest.approx((rate, half))
