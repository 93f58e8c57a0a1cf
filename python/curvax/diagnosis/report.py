"""The page, and how it is made."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from curvax import viz
from curvax.curvature import GaussNewton, Model
from curvax.diagnosis.advice import Advice, Evidence, advise
from curvax.diagnosis.noise import GradientNoise, gradient_noise
from curvax.diagnosis.spectrum import Curved, curved
from curvax.diagnosis.steps import StepCost, step_costs
from curvax.diagnosis.structure import LostLeaf, lost_leaves
from curvax.figures import new_axes
from curvax.keywords import spread
from curvax.losses import Loss
from curvax.operators import CurvatureOperator, ggn
from curvax.operators.batches import is_one_batch, walked
from curvax.plan.machine import machine
from curvax.tree import PyTree


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What `diagnose` returns; printing it gives the page.

    Attributes:
      noise: of the gradient.
      curvature: eigenvalues.
      lost: leaves that lost their structure.
      steps: predicted cost of a step of each preset, on a batch as large as the first.
      device: whose rates the predictions use.
      advice: the method that follows.
    """

    noise: GradientNoise
    curvature: Curved
    lost: tuple[LostLeaf, ...]
    steps: tuple[StepCost, ...]
    device: str
    advice: Advice

    def __str__(self) -> str:
        lost = "\n".join(map(str, self.lost)) if self.lost else "every leaf that multiplies is in a layer"
        steps = "\n".join(map(str, sorted(self.steps, key=lambda step: step.seconds or math.inf)))
        sections = {
            "gradient": str(self.noise),
            "curvature": str(self.curvature),
            "structure": lost,
            "a step": f"{steps}\npredicted for a {self.device}",
            "advice": str(self.advice),
        }
        return "\n".join(_section(title, text) for title, text in sections.items())

    def as_dict(self) -> dict[str, Any]:
        """Numbers and strings alone, ready for JSON or a log; the spectrum as its nodes and weights."""
        found = dataclasses.asdict(dataclasses.replace(self, curvature=None))  # type: ignore[type-var]
        quadrature = self.curvature.quadrature
        plain = {f.name: getattr(self.curvature, f.name) for f in dataclasses.fields(self.curvature)}
        nodes = {"nodes": np.asarray(quadrature.nodes).tolist(), "weights": np.asarray(quadrature.weights).tolist()}
        return {**found, "curvature": {**plain, "top": list(self.curvature.top), "quadrature": nodes}}

    def plot(self, axes: Any = None) -> Any:
        """Draws the density of the spectrum, and the predicted time of a step of each preset.

        Args:
          axes: a pair of matplotlib axes; a new figure by default.

        Returns:
          The axes.

        Raises:
          ImportError: matplotlib is not installed.
        """
        axes = new_axes("Diagnosis.plot", 2) if axes is None else axes
        viz.spectral_density(self.curvature.quadrature, axes[0])
        served = sorted((s for s in self.steps if s.seconds is not None), key=lambda s: -(s.seconds or 0.0))
        axes[1].barh([s.preset for s in served], [1e3 * (s.seconds or 0.0) for s in served])
        axes[1].set_xscale("log")
        axes[1].set_xlabel("predicted ms per step")
        return axes


def _section(title: str, text: str) -> str:
    lines = text.splitlines()
    return "\n".join(f"{title if i == 0 else '':<11}{line}" for i, line in enumerate(lines))


@dataclasses.dataclass(frozen=True)
class DiagnoseArguments:
    """A run to look at.

    Attributes:
      model: `predict_fn(params, inputs)`, or a `curvature.Model` with the keys of its batch and what else it takes.
      loss: a loss of `curvax.losses`; the page is about its mean.
      params: the parameters as they are.
      data: one batch, a list of batches, or something that is walked for them.
      key: random key of the probes, `jax.random.key(0)` by default, and of models that take one.
      model_state: the model's state, for models that have one.
      eigenvalues: how many of the largest are shown, 5 by default.
      steps: of Lanczos for the spectrum, 32 by default, with four products each; up to 512 parameters it is exact.
      max_batches: of something that is walked, so many are read, 8 by default.
    """

    model: Model | Callable[..., jax.Array]
    loss: Loss
    params: PyTree
    data: Any
    _: dataclasses.KW_ONLY
    key: jax.Array | None = None
    model_state: PyTree = None
    eigenvalues: int = 5
    steps: int = 32
    max_batches: int = 8

    def __post_init__(self) -> None:
        for name in ("eigenvalues", "steps", "max_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


@spread(DiagnoseArguments)
def diagnose(arguments: DiagnoseArguments) -> Diagnosis:
    """One page about a run that stalls, or is about to begin: noise, curvature, structure, costs, and a method.

    It takes some 200 curvature products of the data that are read, and trains nothing.

    Raises:
      ValueError, TypeError, KeyError: a model, a loss or a batch that do not fit each other.
    """
    model = arguments.model if isinstance(arguments.model, Model) else Model(arguments.model)
    loss = dataclasses.replace(arguments.loss, reduction="mean")
    data = arguments.data
    if not is_one_batch(data) and not isinstance(data, list):
        data = list(itertools.islice(walked(data), arguments.max_batches))
    key = jax.random.key(0) if arguments.key is None else arguments.key
    own = key if model.extras.has_rng else None
    matrix = ggn(model, loss, arguments.params, data, key=own, model_state=arguments.model_state)
    assert isinstance(matrix, CurvatureOperator) and isinstance(matrix.curvature, GaussNewton)
    found = Evidence(
        loss=loss,
        rows=_rows(matrix),
        itemsize=matrix.dtype.itemsize,
        noise=gradient_noise(matrix),
        curvature=curved(matrix, key, arguments.eigenvalues, arguments.steps),
        lost=lost_leaves(matrix),
        steps=step_costs(model, loss, arguments.params, matrix.batches[0], arguments.model_state),
    )
    lost, steps = tuple(found.lost), tuple(found.steps)
    return Diagnosis(found.noise, found.curvature, lost, steps, str(machine()), advise(found))


def _rows(matrix: CurvatureOperator) -> int:
    """Outputs of the first batch."""
    shape = jax.eval_shape(matrix.curvature.forward, matrix.at.params, matrix.at.evaluation(matrix.batches[0], 0)).shape
    return math.prod(shape)
