"""SOAP, Shampoo and Adam as their papers write them, in NumPy, with epsilons relative to the gradients."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.oracle.compiling import quick_jit


def updates(tx: Any, grads: list[Any]) -> list[Any]:
    """The updates of a transformation, one after another."""
    return many_updates(tx, [grads])[0]


def many_updates(tx: Any, histories: list[list[Any]]) -> list[list[Any]]:
    """The same for several histories of gradients of the same shapes."""
    update, found = quick_jit(tx.update), []
    for grads in histories:
        state, own = tx.init(grads[0]), []
        for g in grads:
            u, state = update(g, state, grads[0])  # parameters that no weight decay looks at
            own.append(u)
        found.append(own)
    return found


def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * values**exponent) @ vectors.conj().T


def shampoo_by_hand(history: list[np.ndarray], eps: float, every: int, beta2: float | None, long: bool) -> np.ndarray:
    """The last update; the roots are those of the last refresh."""
    last = (len(history) - 1) // every * every
    seen = history[: last + 1]
    weights = [1.0] * len(seen)
    if beta2 is not None:
        weights = [(1 - beta2) * beta2 ** (len(seen) - 1 - i) / (1 - beta2 ** len(seen)) for i in range(len(seen))]
    g = history[-1]

    def damped(products: Any) -> np.ndarray:
        factor = np.sum([w * x for w, x in zip(weights, products, strict=True)], axis=0)
        return factor + eps * np.mean(np.diag(factor)) * np.eye(factor.shape[0])

    if g.ndim == 1:
        return power(damped([np.outer(x, x.conj()) for x in seen]), -0.5) @ g
    left, right = damped([x @ x.conj().T for x in seen]), damped([x.conj().T @ x for x in seen])
    left = np.diag(np.diag(left)) if long else left
    return power(left, -0.25) @ g @ power(right, -0.25)


def soap_by_hand(history: list[np.ndarray], b1: float, b2: float, eps: float, every: int, long: bool) -> np.ndarray:
    """Algorithm 3 of the paper, with Adam's bias corrections and a relative epsilon; the last update."""
    m, n = history[0].shape
    dtype = history[0].dtype
    left, right, mean, square = np.zeros((m, m)), np.zeros((n, n)), np.zeros((m, n), dtype), np.zeros((m, n))
    ql, qr, update = np.eye(m), np.eye(n), np.zeros((m, n))
    for t, g in enumerate(history, 1):
        left, right = b2 * left + (1 - b2) * g @ g.conj().T, b2 * right + (1 - b2) * g.conj().T @ g
        if t == 1:
            ql = ql if long else np.linalg.eigh(left)[1][:, ::-1]
            qr = np.linalg.eigh(right)[1][:, ::-1]
        mean = b1 * mean + (1 - b1) * g
        square = b2 * square + (1 - b2) * np.abs(ql.conj().T @ g @ qr) ** 2
        root = np.sqrt(square / (1 - b2**t))
        inside = (ql.conj().T @ mean @ qr / (1 - b1**t)) / (root + eps * np.sqrt(np.mean(root**2)))
        update = ql @ inside @ qr.conj().T
        if t % every == 0:
            if not long:
                order = np.argsort(-np.diag(ql.conj().T @ left @ ql).real)
                ql, square = np.linalg.qr(left @ ql[:, order])[0], square[order]
            order = np.argsort(-np.diag(qr.conj().T @ right @ qr).real)
            qr, square = np.linalg.qr(right @ qr[:, order])[0], square[:, order]
    return update


def adam_by_hand(history: list[np.ndarray], b1: float, b2: float, eps: float) -> np.ndarray:
    """Adam with a relative epsilon; the last update."""
    mean = sum((1 - b1) * b1**i * g for i, g in enumerate(reversed(history))) / (1 - b1 ** len(history))
    square = sum((1 - b2) * b2**i * g**2 for i, g in enumerate(reversed(history))) / (1 - b2 ** len(history))
    return mean / (np.sqrt(square) + eps * np.sqrt(np.mean(square)))
