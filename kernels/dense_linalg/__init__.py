"""Dense factorizations of many matrices at once: Cholesky, triangular solves, eigenvectors, QR; see `api`."""

from __future__ import annotations

from curvax.kernels.dense_linalg.api import (
    CHOLESKY,
    EIGH,
    OPS,
    QR,
    TRIANGULAR_SOLVE,
    CholeskyFactor,
    Eigenpairs,
    QrFactors,
    cholesky,
    eigh,
    qr,
    triangular_solve,
)

__all__ = [
    "CHOLESKY",
    "EIGH",
    "OPS",
    "QR",
    "TRIANGULAR_SOLVE",
    "CholeskyFactor",
    "Eigenpairs",
    "QrFactors",
    "cholesky",
    "eigh",
    "qr",
    "triangular_solve",
]
