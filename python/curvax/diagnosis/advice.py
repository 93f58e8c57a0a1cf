"""The method that follows from a diagnosis, by the rules of docs/choose.md, first match.

noise below the signal of the batch   few unknowns (residuals, or parameters)   gauss_newton, egn: the exact direction
                                      more                                      sgn: CG
noise above it                        layers known                              kfac: curvature averaged over batches
                                      structure lost                            sophia_g, or sophia_h
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from curvax.diagnosis.noise import GradientNoise
from curvax.diagnosis.spectrum import Curved
from curvax.diagnosis.steps import StepCost
from curvax.diagnosis.structure import LostLeaf
from curvax.losses import Loss, SquaredError

FEW_ROWS, FEW_PARAMETERS = 2000, 256
"""Up to which docs/choose.md has the exact direction."""


@dataclasses.dataclass(frozen=True)
class Advice:
    """A method and its settings.

    Attributes:
      method: a preset.
      settings: what to set beside its defaults, as one would write it; most need nothing.
      reason: what it follows from.
    """

    method: str
    settings: tuple[str, ...]
    reason: str

    def __str__(self) -> str:
        settings = f" with {', '.join(self.settings)}" if self.settings else " at its defaults"
        return f"curvax.{self.method}{settings}, because {self.reason}."


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What advice follows from.

    Attributes:
      loss: of the run.
      rows: outputs of a batch.
      itemsize: bytes of the parameters' numbers in computations.
      noise, curvature, lost, steps: the sections of the page.
    """

    loss: Loss
    rows: int
    itemsize: int
    noise: GradientNoise
    curvature: Curved
    lost: Sequence[LostLeaf]
    steps: Sequence[StepCost]


def advise(found: Evidence) -> Advice:
    """The first rule that fits, among presets that serve the model."""
    method, reason = _method(found)
    served = {step.preset for step in found.steps if step.seconds is not None}
    if method not in served:
        others = [name for name in ("sgn", "newton_cg", "sophia_h") if name in served]
        if others:
            reason += f" ({method} does not serve this model)"
            method = others[0]
    return Advice(method, tuple(_settings(found)), reason)


def _method(found: Evidence) -> tuple[str, str]:
    noise, n = found.noise, found.curvature.parameters
    noisy = noise.scale > noise.batch and not math.isnan(noise.scale)
    if noisy:
        about = f"the noise of a gradient outweighs its signal up to {noise.scale:.3g} examples"
        if math.isinf(noise.scale):
            about = "no signal is seen behind the noise of these gradients"
        lost = sum(entry.size for entry in found.lost)
        if 2 * lost < n:
            return "kfac", f"{about} and a batch has {noise.batch}, so curvature wants averaging over batches"
        method = "sophia_g" if not isinstance(found.loss, SquaredError) else "sophia_h"
        return method, f"{about}, and {lost} of {n} parameters are in no layer that has Kronecker factors"
    quiet = "the batch outweighs the noise" if math.isfinite(noise.scale) else "nothing is known of noise"
    if found.curvature.negative and n <= FEW_PARAMETERS:
        return "newton_cg", f"{quiet} and the Hessian bends down, which a Gauss-Newton matrix does not see"
    squares = isinstance(found.loss, SquaredError)
    if n <= FEW_PARAMETERS or found.rows <= FEW_ROWS:
        of = f"{n} parameters" if n <= FEW_PARAMETERS else f"{found.rows} residuals"
        return "gauss_newton" if squares else "egn", f"{quiet} and {of} are few enough for the exact direction"
    return "gauss_newton" if squares else "sgn", f"{quiet} and {found.rows} outputs are many for an exact direction"


def _settings(found: Evidence) -> list[str]:
    settings, noise = [], found.noise
    batch = noise.suggested_batch
    if batch is not None and (batch > 2 * noise.batch or 8 * batch < noise.batch):
        settings.append(f"batches of about {batch}")
    # Squares of a condition number beyond what the digits hold: solves stall.
    digits = 1 / 2 ** (23 if found.itemsize <= 4 else 52)
    if isinstance(found.loss, SquaredError) and found.itemsize <= 4 and found.curvature.condition > digits**-0.75:
        settings.append("float64 (jax_enable_x64)")
    return settings
