"""One of the processes of `python examples/multihost`.

What differs from a script for one process: `jax.distributed.initialize`, a mesh of the devices of all processes, and
batches made of what each process has loaded. The step is the same.
"""

from __future__ import annotations

import os
import pathlib
import pickle
import signal
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import curvax

EXAMPLES, FEATURES, CLASSES = 32, 6, 4
CHECKPOINT_EVERY = 5


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A network of two layers."""
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def load(step: int, first: int, last: int) -> dict[str, np.ndarray]:
    """Examples `first` to `last` of the batch of a step: what one process reads."""
    rng = np.random.default_rng(step)
    x, y = rng.standard_normal((EXAMPLES, FEATURES)), rng.integers(0, CLASSES, EXAMPLES)
    x[np.arange(EXAMPLES), y] += 2
    return {"x": x[first:last], "y": y[first:last]}


def global_batch(step: int, mesh: Mesh) -> dict[str, jax.Array]:
    """The batch of all processes, of which this one holds what it has loaded."""
    each = EXAMPLES // jax.process_count()
    own = load(step, jax.process_index() * each, (jax.process_index() + 1) * each)
    split = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(split, x) for name, x in own.items()}


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """The same arrays on all devices."""
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(whole, np.asarray(x)), tree)


def save(path: pathlib.Path, step: int, params: Any, state: Any) -> None:
    """Writes a checkpoint that is whole or not there; every process has all of it, and the first one writes."""
    host = jax.tree.map(np.asarray, (params, state))
    if jax.process_index() == 0:
        draft = path.with_suffix(".draft")
        draft.write_bytes(pickle.dumps((step, *host)))
        draft.replace(path)


def main(coordinator: str, processes: str, rank: str, steps: str, out: str, die_at: str = "-1") -> None:
    """Trains from the checkpoint, or from the start."""
    if int(processes) > 1:
        # Who hears nothing of another process for so long ends with an error.
        jax.distributed.initialize(f"localhost:{coordinator}", int(processes), int(rank), heartbeat_timeout_seconds=10)
    jax.config.update("jax_enable_x64", True)
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    method = curvax.kfac(predict_fn=predict, loss=curvax.losses.SoftmaxCrossEntropy())
    path, begin = pathlib.Path(out) / "checkpoint.pickle", 0
    k1, k2 = jax.random.split(jax.random.key(0))
    params: Any = {"w1": jax.random.normal(k1, (FEATURES, 8)) / 2, "w2": jax.random.normal(k2, (8, CLASSES)) / 2}
    if path.exists():
        begin, params, state = pickle.loads(path.read_bytes())
        params, state = everywhere((params, state), mesh)
    else:
        params = everywhere(params, mesh)
        state = method.init(params, batch=global_batch(0, mesh))
    step, key = jax.jit(method.step), jax.random.key(1)
    info: dict[str, Any] = {}
    for i in range(begin, int(steps)):
        params, state, info = step(params, global_batch(i, mesh), state, key)
        if (i + 1) % CHECKPOINT_EVERY == 0 or i + 1 == int(steps):
            save(path, i + 1, params, state)
        if i == int(die_at):
            os.kill(os.getpid(), signal.SIGKILL)
    if jax.process_index() == 0 and info:
        print(f"{jax.process_count()} processes, steps {begin} to {steps}: loss {float(info['loss']):.6f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
