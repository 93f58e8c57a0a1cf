"""Pictures of curvature, by matplotlib: the density of a spectrum, sharpness along training."""

from __future__ import annotations

from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from curvax.figures import new_axes
from curvax.operators import Quadrature


class Columns(Protocol):
    """What has columns by name, as `curvax.training.History` and a dictionary of arrays do."""

    def __getitem__(self, name: str, /) -> Any:
        """The column of that name; KeyError if there is none."""
        ...


def spectral_density(spectrum: Quadrature, ax: Any = None, *, points: int = 500) -> Any:
    """Draws the density of a spectrum on a logarithmic axis, where its few large eigenvalues show beside the bulk.

    Args:
      spectrum: what `curvax.operators.spectrum(operator, key)` returns.
      ax: a matplotlib axis; a new figure by default.
      points: at which the density is evaluated, 500 by default.

    Returns:
      The axis.

    Raises:
      ImportError: matplotlib is not installed.
    """
    axis = new_axes("spectral_density") if ax is None else ax
    low, high = float(jnp.min(spectrum.nodes)), float(jnp.max(spectrum.nodes))
    margin = 0.05 * (high - low if high > low else max(abs(high), 1.0))
    at = jnp.linspace(low - margin, high + margin, points, dtype=spectrum.nodes.dtype)
    density = np.asarray(spectrum.density(at))
    axis.semilogy(at, density)
    # What a Gaussian leaves far from every node is of no interest.
    least = 1 / (100 * spectrum.size * max(high - low, np.finfo(np.float32).tiny))
    axis.set_ylim(bottom=min(least, density.max() / 10) if density.max() > 0 else None)
    axis.set_xlabel("eigenvalue")
    axis.set_ylabel("density")
    return axis


def sharpness(history: Columns, ax: Any = None, *, label: str | None = None) -> Any:
    """Draws the sharpness along training, from a run with `MetricRecord("sharpness", every=k)`.

    Where the run recorded its learning rate, 2 / learning_rate stands beside it, above which a step of plain gradient
    descent overshoots (Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability",
    2021).

    Args:
      history: what `curvax.fit` returns, or anything else with the columns "step" and "sharpness"; NaN is not due.
      ax: a matplotlib axis; a new figure by default.
      label: the curve's name, for `legend()`.

    Returns:
      The axis.

    Raises:
      KeyError: the run did not record sharpness.
      ImportError: matplotlib is not installed.
    """
    values, steps = np.asarray(history["sharpness"]), np.asarray(history["step"])
    axis = new_axes("sharpness") if ax is None else ax
    due = np.isfinite(values)
    axis.plot(steps[due], values[due], marker=".", label=label)
    try:
        rate = np.asarray(history["learning_rate"])
    except KeyError:
        rate = np.zeros_like(values)
    usable = due & (rate > 0)
    if usable.any():
        axis.plot(steps[usable], 2 / rate[usable], linestyle="--", color="gray", label="2 / learning rate")
    axis.set_xlabel("step")
    axis.set_ylabel("sharpness")
    return axis
