"""A plan as a drawing says what `explain` says."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import jax
import jax.numpy as jnp
import pytest

import curvax
from curvax.damping import TrustRegion
from curvax.layerwise import ByLeaf
from curvax.losses import SoftmaxCrossEntropy
from curvax.plan.drawing import STEPS
from curvax.plan.plan import flops_text
from curvax.telemetry import Metric, MetricRecord, Telemetry

pytestmark = pytest.mark.fast
SVG = "{http://www.w3.org/2000/svg}"
PARAMS = {"w": jax.ShapeDtypeStruct((5, 8), jnp.float32), "v": jax.ShapeDtypeStruct((8, 3), jnp.float32)}
BATCH = {"x": jax.ShapeDtypeStruct((16, 5), jnp.float32), "y": jax.ShapeDtypeStruct((16,), jnp.int32)}


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return jnp.tanh(x @ params["w"]) @ params["v"]


def _words(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def _hints(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter(f"{SVG}title")]


def test_parts_are_drawn_at_the_steps_where_they_are_due() -> None:
    method = curvax.assemble(
        curvature=curvax.curvature.GaussNewton(curvax.curvature.Model(predict), SoftmaxCrossEntropy()),
        solver=curvax.solvers.CG(maxiter=3),
        preconditioner=curvax.preconditioners.Jacobi(curvax.estimators.Hutchinson(), every=10),
        damping=TrustRegion(every=5),
        telemetry=Telemetry((MetricRecord(Metric.RHO, every=3),)),
    )
    plan = method.plan_for(PARAMS, BATCH)
    hints = _hints(plan.to_svg())
    due = {
        part: [t for t in range(STEPS) if f"{part}, step {t}" in hints]
        for part in ("refresh", "loss after the step", "solve", "gradient")
    }
    assert due["refresh"] == [0, 10]
    assert due["loss after the step"] == [t for t in range(STEPS) if t % 3 == 0 or t % 5 == 0]
    assert due["solve"] == due["gradient"] == list(range(STEPS))
    explained, words = plan.explain(), _words(plan.to_svg())
    assert words[1].startswith(f"{flops_text(plan.cost.flops)} and ")
    assert {choice.op for choice in plan.choices} <= set(words)
    assert words[0] == explained.splitlines()[0]


def test_candidates_are_drawn_with_their_times() -> None:
    plan = curvax.gauss_newton(predict_fn=predict, loss=SoftmaxCrossEntropy()).plan_for(PARAMS, BATCH)
    root = ElementTree.fromstring(plan.to_svg())
    bold = [t.text for t in root.iter(f"{SVG}text") if t.get("font-weight") == "600" and t.get("font-size") is None]
    assert bold == [plan.candidates[plan.solver_index or 0].solver.name]
    assert {c.solver.name for c in plan.candidates} <= set(_words(plan.to_svg()))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for element in root.iter(f"{SVG}rect"):
        x, y, w, h = (float(element.get(key, 0)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height


def test_a_plan_without_shapes_is_drawn_too() -> None:
    plan = curvax.sgn_ce(predict_fn=predict, lam0=0.1).plan
    assert "costs need shapes: plan_for" in _words(plan.to_svg())


def test_inner_loops_have_blocks() -> None:
    method = curvax.layerwise_gn(
        predict_fn=predict,
        loss=SoftmaxCrossEntropy(),
        inner=curvax.optimizers.muon_adamw(0.1, others=("v",)),
        inner_steps=3,
        partition=ByLeaf(),
    )
    words = _words(method.plan_for(PARAMS, BATCH).to_svg())
    assert {"24", "40", "line search", "next inner loop", "parameters"} <= set(words)


def test_notebooks_show_the_drawing_and_the_text() -> None:
    plan = curvax.sgn_ce(predict_fn=predict, lam0=0.1).plan_for(PARAMS, BATCH)
    assert plan._repr_svg_() == plan.to_svg()
    shown = plan._repr_html_()
    assert plan.to_svg() in shown and "<pre>plan: lane param" in shown and "<lambda>" not in shown
