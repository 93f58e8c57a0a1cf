"""The methods of the table, on one small network that every layout divides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import curvax
from curvax.layerwise import ByLeaf, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy

EXAMPLES, CLASSES = 32, 8
_LOSS = SoftmaxCrossEntropy()
Params = dict[str, jax.Array]


def predict(params: Params, x: jax.Array) -> jax.Array:
    """A network of two layers."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"]


def cross_entropy(params: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """Its loss, for methods that take a function."""
    logits = jax.nn.log_softmax(predict(params, batch["x"]))
    return -jnp.mean(jnp.sum(jax.nn.one_hot(batch["y"], CLASSES, dtype=logits.dtype) * logits, axis=-1))


def problem(squares: bool) -> tuple[Params, dict[str, jax.Array]]:
    """Parameters and a batch, of labels or of numbers, in the widest dtype."""
    k1, k2, k3, k4 = jax.random.split(jax.random.key(0), 4)
    params = {"w1": jax.random.normal(k1, (6, 16)) / 2, "b1": jnp.zeros(16), "w2": jax.random.normal(k2, (16, 8)) / 4}
    x = jax.random.normal(k3, (EXAMPLES, 6))
    y = jax.random.normal(k4, (EXAMPLES, CLASSES)) if squares else jax.random.randint(k4, (EXAMPLES,), 0, CLASSES)
    return params, {"x": x, "y": y}


def _model(preset: Callable[..., Any], *, squares: bool = False, **options: Any) -> Callable[..., Any]:
    loss = {} if squares or preset.__name__.endswith("_ce") else {"loss": _LOSS}
    return lambda **more: preset(predict_fn=predict, **loss, **options, **more)


def _function(preset: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **more: preset(loss_fn=cross_entropy, **options, **more)


def _inner(preset: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda: preset(predict_fn=predict, loss=_LOSS, inner_steps=3, inner=optax.adam(1e-2), **options)


METHODS: dict[str, Callable[..., Any]] = {
    "gauss_newton": _model(curvax.gauss_newton),
    "sgn_ce": _model(curvax.sgn_ce),
    "egn_ce": _model(curvax.egn_ce),
    "egn_mse_cg": _model(curvax.egn_mse_cg, squares=True, lam0=0.1, tol=1e-12),
    "spring": _model(curvax.spring),
    "ggn_direct_ce": _model(curvax.ggn_direct_ce),
    "newton_cg": _function(curvax.newton_cg),
    "newton_direct": _function(curvax.newton_direct),
    "sophia_g": _model(curvax.sophia_g),
    "sophia_h": _function(curvax.sophia_h),
    "adahessian": _function(curvax.adahessian),
    "kfac": _model(curvax.kfac),
    "ekfac": _model(curvax.ekfac),
    "full_gn": _inner(full_gn),
    "layerwise_gn": _inner(layerwise_gn, partition=ByLeaf()),
    "soap": lambda: curvax.optimizers.soap(1e-2, every=2),
    "shampoo": lambda: curvax.optimizers.shampoo(1e-2),
    "muon_adamw": lambda: curvax.optimizers.muon_adamw(1e-2, others=("w2",)),
}
"""Methods and Optax transformations by name; the presets take further keywords."""

PIECES = ("gauss_newton", "sgn_ce", "egn_ce", "sophia_g", "kfac", "ekfac")
"""Those that are tried in microbatches too."""
