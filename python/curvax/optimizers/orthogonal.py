"""Muon (Jordan et al. 2024): steps along the orthogonal factor of the momentum, and what these steps are scaled by.

Muon replaces the momentum M = U S V^T of a matrix by about U V^T, with all singular values near 1. A polynomial
a x + b x^3 + c x^5 of a matrix acts on its singular values alone, and a few of them, one after the other, bring all
values that are not too small near 1 (Newton-Schulz iterations):

    M / |M|_F = U S V^T  --a X + (b A + c A A) X, A = X X^T-->  U p(S) V^T  --...-->  about U V^T

    singular values      0.01   0.1   0.9
    five times JORDAN    0.70   0.71  0.68
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax

from curvax import tree
from curvax.meshes import on_any_mesh
from curvax.numbers import Number, check_fraction, check_positive
from curvax.optimizers.axes import LastTwoAxes, MatrixRule
from curvax.optimizers.matrices import decayed, finite_parts
from curvax.optimizers.views import MatrixViews
from curvax.state_version import pickled


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """Newton-Schulz iterations by their polynomials.

    Products are of the default precision, as low as the device makes it: the result is near orthogonal, not exact.

    Attributes:
      coefficients: (a, b, c) of each iteration.
    """

    coefficients: tuple[tuple[float, float, float], ...]

    def __post_init__(self) -> None:
        if not self.coefficients or any(len(of) != 3 for of in self.coefficients):
            raise ValueError("NewtonSchulz: coefficients must be (a, b, c) triples, one or more.")

    def __call__(self, x: jax.Array) -> jax.Array:
        """About U V^T of matrices (..., m, n) = U S V^T; zero of a zero matrix."""
        if not x.size:
            return x
        # 1. Singular values of 1 at most. The division by a power of two first keeps squares within range.
        x = x / tree.divisor(jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True))
        norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
        x = x / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        # 2. The polynomials, on the shorter side.
        tall = x.shape[-2] > x.shape[-1]
        x = jnp.swapaxes(x, -1, -2) if tall else x

        def iterate(x: jax.Array, of: jax.Array) -> tuple[jax.Array, None]:
            square = x @ jnp.swapaxes(x, -1, -2)
            return of[0] * x + (of[1] * square + of[2] * square @ square) @ x, None

        x, _ = jax.lax.scan(iterate, x, jnp.asarray(self.coefficients, x.dtype))
        return jnp.swapaxes(x, -1, -2) if tall else x


JORDAN = NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)
"""Five times the polynomial of Muon's author: steep at zero, and values between about 0.7 and 1.2 in the end."""

DION = NewtonSchulz(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    )
)
"""Those of Ahn et al. 2025 (arXiv 2504.05295)."""

