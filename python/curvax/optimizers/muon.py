"""Muon on hidden matrices and AdamW on the rest, as one Optax transformation."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable

import optax

from curvax.chain import check_rates
from curvax.keywords import spread
from curvax.meshes import on_any_mesh
from curvax.numbers import Number, check_fraction
from curvax.optimizers.axes import LastTwoAxes, MatrixRule, NoMatrices
from curvax.optimizers.labels import Other, hidden_matrices, hidden_matrices_by_name
from curvax.optimizers.orthogonal import JORDAN, NewtonSchulz, UpdateScale, WidthScale, scale_by_muon
from curvax.optimizers.soap import scale_by_soap


@dataclasses.dataclass(frozen=True)
class MuonAdamWOptions:
    """The keywords of `muon_adamw`.

    Attributes:
      learning_rate: of Muon, and of AdamW unless it has its own.
      others: what AdamW takes of the matrices: paths ("embed", "params/lm_head"), compiled patterns, or functions of
        path and shape, as in `hidden_matrices`; every path must be there. `()` where nothing is meant. By default,
        `None`, embeddings and heads by their names (`hidden_matrices_by_name`).
      adamw_learning_rate: `None` for the same.
      b1, b2: AdamW's; 0.9 and 0.999 as in the paper.
      weight_decay: of both, times the learning rate.
      beta, nesterov, iteration, scale, matrices: as in `scale_by_muon`. What `matrices` calls no matrix is AdamW's.
    """

    learning_rate: optax.ScalarOrSchedule
    _: dataclasses.KW_ONLY
    others: tuple[Other, ...] | None = None
    adamw_learning_rate: optax.ScalarOrSchedule | None = None
    b1: Number = 0.9
    b2: Number = 0.999
    weight_decay: Number = 0.0
    beta: Number = 0.95
    nesterov: bool = True
    iteration: NewtonSchulz = JORDAN
    scale: UpdateScale = WidthScale()
    matrices: MatrixRule = LastTwoAxes()

    def check(self) -> None:
        """Raises for keywords out of range or of another kind."""
        if isinstance(self.others, str):
            raise TypeError(
                f"muon_adamw: others is the string {self.others!r}: pass a tuple of names, ({self.others!r},)."
            )
        check_rates(self.learning_rate, self.weight_decay, b1=self.b1, b2=self.b2)
        check_fraction("beta", self.beta)
        if self.adamw_learning_rate is not None:
            check_rates(self.adamw_learning_rate, self.weight_decay)


@spread(MuonAdamWOptions)
def muon_adamw(options: MuonAdamWOptions) -> optax.GradientTransformationExtraArgs:
    """`scale_by_muon` on hidden matrices and AdamW on everything else, each with weight decay and a learning rate.

    AdamW's epsilon, 1e-8, is relative to the root mean square of a leaf's second moments: nothing depends on the scale
    of the gradients, and state is in float32 or wider.

    Raises:
      TypeError: `others` is a single string, or a rate is neither a number nor a schedule.
      ValueError: a rate is out of its range.
      ValueError (in `init`): one of `others` is no path of the parameters.
      TypeError (in `init`): a matrix that Muon would take is complex.
    """
    options.check()
    muon = scale_by_muon(
        beta=options.beta,
        nesterov=options.nesterov,
        iteration=options.iteration,
        scale=options.scale,
        matrices=options.matrices,
    )
    adam = scale_by_soap(b1=options.b1, b2=options.b2, matrices=NoMatrices())
    own = options.adamw_learning_rate
    parts: dict[Hashable, optax.GradientTransformation] = {
        "muon": _rated(muon, options.learning_rate, options.weight_decay),
        "adamw": _rated(adam, options.learning_rate if own is None else own, options.weight_decay),
    }
    if options.others is None:
        labels = functools.partial(hidden_matrices_by_name, matrices=options.matrices)
    else:
        labels = hidden_matrices(*options.others, matrices=options.matrices)
    return on_any_mesh(optax.partition(parts, labels))


def _rated(
    direction: optax.GradientTransformation, rate: optax.ScalarOrSchedule, weight_decay: Number
) -> optax.GradientTransformation:
    return optax.chain(direction, optax.add_decayed_weights(weight_decay), optax.scale_by_learning_rate(rate))
