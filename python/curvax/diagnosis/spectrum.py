"""What the curvature of a run is like, in a few numbers."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from curvax.curvature import GaussNewton, Hessian, ModelLoss
from curvax.operators import CurvatureOperator, Quadrature, eigenpairs, spectrum


@dataclasses.dataclass(frozen=True)
class Curved:
    """Eigenvalues of the Gauss-Newton matrix of the mean loss, and the lower end of the Hessian.

    Attributes:
      parameters: that train.
      top: the largest eigenvalues, descending.
      trace: sum of all eigenvalues, estimated beyond 512 parameters.
      effective_rank: (tr C)^2 / tr C^2: how many eigenvalues there would be if all that count were equal.
      condition: the largest eigenvalue over the smallest that is more than rounding, among those that were seen.
      lowest: the smallest eigenvalue of the Hessian; `None` where it cannot be taken.
      quadrature: the spectrum, for `curvax.viz.spectral_density`.
    """

    parameters: int
    top: tuple[float, ...]
    trace: float
    effective_rank: float
    condition: float
    lowest: float | None
    quadrature: Quadrature

    @property
    def negative(self) -> bool:
        """Whether the Hessian bends down along some direction by a tenth of what it bends up, or more."""
        return self.lowest is not None and self.lowest < -0.1 * self.top[0]

    def __str__(self) -> str:
        top = ", ".join(f"{value:.3g}" for value in self.top)
        lines = [
            f"top eigenvalues {top} of {self.parameters}; trace {self.trace:.3g}",
            f"effective rank {self.effective_rank:.3g}, condition {self.condition:.2g} or more",
        ]
        if self.lowest is not None:
            lines.append(
                f"lowest eigenvalue of the Hessian {self.lowest:.3g}" + (": a saddle" if self.negative else "")
            )
        return "\n".join(lines)


EXACT_UP_TO = 512
"""Parameters up to which all eigenvalues are taken, by as many products in one batched pass."""


def curved(matrix: CurvatureOperator, key: jax.Array, eigenvalues: int, steps: int) -> Curved:
    """Of a Gauss-Newton matrix: `4 * steps` products for the spectrum, and what Lanczos takes for both ends."""
    n = matrix.shape[0]
    if n <= EXACT_UP_TO:
        values = jnp.asarray(np.linalg.eigvalsh(np.asarray(matrix.to_dense()))[::-1])
        top, quadrature = values[:eigenvalues], Quadrature(values[None], jnp.full_like(values[None], 1 / n), n)
    else:
        top = eigenpairs(matrix, eigenvalues, tol=1e-3).values
        quadrature = spectrum(matrix, key, steps=steps, probes=4)
    trace = quadrature.total(lambda t: t).value
    squares = quadrature.total(jnp.square).value
    least = n * jnp.finfo(matrix.dtype).eps * top[0]
    seen = jnp.where((quadrature.nodes > least) & (quadrature.weights > 0), quadrature.nodes, jnp.inf)
    rank = jnp.where(squares > 0, trace**2 / jnp.where(squares > 0, squares, 1), 0)
    return Curved(
        n, tuple(map(float, top)), float(trace), float(rank), float(top[0] / jnp.minimum(jnp.min(seen), top[0])),
        _lowest(matrix), quadrature,
    )  # fmt: skip


def _lowest(matrix: CurvatureOperator) -> float | None:
    curvature = matrix.curvature
    assert isinstance(curvature, GaussNewton)
    hessian = Hessian(ModelLoss(curvature.model, curvature.loss))
    whole = dataclasses.replace(matrix, curvature=hessian)
    try:
        return float(eigenpairs(whole, 1, "smallest", tol=1e-2).values[0])
    except TypeError:  # a custom_vjp has no second derivative forward
        return None
