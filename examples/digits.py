"""Five ways to train a small network on handwritten digits, from the same start, on the same batches.

    python examples/digits.py            # prints the plans, trains, prints a table; writes a figure and a JSON file
    python examples/digits.py --tune     # how the settings in CONTENDERS were found

The data are the 1,797 digits of 8 x 8 pixels that scikit-learn brings along: nothing is downloaded. Tuning looks at a
part of the training set only; the test set is only for the curves and the table.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _report import Curve, Progress, draw, save, say, summarize
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import curvax

Params = list[dict[str, jax.Array]]
Settings = Mapping[str, Any]
WIDTHS = (64, 48, 10)
SEEDS_OF_TUNING = (1, 2, 3)


class Split(NamedTuple):
    """Images (N, 64) in [0, 1] and labels (N,), for training and for testing."""

    train_x: jax.Array
    train_y: jax.Array
    test_x: jax.Array
    test_y: jax.Array


def load(*, tuning: bool) -> Split:
    """1347 digits to train and 450 to test; for tuning, 1047 and 300 out of those 1347."""
    pixels, classes = load_digits(return_X_y=True)
    images, labels = np.asarray(pixels, np.float32) / 16, np.asarray(classes, np.int32)
    train_x, test_x, train_y, test_y = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)
    if tuning:
        train_x, test_x, train_y, test_y = train_test_split(
            train_x, train_y, test_size=300, random_state=0, stratify=train_y
        )
    return Split(*map(jnp.asarray, (train_x, train_y, test_x, test_y)))


def init(key: jax.Array) -> Params:
    keys = jax.random.split(key, len(WIDTHS) - 1)
    return [
        {"w": jax.random.normal(k, (a, b)) / jnp.sqrt(jnp.float32(a)), "b": jnp.zeros(b)}
        for k, a, b in zip(keys, WIDTHS[:-1], WIDTHS[1:], strict=True)
    ]


def predict(params: Params, x: jax.Array) -> jax.Array:
    """Images (B, 64) -> logits (B, 10)."""
    for layer in params[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def cross_entropy(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y))


class Trainer(NamedTuple):
    """`init(params) -> state`, `step(params, batch, state) -> (params, state)`, and the curvax method behind them."""

    init: Callable[[Params], Any]
    step: Callable[[Params, Any, Any], tuple[Any, Any]]
    method: curvax.Method | None = None


def second_order(method: curvax.Method) -> Trainer:
    key = jax.random.key(0)

    def step(params: Params, batch: Any, state: Any) -> tuple[Params, Any]:
        params, state, _ = method.step(params, batch, state, key)
        return params, state

    return Trainer(method.init, step, method)


def first_order(tx: optax.GradientTransformation) -> Trainer:
    def step(params: Params, batch: Any, state: Any) -> tuple[Any, Any]:
        gradient = jax.grad(cross_entropy)(params, batch["x"], batch["y"])
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return Trainer(tx.init, step)


def gauss_newton(s: Settings, steps: int) -> Trainer:
    # The trust region looks at the step's own batch; its damping gets a floor, lest small batches be learnt by heart.
    return second_order(
        curvax.gauss_newton(
            predict_fn=predict,
            loss=curvax.losses.SoftmaxCrossEntropy(),
            lam_kwargs={"min_lam": s["min_lam"]},
            learning_rate=schedule(s, steps),
            weight_decay=s["weight_decay"],
        )
    )


def sgn_ce(s: Settings, steps: int) -> Trainer:
    rate, decay = schedule(s, steps), s["weight_decay"]
    return second_order(curvax.sgn_ce(predict_fn=predict, lam0=s["lam0"], learning_rate=rate, weight_decay=decay))


def egn_ce(s: Settings, steps: int) -> Trainer:
    rate, decay = schedule(s, steps), s["weight_decay"]
    return second_order(curvax.egn_ce(predict_fn=predict, lam0=s["lam0"], learning_rate=rate, weight_decay=decay))


def sophia_g(s: Settings, steps: int) -> Trainer:
    rate, decay = schedule(s, steps), s["weight_decay"]
    return second_order(curvax.sophia_g(predict_fn=predict, gamma=s["gamma"], learning_rate=rate, weight_decay=decay))


def adamw(s: Settings, steps: int) -> Trainer:
    return first_order(optax.adamw(schedule(s, steps), weight_decay=s["weight_decay"]))


def schedule(s: Settings, steps: int) -> float | optax.Schedule:
    return optax.cosine_decay_schedule(s["learning_rate"], steps) if s["cosine"] else s["learning_rate"]


@dataclasses.dataclass(frozen=True)
class Contender:
    """A method, the grid it was tuned on and the settings that `--tune` found best."""

    build: Callable[[Settings, int], Trainer]
    grid: Mapping[str, tuple[Any, ...]]
    chosen: Settings


# Tuned alike: 24 settings each, 200 steps from each of three starts; the least mean validation loss at the end wins.
# egn_ce solves exactly what sgn_ce iterates on, and takes its settings untuned.
_DIRECTION = {"learning_rate": (0.3, 1.0), "weight_decay": (0.0, 1e-2), "cosine": (False, True)}
CONTENDERS: dict[str, Contender] = {
    "gauss_newton": Contender(
        gauss_newton,
        {"min_lam": (0.01, 0.03, 0.1), **_DIRECTION},
        {"min_lam": 0.03, "learning_rate": 1.0, "weight_decay": 0.01, "cosine": True},
    ),
    "sgn_ce": Contender(
        sgn_ce,
        {"lam0": (0.1, 0.3, 1.0), **_DIRECTION},
        {"lam0": 0.3, "learning_rate": 1.0, "weight_decay": 0.0, "cosine": False},
    ),
    "egn_ce": Contender(
        egn_ce,
        {},
        {"lam0": 0.3, "learning_rate": 1.0, "weight_decay": 0.0, "cosine": False},
    ),
    "sophia_g": Contender(
        sophia_g,
        {"gamma": (0.5, 2.0), "learning_rate": (1e-2, 3e-2, 1e-1), "weight_decay": (0.3, 1.0), "cosine": (False, True)},
        {"gamma": 0.5, "learning_rate": 3e-2, "weight_decay": 1.0, "cosine": True},
    ),
    "adamw": Contender(
        adamw,
        {"learning_rate": (3e-2, 6e-2, 1e-1, 2e-1), "weight_decay": (1e-2, 1e-1, 3e-1), "cosine": (False, True)},
        {"learning_rate": 1e-1, "weight_decay": 0.1, "cosine": True},
    ),
}


def batches(data: Split, size: int, steps: int, seed: int) -> np.ndarray:
    """Row numbers (steps, size): epoch after epoch, each in a fresh order, the incomplete last batch dropped."""
    rng, count = np.random.default_rng(seed), len(data.train_y)
    epochs = -(-steps // (count // size))
    orders = [rng.permutation(count)[: count // size * size].reshape(-1, size) for _ in range(epochs)]
    return np.concatenate(orders)[:steps]


def train(
    name: str, trainer: Trainer, data: Split, order: np.ndarray, seed: int, every: int, progress: Progress | None = None
) -> Curve:
    """One run. The clock stands still while the curve's points are taken, and compilation is timed apart."""

    @jax.jit
    def measure(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        correct = jnp.argmax(predict(params, data.test_x), axis=-1) == data.test_y
        train_loss = cross_entropy(params, data.train_x, data.train_y)
        test_loss = cross_entropy(params, data.test_x, data.test_y)
        return train_loss, test_loss, jnp.mean(correct.astype(jnp.float32))

    def step(params: Params, state: Any, rows: jax.Array) -> tuple[Params, Any]:
        return trainer.step(params, {"x": data.train_x[rows], "y": data.train_y[rows]}, state)

    params = init(jax.random.key(seed))
    state = trainer.init(params)
    if progress is not None:
        progress.compiling(name)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(params, state, order[0]).compile()
    # The first call of a program sets things up that later ones find ready: it belongs to compilation.
    jax.block_until_ready(compiled(params, state, order[0]))
    curve = Curve(name, compile_seconds=time.perf_counter() - start)
    curve.add(0, 0.0, *map(float, measure(params)))
    seconds = 0.0
    for done in range(0, len(order), every):
        start = time.perf_counter()
        for rows in order[done : done + every]:
            params, state = compiled(params, state, rows)
        jax.block_until_ready(params)
        seconds += time.perf_counter() - start
        curve.add(min(done + every, len(order)), seconds, *map(float, measure(params)))
        if progress is not None:
            progress.advance(curve)
    return curve


def tune(names: list[str], size: int, steps: int) -> None:
    """Prints the mean validation loss of every setting on every grid, best first."""
    data = load(tuning=True)
    for name in names:
        contender = CONTENDERS[name]
        results = []
        for values in itertools.product(*contender.grid.values()) if contender.grid else ():
            settings = dict(zip(contender.grid, values, strict=True))
            runs = [
                train(name, contender.build(settings, steps), data, batches(data, size, steps, seed), seed, steps)
                for seed in SEEDS_OF_TUNING
            ]
            losses, accuracies = ([getattr(run, what)[-1] for run in runs] for what in ("test_loss", "accuracy"))
            results.append((float(np.mean(losses)), float(np.mean(accuracies)), settings))
        for loss, accuracy, settings in sorted(results, key=lambda r: np.nan_to_num(r[0], nan=np.inf)):
            print(f"{name:<13} loss {loss:.4f}  accuracy {accuracy:.2%}  {settings}", flush=True)


def compete(names: list[str], options: argparse.Namespace) -> list[Curve]:
    """Prints the plans, then trains every method from the same start on the same batches."""
    data = load(tuning=False)
    order = batches(data, options.batch, options.steps, options.seed)
    trainers = {name: CONTENDERS[name].build(CONTENDERS[name].chosen, options.steps) for name in names}
    params = init(jax.random.key(options.seed))
    batch = {"x": data.train_x[order[0]], "y": data.train_y[order[0]]}
    for name, trainer in trainers.items():
        if trainer.method is not None:
            say(f"[bold]{name}[/]  {_show(CONTENDERS[name].chosen)}", trainer.method.plan_for(params, batch).explain())
        else:
            say(f"[bold]{name}[/]  {_show(CONTENDERS[name].chosen)}", "from Optax")
    with Progress(names, options.steps) as progress:
        return [
            train(name, trainer, data, order, options.seed, options.every, progress)
            for name, trainer in trainers.items()
        ]


def _show(settings: Settings) -> str:
    return ", ".join(f"{key}={value}" for key, value in settings.items())


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Trains a small network on handwritten digits in five ways.")
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"from {', '.join(CONTENDERS)}; all by default")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run (200)")
    parser.add_argument("--batch", type=int, default=64, help="examples per batch (64)")
    parser.add_argument("--every", type=int, default=5, help="steps between points of the curves (5)")
    parser.add_argument("--seed", type=int, default=0, help="of the start and the order of examples (0)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for digits.json and digits.png (out)")
    parser.add_argument("--quick", action="store_true", help="60 steps on batches of 32, to see that it runs")
    parser.add_argument("--tune", action="store_true", help="search the grids on a part of the training set")
    options = parser.parse_args()
    unknown = [name for name in options.methods if name not in CONTENDERS]
    if unknown:
        parser.error(f"there is no method {unknown[0]!r}: choose from {', '.join(CONTENDERS)}.")
    if options.quick:
        options.steps, options.batch = 60, 32
    return options


def main() -> None:
    options = parse()
    names = options.methods or list(CONTENDERS)
    if options.tune:
        return tune(names, options.batch, options.steps)
    curves = compete(names, options)
    config = {
        "widths": WIDTHS,
        "steps": options.steps,
        "batch": options.batch,
        "seed": options.seed,
        "settings": {name: dict(CONTENDERS[name].chosen) for name in names},
    }
    summarize(curves)
    save(curves, config, options.out / "digits.json")
    draw(curves, f"Handwritten digits, {'-'.join(map(str, WIDTHS))} tanh network", options.out / "digits.png")
    return None


if __name__ == "__main__":
    main()
