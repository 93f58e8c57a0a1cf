"""The preset of variational Monte Carlo."""

from __future__ import annotations

import dataclasses

import optax

from curvax.chain import ScalarOrSchedule
from curvax.curvature import GaussNewton
from curvax.damping.base import ScalarLike
from curvax.losses import VariationalEnergy
from curvax.method import Method
from curvax.methods.options import (
    AssemblyOptions,
    CGOptions,
    DampingOptions,
    ModelOptions,
    SolveRecordOptions,
    TransformOptions,
)
from curvax.methods.registry import preset
from curvax.solvers import Automatic, Cholesky, RowSpace
from curvax.structure.memory import DEFAULT_MAX_BYTES


@dataclasses.dataclass(frozen=True, kw_only=True)
class VMCOptions(CGOptions, SolveRecordOptions, TransformOptions, DampingOptions, ModelOptions, AssemblyOptions):
    """Keywords of `vmc`.

    Attributes:
      predict_fn: `log_psi(params, samples) -> (samples,)`, real or complex, each sample by itself. Parameters may be
        complex, holomorphic or not.
      x_key, y_key: keys of samples and local energies in the batch.
      weight_key: key of importance weights or a mask; `None` for none. What has weight zero does not exist.
      clip: local energies further from their median than so many mean absolute deviations count as if they were there;
        5, as in FermiNet (Pfau et al. 2020). `None` for none.
      momentum: SPRING's, towards the previous direction; 0 (default) is stochastic reconfiguration, 0.9 to 0.99 SPRING.
      lam0: 1e-3, constant, as in SPRING; NetKet's `diag_shift`. Or a schedule.
      learning_rate: units of imaginary time per step; 0.05.
      max_bytes: bound on the memory of explicit rows.
    """

    clip: float | None = 5.0
    momentum: float = 0.0
    lam0: ScalarLike | optax.Schedule | None = 1e-3
    learning_rate: ScalarOrSchedule = 0.05
    maxiter: int = 100
    max_bytes: int = DEFAULT_MAX_BYTES


@preset("Variational Monte Carlo: stochastic reconfiguration, minSR or SPRING, real and complex.", VMCOptions)
def vmc(options: VMCOptions) -> Method:
    """The natural gradient of an energy, (S + lam I)^-1 F, from samples of |psi|^2 and their local energies.

    S is the centered quantum geometric tensor (real part), F the forces (`losses.VariationalEnergy`). The planner picks
    how: minSR's matrix of samples, the matrix of parameters, or CG on either. `info["loss"]` is the energy.
    """
    rows = RowSpace(Cholesky(), momentum=options.momentum, max_bytes=options.max_bytes)
    solver = rows if options.momentum else Automatic((options.cg, rows, RowSpace(options.cg), Cholesky()))
    return options.build(
        GaussNewton(options.model, VariationalEnergy(options.clip)),
        solver,
        damping=options.damping,
        transform=options.transform,
        telemetry=options.telemetry,
    )
