"""A small convolutional network on Fashion-MNIST: Gauss-Newton by CG against AdamW.

    sudo apt-get install dataset-fashion-mnist     # Debian and Ubuntu; or pass --data a folder with the four .gz files
    python examples/fashion_mnist.py

Both start from the same parameters and see the same batches. Without the data the program says so and exits with 0.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import curvax
from curvax.training import Evaluate, Minibatches

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
BATCH, TEST_EXAMPLES = 256, 2000
Params = dict[str, jax.Array]


def load(folder: Path, part: str) -> tuple[jax.Array, jax.Array]:
    """Images (N, 28, 28, 1) in [0, 1] and labels (N,), from IDX files: bytes behind a header of 16 and of 8 bytes."""
    pixels = np.frombuffer(gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return jnp.asarray(pixels.reshape(-1, 28, 28, 1), jnp.float32) / 255, jnp.asarray(labels, jnp.int32)


def init(key: jax.Array) -> Params:
    shapes = {"conv1": (3, 3, 1, 8), "conv2": (3, 3, 8, 16), "dense": (7 * 7 * 16, 10)}
    keys = jax.random.split(key, len(shapes))
    pairs = zip(keys, shapes.items(), strict=True)
    weights = {n: jax.random.normal(k, shape) / np.float32(np.prod(shape[:-1]) ** 0.5) for k, (n, shape) in pairs}
    return weights | {f"{name}_bias": jnp.zeros(shape[-1]) for name, shape in shapes.items()}


def predict(params: Params, images: jax.Array) -> jax.Array:
    """Images (B, 28, 28, 1) -> logits (B, 10)."""
    x = images
    for name in ("conv1", "conv2"):
        x = jax.lax.conv_general_dilated(x, params[name], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.gelu(x + params[f"{name}_bias"])
    return x.reshape(len(x), -1) @ params["dense"] + params["dense_bias"]


def sgn(steps: int) -> curvax.AbstractMethod:
    # Full steps, kept in check by the trust region; the floor under its damping keeps single batches from being learnt.
    region = curvax.damping.TrustRegion(lam0=10.0, min_lam=0.03)
    rate = optax.cosine_decay_schedule(1.0, steps)
    return curvax.sgn_ce(predict_fn=predict, lam_policy=region, maxiter=10, learning_rate=rate)


def adamw(steps: int) -> curvax.AbstractMethod:
    # The best of 0.003, 0.01 and 0.03 with weight decay 0.01 and 0.1.
    tx = optax.adamw(optax.cosine_decay_schedule(3e-2, steps), weight_decay=1e-2)
    return curvax.first_order(tx, predict_fn=predict, loss=curvax.losses.SoftmaxCrossEntropy())


def main() -> None:
    parser = argparse.ArgumentParser(description="Fashion-MNIST: Gauss-Newton by CG against AdamW.")
    parser.add_argument("--steps", type=int, default=150, help="steps of each run, on batches of 256 (150)")
    parser.add_argument("--data", type=Path, default=DEBIAN, help=f"folder with the data set ({DEBIAN})")
    options = parser.parse_args()
    if not (options.data / "train-images-idx3-ubyte.gz").exists():
        print(f"Fashion-MNIST is not in {options.data}: apt-get install dataset-fashion-mnist, or pass --data FOLDER.")
        return
    x, y = load(options.data, "train")
    test_x, test_y = (part[:TEST_EXAMPLES] for part in load(options.data, "t10k"))

    def accuracy(params: Params) -> jax.Array:
        return jnp.mean((jnp.argmax(predict(params, test_x), axis=-1) == test_y).astype(jnp.float32))

    steps, batches = options.steps, Minibatches({"x": x, "y": y}, BATCH)
    for name, method in {"sgn_ce": sgn(steps), "adamw": adamw(steps)}.items():
        evaluate = Evaluate(accuracy, every=max(steps // 8, 1), largest=True)
        history = curvax.fit(method, init(jax.random.key(0)), batches, steps, evaluate=evaluate, progress=False).history
        for step, seconds, value in zip(*history.evaluations.values(), strict=True):
            print(f"{name:<7} step {step:>4} {seconds:7.2f} s   test accuracy {value:.2%}", flush=True)


if __name__ == "__main__":
    main()
