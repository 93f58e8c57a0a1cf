"""The energy of variational Monte Carlo, with stochastic reconfiguration's metric."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, final

import jax
import jax.numpy as jnp

from curvax.losses.base import Loss, Shaped, accumulation_dtype, append_axes, is_real, shaped, weigh
from curvax.losses.batch_fault import BatchFault
from curvax.losses.squared_error import SquaredError


@final
@dataclasses.dataclass(frozen=True)
class VariationalEnergy(Loss):
    """The mean E of local energies E_i at samples of |psi|^2, as a function of the outputs f_i = log psi(x_i).

    Moving the samples' distribution with psi, its gradient is 2 Re cov(d f, E_i). With O the Jacobian of f, rows
    centered over the samples,

        S = Re cov(O, O)                 curvature: stochastic reconfiguration's matrix, the quantum Fisher matrix / 4
        F = Re cov(O, E) = dE / 2        gradient: the forces

    so that a direction is (S + lam I)^-1 F, one unit of imaginary time of stochastic reconfiguration (Sorella 1998),
    minSR (Chen and Heyl 2024) or SPRING (Goldshlager, Abrahamsen and Lin 2024), by whatever solver.

    The outputs are (B,), complex ones as (B, 2). Targets are the local energies, (B,) or complex ones as (B, 2). The
    real part of their weighted mean is `value`; centered and clipped they are the residuals. Weights are those of
    importance sampling.

    Attributes:
      clip: local energies further from their median than so many mean absolute deviations enter the gradient as if they
        were there; 5 (default) as in FermiNet (Pfau et al. 2020), `None` for none. Real and imaginary parts apart.
      centered: False for curvature without centering, E[O^H O]; what Kronecker factors take in any case (default True).
      reduction: "mean", as an energy is one; see `Loss`.
    """

    clip: float | None = 5.0
    centered: bool = True

    takes_complex: ClassVar[bool] = True
    judges_steps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduction != "mean":
            raise ValueError("VariationalEnergy is a mean over samples: leave reduction at 'mean'.")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip is {self.clip}: pass a positive number of mean absolute deviations, or None.")

    @property
    def couples_examples(self) -> bool:
        """True: the mean over samples comes out of rows and energies."""
        return True

    @property
    def by_example(self) -> VariationalEnergy:
        """Without centering of the curvature."""
        return dataclasses.replace(self, centered=False)

    def effective_weights(self, outputs: Shaped, weights: Any = None) -> jax.Array:
        """See `Loss.effective_weights`; NaN where all weights are zero, as no sample has no energy."""
        w = super().effective_weights(outputs, weights)
        return jnp.where(jnp.all(w == 0), jnp.full((), jnp.nan, w.dtype), w)

    def batch_fault(self, outputs: Shaped, targets: Any, weights: Any = None, *, signed: bool = True) -> jax.Array:
        """Looks for a sample that counts too; see `Loss.batch_fault`."""
        fault = super().batch_fault(outputs, targets, weights, signed=signed)
        if weights is None:
            return fault
        empty = jnp.where(jnp.all(jnp.asarray(weights) == 0), int(BatchFault.NO_SAMPLES), int(BatchFault.NONE))
        return jnp.maximum(fault, empty.astype(fault.dtype))

    def value(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The energy; see `Loss.value`."""
        energies = self._energies(outputs, targets, weights)
        return jnp.sum(weigh(weights, energies.reshape(*weights.shape, -1)[..., 0]))

    def rounding(self, outputs: jax.Array, targets: Any, weights: jax.Array) -> jax.Array:
        """Zero: no step is judged by the energy of the samples it was made from."""
        del targets, weights
        return jnp.zeros((), accumulation_dtype(outputs.dtype))

    def gradient(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The forces in output space, w (E - mean E); see `Loss.gradient`."""
        residuals = self._residuals(outputs, targets, weights)
        return SquaredError(centered=True).gradient(residuals, jnp.zeros_like(residuals), weights)

    def hessian_product(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.hessian_product`."""
        del targets
        return self._metric.hessian_product(outputs, outputs, weights, v)

    def factor(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, u: jax.Array) -> jax.Array:
        """See `Loss.factor`."""
        del targets
        return self._metric.factor(outputs, outputs, weights, u)

    def factor_transpose(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array, v: jax.Array) -> jax.Array:
        """See `Loss.factor_transpose`."""
        del targets
        return self._metric.factor_transpose(outputs, outputs, weights, v)

    def gradient_in_rows(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The rows t = sqrt(w) (E - mean E); see `Loss.gradient_in_rows`."""
        residuals = self._residuals(outputs, targets, weights)
        return SquaredError(centered=True).gradient_in_rows(residuals, jnp.zeros_like(residuals), weights)

    def sample_targets(self, outputs: jax.Array, targets: Any, key: jax.Array) -> jax.Array:
        """Energies drawn from a normal distribution of variance one, in the accumulation dtype."""
        return jax.random.normal(key, targets.shape, accumulation_dtype(outputs.dtype))

    def sampled_gradient(self, outputs: jax.Array, targets: Any, weights: jax.Array, key: jax.Array) -> jax.Array:
        """S z of a normal z; see `Loss.sampled_gradient`."""
        del targets
        return self._metric.sampled_gradient(outputs, outputs, weights, key)

    @property
    def _metric(self) -> SquaredError:
        return SquaredError(centered=self.centered)

    def _energies(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """Local energies like the outputs, real and imaginary parts; zero where the weight is."""
        energies = jnp.asarray(targets).astype(accumulation_dtype(outputs.dtype))
        samples, width = outputs.shape[0], math.prod(outputs.shape[1:])
        parts = energies.reshape(samples, -1)[:, :width]
        # Of a real log psi the real parts count; beside a complex one real energies have no imaginary part.
        parts = jnp.pad(parts, ((0, 0), (0, width - parts.shape[1]))).reshape(outputs.shape)
        return jnp.where(append_axes(weights, outputs.ndim) == 0, jnp.zeros_like(parts), parts)

    def _residuals(self, outputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        energies = self._energies(outputs, targets, weights)
        return energies if self.clip is None else _clipped(energies, weights, self.clip)

    def _check_targets(self, outputs: Shaped, targets: Any) -> None:
        spec = shaped(targets, "targets")
        if outputs.shape[1:] not in ((), (1,), (2,)):
            raise ValueError(
                f"log psi has shape {tuple(outputs.shape)}: return one real or complex number for each sample."
            )
        if not is_real(spec.dtype) or spec.shape[:1] != outputs.shape[:1] or spec.shape[1:] not in ((), (1,), (2,)):
            raise ValueError(
                f"the local energies are {spec.dtype}{list(spec.shape)} for {outputs.shape[0]} samples: give one real "
                "or complex number for each sample."
            )


def _clipped(energies: jax.Array, weights: jax.Array, clip: float) -> jax.Array:
    """Energies within `clip` mean absolute deviations of their median, each column for itself."""
    counted = jnp.broadcast_to(append_axes(weights, energies.ndim) > 0, energies.shape)
    median = jnp.nanmedian(jnp.where(counted, energies, jnp.nan), axis=0)
    deviation = jnp.where(counted, jnp.abs(energies - median), 0)
    spread = jnp.sum(deviation, axis=0) / jnp.maximum(jnp.sum(counted.astype(energies.dtype), axis=0), 1)
    clipped = jnp.clip(energies, median - clip * spread, median + clip * spread)
    return jnp.where(counted, clipped, jnp.zeros_like(energies))