_SAFETY = 1.01
POLAR_EXPRESS = NewtonSchulz(
    (
        *(
            (a / _SAFETY, b / _SAFETY**3, c / _SAFETY**5)
            for a, b, c in (
                (8.28721201814563, -23.595886519098837, 17.300387312530933),
                (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
            )
        ),
        (1.875, -1.25, 0.375),
    )
)
"""Eight of the best polynomials for values down to 1e-3, with a margin (Amsel et al. 2025, arXiv 2505.16932)."""


class UpdateScale(abc.ABC):
    """What an orthogonal update is multiplied by. An implementor is a frozen dataclass with `factor`."""

    @abc.abstractmethod
    def factor(self, rows: int, columns: int) -> float:
        """For a matrix of `rows` inputs and `columns` outputs."""


@dataclasses.dataclass(frozen=True)
class WidthScale(UpdateScale):
    """max(1, outputs / inputs)^0.5, of Muon's author."""

    def factor(self, rows: int, columns: int) -> float:
        """The root of the ratio, 1 at least."""
        return max(1.0, columns / rows) ** 0.5


@dataclasses.dataclass(frozen=True)
class RmsScale(UpdateScale):
    """rms max(inputs, outputs)^0.5, so that entries are as large as AdamW's (Liu et al. 2025, arXiv 2502.16982).

    Attributes:
      rms: root mean square of the entries of the update; 0.2 as in the paper.
    """

    rms: float = 0.2

    def __post_init__(self) -> None:
        check_positive("rms", self.rms)

    def factor(self, rows: int, columns: int) -> float:
        """Rms times the root of the longer side."""
        return self.rms * max(rows, columns) ** 0.5


@dataclasses.dataclass(frozen=True)
class NoScale(UpdateScale):
    """1: the orthogonal factor as it is."""

    def factor(self, rows: int, columns: int) -> float:
        """One."""
        del rows, columns
        return 1.0


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      skipped: gradients that were not finite, int32; they left the mean as it was.
      mean: average gradients; a tree like the parameters.
    """

    skipped: jax.Array
    mean: Any

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled with the version of its form."""
        return pickled(self)


def scale_by_muon(
    *,
    beta: Number = 0.95,
    nesterov: bool = True,
    iteration: NewtonSchulz = JORDAN,
    scale: UpdateScale = WidthScale(),
    matrices: MatrixRule = LastTwoAxes(),  # noqa: B008
) -> optax.GradientTransformation:
    """Muon's direction: the orthogonal factor of each matrix's momentum, scaled by its shape.

    All leaves must be real matrices or stacks of them; `muon_adamw` has an optimizer for the others. Momentum and
    iterations are in float32 or wider. Gradients with an entry that is not finite are skipped as a whole: the update is
    zero, the mean stays as it was, and `skipped` counts them.

    Args:
      beta: decay of the mean; 0.95 as the author has it.
      nesterov: orthogonalize beta mean + (1 - beta) gradient, not the mean; `True` as the author has it.
      iteration: the polynomials; `JORDAN`, `DION`, `POLAR_EXPRESS` or others.
      scale: `WidthScale()`, the author's; `RmsScale()` makes AdamW's learning rates fit.
      matrices: which axes are inputs (rows) and outputs (columns); the last two by default. `MatrixAxes.column_parts`
        orthogonalizes queries, keys and values in one array each for itself.

    Raises:
      ValueError: `beta` is not in [0, 1).
      ValueError (in `init`): a leaf is no matrix.
    """
    check_fraction("beta", beta)

    def init(params: Any) -> MuonState:
        for view in MatrixViews.of(params, matrices).views:
            if view.axes is None and 0 not in view.shape:
                raise ValueError(
                    f"{view.path} {view.shape} is no matrix: label it for another optimizer, as muon_adamw."
                )
        return MuonState(jnp.zeros((), jnp.int32), tree.zeros_like(params))

    def update(updates: Any, state: MuonState, params: Any = None) -> tuple[Any, MuonState]:
        del params
        leaves, structure = jax.tree.flatten(updates)
        views, (finite, clean) = MatrixViews.of(updates, matrices), finite_parts(updates)
        taken = jnp.asarray(True)
        # 1. The mean, and Nesterov's look ahead.
        mean = [decayed(m, g, beta, finite) for m, g in zip(jax.tree.leaves(state.mean), clean, strict=True)]
        ahead = [decayed(g, m, 1 - beta, taken) for m, g in zip(mean, clean, strict=True)] if nesterov else mean
        # 2. Its orthogonal factor, scaled.
        stacks = [scale.factor(*x.shape[-2:]) * iteration(x) if x.size else x for x in views.split(ahead)]
        found = zip(views.join(stacks), leaves, strict=True)
        narrow = [jnp.where(finite, x, jnp.zeros_like(x)).astype(g.dtype) for x, g in found]
        after = jax.tree.unflatten(jax.tree.structure(state.mean), mean)
        skipped = state.skipped + (~finite).astype(jnp.int32)
        return jax.tree.unflatten(structure, narrow), MuonState(skipped, after)

    return on_any_mesh(optax.GradientTransformation(cast(Any, init), cast(Any, update)))
