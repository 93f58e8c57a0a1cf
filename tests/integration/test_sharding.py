"""One device equals eight: the same steps with the batch and the parameters spread over a mesh."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
import curvax
from curvax.losses import SoftmaxCrossEntropy

assert len(jax.devices()) == 8
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "model"))


def predict(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"]


def loss(params, batch):
    logits = jax.nn.log_softmax(predict(params, batch["x"]))
    return -jnp.mean(jnp.take_along_axis(logits, batch["y"][:, None], axis=1))


k1, k2, k3 = jax.random.split(jax.random.key(0), 3)
params = {"w1": jax.random.normal(k1, (6, 8)), "w2": jax.random.normal(k2, (8, 4))}
batch = {"x": jax.random.normal(k3, (16, 6)), "y": jnp.arange(16) % 4}
spread = {
    "w1": jax.device_put(params["w1"], NamedSharding(mesh, P(None, "model"))),
    "w2": jax.device_put(params["w2"], NamedSharding(mesh, P("model", None))),
}
data = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P("data"))), batch)
methods = {
    "sgn_ce": curvax.sgn_ce(predict_fn=predict, lam0=0.1, lam_policy="trust_region"),
    "egn_ce": curvax.egn_ce(predict_fn=predict, lam0=0.1),
    "sophia_h": curvax.sophia_h(loss_fn=loss, eval_every_k=2),
    "gauss_newton": curvax.gauss_newton(predict_fn=predict, loss=SoftmaxCrossEntropy()),
}
for name, method in methods.items():
    results = []
    for p, b in ((params, batch), (spread, data)):
        state, step = method.init(p), jax.jit(method.step)
        for _ in range(3):
            p, state, info = step(p, b, state, jax.random.key(1))
        results.append(jax.tree.map(np.asarray, p))
    for a, b in zip(*map(jax.tree.leaves, results)):
        np.testing.assert_allclose(b, a, rtol=2e-4, atol=2e-5, err_msg=name)
    print("equal:", name)
choice = methods["sgn_ce"].plan_for(params, batch).choices[0]
assert choice.implementation == "reference" and "8 devices" in choice.reason, choice
"""


@pytest.mark.slow
def test_one_device_equals_eight() -> None:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("equal:") == 4
