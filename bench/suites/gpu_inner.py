"""Memory and launches of one inner gradient of layerwise Gauss-Newton at 45M parameters, compiled for an H200.

Part of the suite `gpu_compile`. The model is the paper's: 32 sequences of 1,024 tokens, a vocabulary of 32,000.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from examples.language_model import model

from bench.suites.layerwise.setting import PAPER
from curvax.curvature import Evaluation
from curvax.layerwise import ByGroup, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy

CASE = "inner gradient, language model 45M"
PLAIN = "plain gradient, all logits"
X = f"{PAPER.part * PAPER.shape.length} tokens"
Function = Callable[..., Any]


def programs() -> Iterator[tuple[str, Function, tuple[Any, ...]]]:
    """(provider, function, its shapes), the plain gradient first."""
    shape = PAPER.shape
    params = jax.eval_shape(lambda key: model.init(key, shape), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((PAPER.part, shape.length), jnp.int32)
    batch = {"x": tokens, "y": tokens}
    yield PLAIN, jax.grad(PAPER.loss_fn()), (params, batch)
    logits = {"predict_fn": functools.partial(model.predict, heads=shape.heads)}
    for outputs, text in ((logits, "all logits"), (model.outputs(shape), "head=")):
        yield f"full_gn, {text}", _gradient(outputs, None), (params, params, batch)
        yield f"layerwise_gn, {text}", _gradient(outputs, 1), (params, params, batch)
    yield "layerwise_gn, head=, 4 shares", _gradient(model.outputs(shape), 4), (params, params, batch)


def _gradient(outputs: dict[str, Function], shares: int | None) -> Function:
    """The inner gradient; full without shares."""
    options: dict[str, Any] = {
        **outputs, "loss": SoftmaxCrossEntropy(), "inner": optax.sgd(1.0), "inner_steps": 1, "line_search": None,
    }  # fmt: skip
    blocks = ByGroup(split=("layers",))
    method = full_gn(**options) if shares is None else layerwise_gn(partition=blocks, shares=shares, **options)
    return lambda params, delta, batch: method.problem.gradient(params, delta, Evaluation(batch))[1]
