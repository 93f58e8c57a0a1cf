"""A small network on handwritten digits, from the same start on the same batches: test accuracy against time.

    python examples/digits.py            # trains, prints a table, writes digits.png
    python examples/digits.py --tune     # how the settings of AdamW and SOAP were chosen

curvax's presets run at their defaults; AdamW and SOAP are tuned on a part of the training set. The data are the 1,797
digits of 8 x 8 pixels that scikit-learn brings along: nothing is downloaded. The network is so small and the data so
easy that a step of AdamW takes a tenth of a millisecond; what curvax saves here is tuning and steps, not seconds.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import Words, draw_race, seconds_to, table_of_race
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvax
from curvax.optimizers import soap
from curvax.training import Evaluate, FitResult, Minibatches, Progress

Params = list[dict[str, jax.Array]]
WIDTHS = (64, 48, 10)
GOALS = (0.95, 0.97)
LOSS = curvax.losses.SoftmaxCrossEntropy()
RATES, DECAYS, SEEDS_OF_TUNING = (3e-3, 1e-2, 3e-2, 1e-1), (1e-2, 1e-1, 3e-1), (1, 2, 3)


class Split(NamedTuple):
    """Images (N, 64) in [0, 1] and labels (N,), for training and for testing."""

    train_x: np.ndarray
    test_x: np.ndarray
    train_y: np.ndarray
    test_y: np.ndarray


def load(*, tuning: bool) -> Split:
    """1347 digits to train and 450 to test; for tuning, 1047 and 300 out of those 1347."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.float32) / 16, np.asarray(classes, np.int32)
    split = Split(*train_test_split(images, labels, test_size=450, random_state=0, stratify=labels))
    if not tuning:
        return split
    parts = train_test_split(split.train_x, split.train_y, test_size=300, random_state=0, stratify=split.train_y)
    return Split(*parts)


def init(key: jax.Array) -> Params:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    pairs = zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    return [{"w": jax.random.normal(k, (a, b)) / jnp.sqrt(jnp.float32(a)), "b": jnp.zeros(b)} for k, a, b in pairs]


def predict(params: Params, x: jax.Array) -> jax.Array:
    """Images (B, 64) -> logits (B, 10)."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def first_order(
    make: Callable[..., optax.GradientTransformation], rate: float, decay: float, steps: int
) -> curvax.AbstractMethod:
    tx = make(optax.cosine_decay_schedule(rate, steps), weight_decay=decay)
    return curvax.first_order(tx, predict_fn=predict, loss=LOSS)


TUNED = {"AdamW": (optax.adamw, 1e-1, 1e-1), "SOAP": (soap, 3e-2, 3e-1)}
PRESETS = {"gauss_newton": curvax.gauss_newton, "kfac": curvax.kfac}
NAMES = (*PRESETS, *TUNED)


def contender(name: str, steps: int) -> curvax.AbstractMethod:
    """A preset at its defaults, or a tuned optimizer."""
    if name in PRESETS:
        return PRESETS[name](predict_fn=predict, loss=LOSS)
    return first_order(*TUNED[name], steps)


def train(name: str, method: curvax.AbstractMethod, data: Split, options: argparse.Namespace, seed: int) -> FitResult:
    """One run."""

    def measure(params: Params) -> dict[str, jax.Array]:
        logits = predict(params, data.test_x)
        accuracy = jnp.mean((jnp.argmax(logits, axis=-1) == data.test_y).astype(jnp.float32))
        return {"accuracy": accuracy, "loss": LOSS.value(logits, data.test_y, LOSS.effective_weights(logits))}

    return curvax.fit(
        method, init(jax.random.key(seed)),
        Minibatches({"x": data.train_x, "y": data.train_y}, options.batch, seed), options.steps, rng=jax.random.key(0),
        evaluate=Evaluate(measure, every=5, largest=True), progress=False if options.tune else Progress(f"{name:<12}"),
    )  # fmt: skip


def tune(options: argparse.Namespace) -> None:
    """Prints the mean validation loss of every setting."""
    data = load(tuning=True)
    for (name, (make, *_)), rate, decay in itertools.product(TUNED.items(), RATES, DECAYS):
        method = first_order(make, rate, decay, options.steps)
        runs = [train(name, method, data, options, seed).history.evaluations for seed in SEEDS_OF_TUNING]
        loss, accuracy = (float(np.mean([run[what][-1] for run in runs])) for what in ("loss", "accuracy"))
        print(f"{name:<6} rate {rate:g} decay {decay:g}: loss {loss:.4f}, accuracy {accuracy:.2%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Trains a small network on handwritten digits.")
    parser.add_argument("names", nargs="*", metavar="METHOD", help=f"from {', '.join(NAMES)}; all by default")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (200)")
    parser.add_argument("--batch", type=int, default=64, help="examples per batch (64)")
    parser.add_argument("--seed", type=int, default=0, help="of the start and the order of examples (0)")
    parser.add_argument("--picture", type=Path, default=Path("digits.png"), help="where it is drawn (digits.png)")
    parser.add_argument("--tune", action="store_true", help="try all settings on a part of the training set")
    options = parser.parse_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no method {min(unknown)!r}: choose from {', '.join(NAMES)}.")
    if options.tune:
        return tune(options)
    data = load(tuning=False)
    results = {
        name: train(name, contender(name, options.steps), data, options, options.seed)
        for name in options.names or NAMES
    }
    print(table_of_race(results, "accuracy", GOALS, rising=True))
    print(f"What you see: to {GOALS[-1]:.0%} of test accuracy " + ", ".join(map(path_to_goal, results.items())) + ".")
    words = Words(f"Handwritten digits, {'-'.join(map(str, WIDTHS))} network", "test loss")
    draw_race(results, "loss", words, options.picture)
    return None


def path_to_goal(named: tuple[str, FitResult]) -> str:
    """Steps and seconds to the highest goal, in words."""
    name, result = named
    seconds = seconds_to(result, "accuracy", GOALS[-1], rising=True)
    if np.isinf(seconds):
        return f"{name} does not come"
    steps = result.history.evaluations["step"][np.argmax(result.history.evaluations["accuracy"] >= GOALS[-1])]
    return f"{name} takes {steps} steps and {seconds:.2f} s"


if __name__ == "__main__":
    main()
