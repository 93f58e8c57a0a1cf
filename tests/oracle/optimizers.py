"""SOAP, Shampoo and Adam as their papers write them, in NumPy, with epsilons relative to the gradients."""

from __future__ import annotations

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Soap:
    """Algorithm 3 of the paper, with Adam's bias corrections and a relative epsilon, and its variants.

    `sides` have a basis, which the updates after `start` use; `exact` bases are eigenvectors at every refresh. `kl`
    weighs each term of a factor by the inverse of the other (arXiv 2509.03378), damped by 1e-4 of its mean.
    """

    b1: float
    b2: float
    eps: float
    every: int
    sides: tuple[int, ...] = (0, 1)
    start: int = 0
    exact: bool = False
    kl: bool = False

    def last(self, history: list[np.ndarray]) -> np.ndarray:
        """The last update."""
        shape, dtype = history[0].shape, history[0].dtype
        factors, bases = [np.zeros((d, d), dtype) for d in shape], [np.eye(d, dtype=dtype) for d in shape]
        mean, square, update = np.zeros(shape, dtype), np.zeros(shape), np.zeros(shape)
        for t, g in enumerate(history, 1):
            terms = [self._term(g, side, t, factors, bases) for side in (0, 1)]
            factors = [self.b2 * old + (1 - self.b2) * new for old, new in zip(factors, terms, strict=True)]
            if t == self.start + 1:
                for side in self.sides:
                    bases[side] = np.linalg.eigh(factors[side])[1][:, ::-1]
                    weights = np.abs(bases[side].conj().T) ** 2
                    square = weights @ square if side == 0 else square @ weights.T
            ql, qr = bases
            mean = self.b1 * mean + (1 - self.b1) * g
            square = self.b2 * square + (1 - self.b2) * np.abs(ql.conj().T @ g @ qr.conj()) ** 2
            root = np.sqrt(square / (1 - self.b2**t))
            inside = ql.conj().T @ mean @ qr.conj() / (1 - self.b1**t)
            update = ql @ (inside / (root + self.eps * np.sqrt(np.mean(root**2)))) @ qr.T
            for side in self.sides if t % self.every == 0 and t > self.start else ():
                basis, factor = bases[side], factors[side]
                order = np.argsort(-np.real(np.diag(basis.conj().T @ factor @ basis)))
                square = square[order] if side == 0 else square[:, order]
                exact = np.linalg.eigh(factor)[1][:, ::-1] if self.exact else None
                bases[side] = np.linalg.qr(factor @ basis[:, order])[0] if exact is None else exact
        return update

    def _term(self, g: np.ndarray, side: int, t: int, factors: list[np.ndarray], bases: list[np.ndarray]) -> np.ndarray:
        x, other = (g if side == 0 else g.T), 1 - side
        if not self.kl:
            return x @ x.conj().T
        if t == 1 or other not in self.sides:
            return x @ x.conj().T / np.sqrt(np.mean(np.abs(g) ** 2)) / x.shape[1]
        values = np.real(np.diag(bases[other].conj().T @ factors[other] @ bases[other])) / (1 - self.b2 ** (t - 1))
        turned = x @ bases[other].conj()
        return turned / (values + 1e-4 * np.mean(values)) @ turned.conj().T / x.shape[1]


def soap_by_hand(history: list[np.ndarray], b1: float, b2: float, eps: float, every: int, long: bool) -> np.ndarray:
    """The last update of SOAP, of a matrix whose rows are too many for a basis if it is `long`."""
    return Soap(b1, b2, eps, every, (1,) if long else (0, 1)).last(history)


def kl_shampoo_by_hand(history: list[np.ndarray], b2: float, eps: float, every: int) -> np.ndarray:
    """The last update of KL-Shampoo (arXiv 2509.03378), L^(-1/2) G R^(-1/2), with damped roots of the last refresh."""
    factors = [np.zeros((d, d)) for d in history[0].shape]
    roots: list[np.ndarray] = []
    for t, g in enumerate(history, 1):
        scale = np.sqrt(np.mean(g**2))
        inverses = [root @ root for root in roots] if roots else [np.eye(d) / scale for d in g.shape]
        terms = [g @ inverses[1] @ g.T / g.shape[1], g.T @ inverses[0] @ g / g.shape[0]]
        factors = [b2 * old + (1 - b2) * new for old, new in zip(factors, terms, strict=True)]
        if (t - 1) % every == 0:
            means = [f / (1 - b2**t) for f in factors]
            roots = [power(f + eps * np.mean(np.diag(f)) * np.eye(len(f)), -0.5) for f in means]
    return roots[0] @ history[-1] @ roots[1]


def muon_by_hand(history: list[np.ndarray], beta: float, nesterov: bool, coefficients: Any) -> np.ndarray:
    """The last update of Muon before any scaling, by its author's formulas on singular values."""
    mean = np.zeros_like(history[0])
    for g in history:
        mean = beta * mean + (1 - beta) * g
    ahead = beta * mean + (1 - beta) * history[-1] if nesterov else mean
    u, values, vt = np.linalg.svd(ahead, full_matrices=False)
    values = values / np.linalg.norm(values)
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return (u * values) @ vt


def adam_by_hand(history: list[np.ndarray], b1: float, b2: float, eps: float) -> np.ndarray:
    """Adam with a relative epsilon; the last update."""
    mean = sum((1 - b1) * b1**i * g for i, g in enumerate(reversed(history))) / (1 - b1 ** len(history))
    square = sum((1 - b2) * b2**i * g**2 for i, g in enumerate(reversed(history))) / (1 - b2 ** len(history))
    return mean / (np.sqrt(square) + eps * np.sqrt(np.mean(square)))
