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
from curvax.training import Evaluate


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
    print(f"{model.count(params):,} parameters, {corpus.train.size:,} bytes; curvax {curvax.__version__}")

    def first_order(rate: float) -> curvax.AbstractMethod:
        return curvax.first_order(optax.adamw(rate), predict_fn=predict, loss=SoftmaxCrossEntropy())

    def batches(sequences: int) -> Callable[[int], Any]:
        return lambda step: corpus.batch(rng, sequences, size.length)

    small, large = options.inner_batch, options.parts * options.inner_batch
    start = curvax.fit(first_order(3e-3), params, batches(small), options.checkpoint_steps, progress=False)
    print(f"checkpoint after {options.checkpoint_steps} AdamW steps: test loss {loss(start.params, held_out):.4f}")

    method = first_order(options.rate) if options.method == "adamw" else gauss_newton(options, size)
    print(method.plan_for(start.params, corpus.batch(rng, large, size.length)).explain())
    evaluate = Evaluate(lambda p: loss(p, held_out), every=1)
    history = curvax.fit(method, start.params, batches(large), options.steps, evaluate=evaluate).history
    for step, seconds, value in zip(*history.evaluations.values(), strict=True):
        size_text = (
            f"  step size {history['step_size'][step - 1]:.2f}" if step and "step_size" in history.columns else ""
        )
        print(f"step {step:>3}  test loss {value:.4f}{size_text}  {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
