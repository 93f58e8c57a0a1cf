"""Losses in output space by hand, in NumPy float64: value, gradient and Hessian blocks of every position.

With outputs f of shape (positions..., K), weights w and normalizer W (for a mean the sum of the weights, else 1) the
loss is L = sum_i w_i/W l_i(f_i). Each function returns the pieces with positions flattened; w_i/W is already in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class OutputLoss:
    """Loss at one set of outputs.

    Attributes:
        value: the loss.
        gradient: (P, K), d loss / d outputs.
        hessian: (P, K, K), the block of every position; there is nothing between positions.
        weights: (P,), the weight over the normalizer.
        position_gradient: (P, K), gradient of each position's own l_i, without its weight.
    """

    value: float
    gradient: np.ndarray
    hessian: np.ndarray
    weights: np.ndarray
    position_gradient: np.ndarray


LossFunction = Callable[..., OutputLoss]


def _rows(outputs: Any) -> np.ndarray:
    outputs = np.asarray(outputs, np.float64)
    return outputs.reshape(-1, outputs.shape[-1] if outputs.ndim > 1 else 1)


def _omega(positions: int, weights: Any, reduction: str) -> np.ndarray:
    w = np.ones(positions) if weights is None else np.asarray(weights, np.float64).reshape(-1)
    if w.size != positions:
        w = np.repeat(w, positions // w.size)
    total = w.sum() if reduction == "mean" else 1.0
    return w / total if total else np.zeros_like(w)


def _assemble(values: np.ndarray, gradient: np.ndarray, hessian: np.ndarray, weights: np.ndarray) -> OutputLoss:
    return OutputLoss(
        value=float(weights @ values),
        gradient=weights[:, None] * gradient,
        hessian=weights[:, None, None] * hessian,
        weights=weights,
        position_gradient=gradient,
    )


def softmax_cross_entropy(
    outputs: Any, targets: Any, weights: Any = None, reduction: str = "mean", label_smoothing: float = 0.0
) -> OutputLoss:
    """l = c logsumexp(f) - y.f with c the sum of y; integer targets become one-hot rows."""
    f = _rows(outputs)
    targets = np.asarray(targets)
    if np.issubdtype(targets.dtype, np.integer):
        y = (targets.reshape(-1, 1) == np.arange(f.shape[1])).astype(np.float64)
    else:
        y = np.asarray(targets, np.float64).reshape(f.shape)
    mass = y.sum(1, keepdims=True)
    y = (1.0 - label_smoothing) * y + label_smoothing * mass / f.shape[1]
    top = f.max(1, keepdims=True)
    p = np.exp(f - top)
    total = p.sum(1, keepdims=True)
    p = p / total
    values = mass[:, 0] * (np.log(total) + top)[:, 0] - (y * f).sum(1)
    blocks = mass[:, :, None] * (p[:, :, None] * np.eye(f.shape[1]) - p[:, :, None] * p[:, None, :])
    return _assemble(values, mass * p - y, blocks, _omega(len(f), weights, reduction))


def squared_error(outputs: Any, targets: Any, weights: Any = None, reduction: str = "mean") -> OutputLoss:
    """l = 1/2 |f - y|^2, summed over the outputs of a position."""
    f = _rows(outputs)
    residual = f - np.asarray(targets, np.float64).reshape(f.shape)
    blocks = np.broadcast_to(np.eye(f.shape[1]), (len(f), f.shape[1], f.shape[1]))
    return _assemble(0.5 * (residual**2).sum(1), residual, blocks, _omega(len(f), weights, reduction))


def sigmoid_cross_entropy(outputs: Any, targets: Any, weights: Any = None, reduction: str = "mean") -> OutputLoss:
    """l = sum_k log(1 + e^f) - y f."""
    f = _rows(outputs)
    y = np.asarray(targets, np.float64).reshape(f.shape)
    p = 1.0 / (1.0 + np.exp(-f))
    blocks = (p * (1.0 - p))[:, :, None] * np.eye(f.shape[1])
    return _assemble((np.logaddexp(0.0, f) - y * f).sum(1), p - y, blocks, _omega(len(f), weights, reduction))


def poisson(outputs: Any, targets: Any, weights: Any = None, reduction: str = "mean") -> OutputLoss:
    """l = sum_k e^f - y f with log-rates f."""
    f = _rows(outputs)
    y = np.asarray(targets, np.float64).reshape(f.shape)
    rate = np.exp(f)
    blocks = rate[:, :, None] * np.eye(f.shape[1])
    return _assemble((rate - y * f).sum(1), rate - y, blocks, _omega(len(f), weights, reduction))
