"""What `head=` brings: memory and time of one inner gradient of a language model, with all logits and with a head."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from examples.language_model import model

from bench import run
from bench.schema import Row
from curvax.curvature import Evaluation
from curvax.layerwise import ByGroup, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy

_LOGITS, _HEAD = "all logits", "head="
_SIZE = model.Size(width=128, layers=2, heads=4, length=256, vocabulary=32_000)
_MIB = 2**20
# Both do the same operations: blocks of rows should not cost time, and one block of logits is the memory.
_TIME_GOAL, _MEMORY_GOAL = 1.1, 0.4


def cases(suite: str, quick: bool, only: str) -> Iterator[list[Row]]:
    """Full and layerwise, on 8 sequences of 256 tokens, 2,048 rows of 32,000 logits.

    Args:
      suite: the rows' suite.
      quick: a smaller vocabulary, few rounds.
      only: text in the case's name.
    """
    size = dataclasses.replace(_SIZE, vocabulary=8192) if quick else _SIZE
    for name in ("full_gn", "layerwise_gn"):
        case = f"{name}, head of {size.vocabulary} words, one inner gradient"
        if only in case:
            yield _rows(suite, case, name, size, 2 if quick else 7)


def _rows(suite: str, case: str, name: str, size: model.Size, rounds: int) -> list[Row]:
    sequences = 8
    params = model.init(jax.random.key(0), size)
    tokens = jax.random.randint(jax.random.key(1), (2, sequences, size.length), 0, size.vocabulary)
    batch, delta = {"x": tokens[0], "y": tokens[1]}, jax.tree.map(lambda p: 0.01 * p, params)
    steps = {}
    for provider, predict in ((_LOGITS, {"predict_fn": model.predict}), (_HEAD, _headed())):
        gradient = _gradient(name, predict)
        steps[provider] = jax.jit(gradient, donate_argnums=1).lower(params, delta, batch).compile()

    def candidate(provider: str) -> run.Candidate:
        return run.Candidate(
            provider,
            lambda d: steps[provider](params, d, batch),
            lambda: jax.tree.map(jnp.copy, delta),
            baseline=None if provider == _LOGITS else _LOGITS,
            goal=None if provider == _LOGITS else _TIME_GOAL,
        )

    x = f"{sequences * size.length} tokens, width {size.width}"
    results = run.rows(suite, case, x, run.time_all([candidate(p) for p in steps], rounds), metric="ms/gradient")
    first = _bytes(steps[_LOGITS]) / _MIB
    for provider, step in steps.items():
        value, base = _bytes(step) / _MIB, None if provider == _LOGITS else _LOGITS
        ratio, goal = (None, None) if base is None else (value / first, _MEMORY_GOAL)
        results.append(Row(suite, case, provider, "MiB temp", x, value, value, value, ratio, base, goal))
    return results


def _headed() -> dict[str, Callable[..., Any]]:
    return {"predict_fn": model.hidden, "head": model.head}


def _gradient(name: str, outputs: dict[str, Callable[..., Any]]) -> Callable[[Any, Any, Any], Any]:
    options: dict[str, Any] = {
        **outputs, "loss": SoftmaxCrossEntropy(), "inner": optax.sgd(1.0), "inner_steps": 1, "line_search": None,
    }  # fmt: skip
    method = layerwise_gn(partition=ByGroup(("layers",)), **options) if name == "layerwise_gn" else full_gn(**options)
    return lambda params, delta, batch: method.problem.gradient(params, delta, Evaluation(batch))[1]


def _bytes(step: Any) -> int:
    results = step.memory_analysis()
    if results is None:
        raise RuntimeError("this backend does not say how much memory a program takes: run on a CPU or GPU.")
    return results.temp_size_in_bytes
