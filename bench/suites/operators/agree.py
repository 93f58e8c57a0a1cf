"""Laplace posteriors of curvax beside those of laplace-torch, on the same weights and data.

    python -m bench.suites.operators.agree PATH/bin/python

Prints relative differences of the evidence and of the covariances of five points' outputs. Full and diagonal ones are
the same quantity; Kronecker factors differ, as laplace-torch keeps biases in factors of their own.
"""

from __future__ import annotations

import pathlib
import sys

import jax
import numpy as np

from bench.suites.operators import peers
from bench.workloads import SMALL
from curvax import laplace
from curvax.losses import SoftmaxCrossEntropy

FORMS = {"full": laplace.Full(), "diag": laplace.Diagonal(), "kron": laplace.KFAC()}


def main(python: pathlib.Path) -> None:
    """Prints a line for each form."""
    theirs = peers.agreement(python, SMALL, 32)
    batch = SMALL.batch(32)
    for name, (evidence, covariance) in theirs.items():
        posterior = laplace.fit(SMALL.predict, SoftmaxCrossEntropy(), SMALL.params(), batch, form=FORMS[name])
        own = np.asarray(posterior.predict(batch["x"][:5]).covariance)
        apart = np.abs(own - np.asarray(covariance)).max() / np.abs(own).max()
        mine = float(jax.block_until_ready(posterior.log_marginal_likelihood()))
        print(f"{name}: evidence {mine:.6g} and {evidence:.6g}, covariances differ by {apart:.1e}")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
