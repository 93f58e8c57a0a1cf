"""One table of all presets, each built for any test model: what a test runs over when it concerns every method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import curvax
from tests.oracle.models import Model


def loss_function(predict: Callable[..., jax.Array], kind: str) -> Callable[[Any, Any], jax.Array]:
    """`loss_fn(params, batch)`: mean cross entropy or half the mean squared error, in at least float32."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        outputs = predict(params, batch["x"])
        outputs = outputs.astype(jnp.float32) if outputs.dtype == jnp.bfloat16 else outputs
        targets = batch["y"]
        if kind == "mse":
            residual = outputs - targets.astype(outputs.dtype)
            positions = max(outputs.size // (outputs.shape[-1] if outputs.ndim > 1 else 1), 1)
            return jnp.asarray(0.5 / positions, outputs.dtype) * jnp.sum(residual * residual)
        log_p = jax.nn.log_softmax(outputs)
        if jnp.issubdtype(targets.dtype, jnp.integer):
            return -jnp.mean(jnp.take_along_axis(log_p, targets[..., None], -1))
        return -jnp.mean(jnp.sum(targets.astype(log_p.dtype) * log_p, -1))

    return loss_fn


@dataclass(frozen=True)
class Preset:
    """A preset and what it is made from.

    Attributes:
        name: its public name.
        kind: "ce" or "mse", the loss it is tried with.
        takes: "predict_fn", "loss_fn", or "loss" (predict_fn and a loss object).
        damped: it solves a damped system and takes `lam0`.
    """

    name: str
    kind: str
    takes: str
    damped: bool

    def __str__(self) -> str:
        return self.name

    def make(self, predict: Callable[..., jax.Array] | Model, **options: Any) -> Any:
        """The method for a model function, or a test model's own."""
        function = predict.predict if isinstance(predict, Model) else predict
        factory = getattr(curvax, self.name)
        if self.takes == "loss_fn":
            return factory(loss_fn=loss_function(function, self.kind), **options)
        if self.takes == "loss":
            loss = curvax.losses.SoftmaxCrossEntropy() if self.kind == "ce" else curvax.losses.SquaredError()
            return factory(predict_fn=function, loss=loss, **options)
        return factory(predict_fn=function, **options)


TABLE = (
    Preset("sgn_ce", "ce", "predict_fn", True),
    Preset("sgn_mse", "mse", "predict_fn", True),
    Preset("egn_ce", "ce", "predict_fn", True),
    Preset("egn_mse", "mse", "predict_fn", True),
    Preset("egn_mse_cg", "mse", "predict_fn", True),
    Preset("ggn_direct_ce", "ce", "predict_fn", True),
    Preset("ggn_direct_mse", "mse", "predict_fn", True),
    Preset("newton_cg", "ce", "loss_fn", True),
    Preset("newton_direct", "mse", "loss_fn", True),
    Preset("adahessian", "mse", "loss_fn", False),
    Preset("sophia_h", "ce", "loss_fn", False),
    Preset("sophia_g", "ce", "predict_fn", False),
    Preset("sgn", "ce", "loss", True),
    Preset("egn", "ce", "loss", True),
    Preset("spring", "mse", "loss", True),
    Preset("gauss_newton", "ce", "loss", True),
)
DAMPED = tuple(p for p in TABLE if p.damped)
BY_NAME = {p.name: p for p in TABLE}
DISTINCT = tuple(p for p in TABLE if p.name not in ("sgn", "egn", "sgn_mse", "egn_mse", "ggn_direct_ce", "sophia_h"))
"""Presets that run code of their own; the rest differs in a loss or an estimator only."""
ONE_PER_LANE = tuple(
    BY_NAME[name] for name in ("sgn_ce", "egn_ce", "egn_mse_cg", "newton_cg", "sophia_g", "adahessian")
)
