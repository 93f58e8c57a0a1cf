"""Sharpness as a metric: the largest eigenvalue of the step's curvature, at its cadence and inside of the step."""

from __future__ import annotations

import jax

from curvax.curvature import Needs
from curvax.execute.branch import when
from curvax.execute.context import Point, StepContext
from curvax.operators.spectra import largest_eigenvalue
from curvax.telemetry import Metric


def sharpness_of(ctx: StepContext, point: Point) -> jax.Array:
    """By products of a linearization of its own, which lives in the steps that are due alone."""
    missing = Metric.SHARPNESS.missing()

    def largest() -> jax.Array:
        needs = Needs(product=True, shared=ctx.plan.needs.shared)
        product = ctx.assembly.curvature.linearize(ctx.params, ctx.problem.curvature_batch, needs).product
        if product is None:
            raise AssertionError("a linearization asked for products has them.")
        return largest_eigenvalue(product, point.gradient).astype(missing.dtype)

    return when(ctx.plan.sharpness, ctx.state.step, ctx.plan.mode, largest, lambda: missing)
