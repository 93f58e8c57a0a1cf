"""A small language model by layerwise Gauss-Newton, from a short AdamW checkpoint on (arXiv 2510.09378).

    python examples/language_model/train.py                      # 0.3M parameters, layerwise Gauss-Newton
    python examples/language_model/train.py --method full_gn
    python examples/language_model/train.py --method adamw       # the same batches, one update each
    python examples/language_model/train.py --size 45M --parts 61 --inner-batch 32   # for a GPU

`python -m bench layerwise` compares the methods properly.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data
import jax
import model
import numpy as np
import optax

import curvax
from curvax.layerwise import ByGroup, LineSearch, full_gn, layerwise_gn
from curvax.losses import SoftmaxCrossEntropy
from curvax.optimizers import muon_adamw

Step = Callable[[Any, Any, Any], tuple[Any, Any, dict[str, Any]]]


def first_order(tx: optax.GradientTransformation, loss: Callable[..., jax.Array]) -> tuple[Callable[..., Any], Step]:
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, dict[str, Any]]:
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, {"loss": value}

    return tx.init, step


def gauss_newton(options: argparse.Namespace, size: model.Size) -> Any:
    """N inner minibatches and a share of the batch for the line search, as many parts as were asked for."""
    search = max(options.parts // 8, 1)
    arguments: dict[str, Any] = {
        **model.outputs(size),
        "loss": SoftmaxCrossEntropy(),
        "inner": muon_adamw(options.rate, others=model.OUTER),
        "inner_steps": options.parts - search,
        "line_search": LineSearch(minibatches=search, chunk=2),
        "clip_norm": 1.0,
    }
    if options.method == "full_gn":
        return full_gn(**arguments)
    return layerwise_gn(partition=ByGroup(split=("layers",)), **arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=model.SIZES, default="0.3M")
    parser.add_argument("--method", choices=("layerwise_gn", "full_gn", "adamw"), default="layerwise_gn")
    parser.add_argument("--steps", type=int, default=10, help="outer steps (10)")
    parser.add_argument("--parts", type=int, default=16, help="equal parts of a batch: inner minibatches, line search")
    parser.add_argument("--inner-batch", type=int, default=16, help="sequences of one part (16)")
    parser.add_argument("--checkpoint-steps", type=int, default=150, help="AdamW steps before (150)")
    parser.add_argument(
        "--rate", type=float, default=0.01, help="learning rate, of the inner optimizer if there is one"
    )
    parser.add_argument("--text", type=Path, help="a text file in the place of Python's documentation")
    options = parser.parse_args()

    size, corpus = model.SIZES[options.size], data.load(options.text)
    predict = functools.partial(model.predict, heads=size.heads)

    def loss(params: Any, batch: Any) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(predict(params, batch["x"]), batch["y"]).mean()

    params, rng = model.init(jax.random.key(0), size), np.random.default_rng(0)
    held_out = corpus.held_out(64, size.length)
    test_loss = jax.jit(loss)
    print(f"{model.count(params):,} parameters, {corpus.train.size:,} bytes; curvax {curvax.__version__}")

    init, step = first_order(optax.adamw(3e-3), loss)
    state, step = init(params), jax.jit(step)
    for _ in range(options.checkpoint_steps):
        params, state, _ = step(params, state, corpus.batch(rng, options.inner_batch, size.length))
    print(f"checkpoint after {options.checkpoint_steps} AdamW steps: test loss {test_loss(params, held_out):.4f}")

    if options.method == "adamw":
        init, step = first_order(optax.adamw(options.rate), loss)
    else:
        method = gauss_newton(options, size)
        example = corpus.batch(rng, options.parts * options.inner_batch, size.length)
        print(method.plan_for(params, example).explain())
        init, step = method.init, lambda p, s, b: method.step(p, b, s)
    state, step = init(params), jax.jit(step)
    for i in range(options.steps):
        batch = corpus.batch(rng, options.parts * options.inner_batch, size.length)
        begin = time.perf_counter()
        params, state, info = jax.block_until_ready(step(params, state, batch))
        spent = time.perf_counter() - begin
        size_text = f"  step size {float(info['step_size']):.2f}" if "step_size" in info else ""
        print(f"step {i + 1:>3}  test loss {test_loss(params, held_out):.4f}{size_text}  {spent:.2f} s", flush=True)


if __name__ == "__main__":
    main()
