"""With head=, every number is that of the same method on a model that returns logits, and all logits never exist."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracle.compiling import quick_jit

from curvax.curvature import Evaluation
from curvax.kernels import Request, clear_report, report
from curvax.kernels.linear_softmax_hvp import LINEAR_SOFTMAX_HVP
from curvax.kernels.linear_softmax_residual import LINEAR_SOFTMAX_RESIDUAL
from curvax.layerwise import ByGroup, ByLeaf, ConjugateGradients, LineSearch, full_gn, layerwise_gn
from curvax.losses import SigmoidBinaryCrossEntropy, SoftmaxCrossEntropy
from curvax.solvers import CG

VOCABULARY, WIDTH, LENGTH, EXAMPLES = 11, 4, 3, 5


def params(dtype: Any = jnp.float64) -> dict[str, Any]:
    k = jax.random.split(jax.random.key(0), 6)

    def layer(key: jax.Array) -> dict[str, jax.Array]:
        return {"w": 0.5 * jax.random.normal(key, (WIDTH, WIDTH), dtype), "b": jnp.full(WIDTH, 0.1, dtype)}

    return {
        "embed": jax.random.normal(k[0], (VOCABULARY, WIDTH), dtype),
        "layers": [layer(k[1]), layer(k[2])],
        "head": {
            "norm": jnp.ones(WIDTH, dtype),
            "w": jax.random.normal(k[3], (WIDTH, VOCABULARY), dtype),
            "bias": 0.1 * jax.random.normal(k[4], (VOCABULARY,), dtype),
        },
    }


def hidden(p: Any, tokens: jax.Array) -> jax.Array:
    x = p["embed"][tokens]
    for layer in p["layers"]:
        x = x + jnp.tanh(jnp.cumsum(x, axis=1) @ layer["w"] + layer["b"])
    return x * p["head"]["norm"]


HEADS = {
    "matrix": lambda p: p["head"]["w"],
    "bias": lambda p: (p["head"]["w"], p["head"]["bias"]),
    "tied": lambda p: p["embed"].T,
}


def logits_of(head: Any) -> Any:
    def predict(p: Any, tokens: jax.Array) -> jax.Array:
        found = head(p)
        matrix, bias = found if isinstance(found, tuple) else (found, 0.0)
        return hidden(p, tokens) @ matrix + bias

    return predict


def batch(parts: int, dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    k = jax.random.split(jax.random.key(7), 3)
    shape = (parts * EXAMPLES, LENGTH)
    mask = jax.random.bernoulli(k[2], 0.7, shape)
    labels = jax.random.randint(k[1], shape, 0, VOCABULARY)
    return {
        "x": jax.random.randint(k[0], shape, 0, VOCABULARY),
        "y": jnp.where(mask, labels, -100),
        "w": jnp.where(mask, 1.5, 0.0).astype(dtype),
    }


def pair(rule: Any = None, head: Any = HEADS["matrix"], **options: Any) -> tuple[Any, Any]:
    """The method with logits from predict_fn, and with a head."""
    options = {
        "loss": SoftmaxCrossEntropy(),
        "inner": optax.sgd(0.3, momentum=0.5),
        "inner_steps": 2,
        "weight_key": "w",
        "line_search": LineSearch(candidates=2, minibatches=2),
        **options,
    }
    make = full_gn if rule is None else layerwise_gn
    rules = {} if rule is None else {"partition": rule}
    plain = make(predict_fn=logits_of(head), **rules, **options)
    return plain, make(predict_fn=hidden, head=head, **rules, **options)


def same(got: Any, want: Any, tolerance: float = 1e-10) -> None:
    def one(a: Any, b: Any) -> None:
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)

    jax.tree.map(one, got, want)


LAYERS = ByGroup(split=("layers",))
# What each method has that the others have not.
CASES: dict[str, dict[str, Any]] = {
    "full": {},
    "full, tied, prox-linear": {"head": HEADS["tied"], "prox_linear": True},
    "full, bias, microbatches": {"head": HEADS["bias"], "microbatch_size": 2},
    "full, frozen matrix": {"frozen": lambda path, _: "head" in str(path)},
    "layers": {"rule": LAYERS, "clip_norm": 0.1},
    "layers, tied, prox-linear": {"rule": LAYERS, "head": HEADS["tied"], "prox_linear": True},
    "leaves, bias, microbatches": {"rule": ByLeaf(), "head": HEADS["bias"], "microbatch_size": 2},
    "layers, smoothed": {"rule": LAYERS, "loss": SoftmaxCrossEntropy(0.1, reduction="sum"), "inner": optax.sgd(0.01)},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_steps_are_those_with_logits(case: dict[str, Any], x64: None) -> None:
    plain, headed = pair(**case)
    p, data = params(), batch(plain.parts)
    found = []
    for method in (plain, headed):
        step = quick_jit(method.step)
        state = method.init(p)
        once, state, info = step(p, data, state)
        found.append(({k: v for k, v in info.items() if k != "step_size"}, once, state.offset))
        assert bool(info["accepted"]) and float(info["step_size"]) > 0
    same(found[1], found[0])
