"""One classification problem in pieces of unequal size with masks, and its dense matrices over all examples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.curvature import Model
from curvax.losses import SoftmaxCrossEntropy
from tests.oracle import dense, losses
from tests.oracle.models import CNN, EMBEDDING, MLP_TANH, SHARED

PyTree = Any
LOSS = SoftmaxCrossEntropy()
MODELS = (MLP_TANH, CNN, SHARED, EMBEDDING)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model at some parameters and masked data: whole, and as a list of unequal batches."""

    predict: Any
    params: PyTree
    batch: dict[str, np.ndarray]

    @property
    def model(self) -> Model:
        return Model(self.predict, weight_key="mask")

    @property
    def batches(self) -> list[dict[str, np.ndarray]]:
        cuts = (0, 4, len(self.batch["x"]))
        return [{k: v[a:b] for k, v in self.batch.items()} for a, b in itertools.pairwise(cuts)]

    @functools.cached_property
    def truth(self) -> dense.Truth:
        b = self.batch
        return dense.truth(self.predict, losses.softmax_cross_entropy, self.params, b["x"], b["y"], b["mask"])


@functools.cache
def problem(model: Any, dtype: Any = jnp.float64) -> Problem:
    params = model.init(jax.random.key(1), dtype)
    rng = np.random.default_rng(2)
    shape = model.input_shape
    x = rng.integers(0, model.vocabulary, shape) if model.vocabulary else rng.normal(size=shape).astype(dtype)
    outputs = jax.eval_shape(model.predict, params, x)
    y = rng.integers(0, outputs.shape[-1], outputs.shape[:-1])
    mask = rng.integers(0, 2, outputs.shape[:1]).astype(bool)
    mask[:2] = True, False
    return Problem(model.predict, params, {"x": x, "y": y, "mask": mask})
