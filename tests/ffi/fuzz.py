"""Calls the CPU handlers with random operands, most of them legal and some spoiled; test_fuzz runs it in a process.

    python tests/ffi/fuzz.py SEED CALLS

A legal call gives what float64 NumPy gives, every other is a Python error that names the op and what does not fit.
Prints "<answered> <refused>".
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import numpy as np

from curvax import ffi

jax.config.update("jax_enable_x64", True)

# What every refusal says after the op's name: a count, a shape or a dtype, and what would fit.
SENTENCE = re.compile(
    r"curvax (cg_update|cg_direction|dots|gram_accumulate|batched_cholesky_solve"
    r"|cholesky|triangular_solve|eigh|qr): ("
    r"got \d+ (operands|results).*, expected .*"
    r"|(operand|result) \d+ has (shape \(.*\)|dtype \w+), expected .*"
    r"|dtype \w+ is not supported; use F32 or F64"
    r"|result 0 is a scalar, expected \(\.\.\., n\)"
    r"|operand 0 has shape \(.*\), expected (square matrices|\(\.\.\., rows, columns\))"
    r"|leaf \d+ of shape \(.*\) does not begin with the batch axes \(.*\) of the scalar)"
)
SPECIAL = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-45, 1e18)


Answer: TypeAlias = tuple[np.ndarray, np.ndarray]


@dataclass
class Call:
    """A foreign call and its answer: per result the float64 value and the sum of the magnitudes that make it up.

    Of a result that is `lower` only the lower triangle is said.
    """

    target: str
    operands: list[np.ndarray]
    results: list[jax.ShapeDtypeStruct]
    answer: Callable[[list[np.ndarray]], list[Answer]]
    attributes: dict[str, Any] = field(default_factory=dict)
    lower: bool = False


def total(terms: list[np.ndarray]) -> Answer:
    """Element by element."""
    return sum(terms[1:], terms[0]), sum((abs(term) for term in terms[1:]), abs(terms[0]))


def product(batch: tuple[int, ...], a: list[np.ndarray], b: list[np.ndarray]) -> Answer:
    """The inner products of two vectors, one per batch member."""
    terms = [wide(u) * wide(v) for u, v in zip(a, b, strict=True)]
    rows = [term.reshape(*batch, math.prod(term.shape[len(batch) :])) for term in terms]
    row = np.concatenate([np.zeros((*batch, 0)), *rows], axis=-1)
    return row.sum(-1), abs(row).sum(-1)


def wide(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64)


def meet(a: Any, d: Any, b: Any, e: Any) -> np.ndarray:
    """Inner products of the rows of (a, d) with those of (b, e), a pair of axes for examples and one for rows."""
    inner = np.einsum("...xgrto,...ygsuo->...gtuxrys", wide(d), wide(e))
    if a is not None:
        inner *= np.einsum("...xgti,...ygui->...gtuxy", wide(a), wide(b))[..., :, None, :, None]
    return inner.sum((-7, -6, -5))


def mirrored(lower: np.ndarray) -> np.ndarray:
    """What stands below the diagonal, above it."""
    return np.swapaxes(np.tril(lower, -1), -1, -2)


class Maker:
    """Random calls."""

    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def shapes(self) -> list[tuple[int, ...]]:
        if self.rng.random() < 0.03:
            return [(int(n),) for n in self.rng.integers(0, 3, 1000)]
        choose = [(), (0,), (1,), (3, 0, 2), (5,), (7, 11), (4095,), (4097,), (2, 3, 4, 5)]
        return [choose[i] for i in self.rng.integers(0, len(choose), self.rng.integers(1, 7))]

    def array(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        values = np.asarray(self.rng.standard_normal(shape), dtype)
        if values.size and self.rng.random() < 0.1:
            values.flat[self.rng.integers(values.size)] = self.rng.choice(SPECIAL)
        return values

    def call(self) -> Call:
        kinds = (self.vectors, self.gram, self.systems, self.factorizations)
        return kinds[self.rng.choice(4, p=(0.5, 0.2, 0.15, 0.15))]()

    def gram(self) -> Call:
        """Layers of factors, of one side or two, with or without what they are added to."""
        dtype = (np.float32, np.float64)[self.rng.integers(2)]
        batch = ((), (2,), (0,))[self.rng.choice(3, p=(0.7, 0.2, 0.1))]
        examples, others = self.rng.choice([0, 1, 3, 30, 70], 2)
        per = int(self.rng.choice([1, 2, 9]))
        start, against, mirror = self.rng.integers(0, 2, 3)
        others = int(others if against else examples)
        operands: list[np.ndarray] = []
        made, scaled = [], []
        shape = (*batch, int(examples) * per, others * per)
        if start:
            operands.append(self.array(shape, dtype))
        for _ in range(self.rng.integers(1, 4)):
            blocks, positions = (int(n) for n in self.rng.integers(1, 3, 2))
            into, out = (int(n) for n in self.rng.choice([0, 1, 5, 300], 2, p=(0.1, 0.4, 0.4, 0.1)))
            scaled.append(int(self.rng.integers(2)))
            sides = []
            for count in (int(examples), others)[: 1 + against]:
                a = self.array((*batch, count, blocks, positions, into), dtype) if scaled[-1] else None
                d = self.array((*batch, count, blocks, per, positions, out), dtype)
                operands += [d] if a is None else [a, d]
                sides.append((a, d))
            made.append(sides)
        given = list(operands)

        def answer(results: list[np.ndarray]) -> list[Answer]:
            del results
            terms = [wide(given[0]) if start else np.zeros(shape)]
            sizes = [abs(terms[0])]
            for sides in made:
                (a, d), (b, e) = sides[0], sides[-1]
                terms.append(meet(a, d, b, e).reshape(shape))
                sizes.append(meet(*(None if x is None else abs(x) for x in (a, d, b, e))).reshape(shape))
            total, size = np.sum(terms, axis=0), np.sum(sizes, axis=0)
            if not against:
                total, size = np.tril(total), np.tril(size)
            if mirror and not against:
                total, size = total + mirrored(total), size + mirrored(size)
            return [(total, size)]

        attributes = {
            "scaled": np.asarray(scaled, np.int64),
            **{k: np.int64(v) for k, v in (("start", start), ("against", against), ("mirror", mirror))},
        }
        lower = not against and not mirror
        return Call("curvax_gram_accumulate", operands, [jax.ShapeDtypeStruct(shape, dtype)], answer, attributes, lower)

    def systems(self) -> Call:
        """Systems that are nearly diagonal, the matrices shared or not."""
        dtype = (np.float32, np.float64)[self.rng.integers(2)]
        batch = ((), (3,), (2, 2), (0,))[self.rng.integers(4)]
        own = batch if self.rng.random() < 0.5 else (1,) * len(batch)
        n = int(self.rng.choice([0, 1, 5, 33, 130, 270]))
        half = self.rng.standard_normal((*own, n, n))
        matrices = np.asarray(half + np.swapaxes(half, -1, -2) + 6 * math.sqrt(n + 1) * np.eye(n), dtype)
        rhs = self.array((*batch, n), dtype)
        damping = np.full((1,) * len(batch), self.rng.random(), dtype)
        results = [
            jax.ShapeDtypeStruct((*batch, n), dtype),
            *[jax.ShapeDtypeStruct(batch, np.int32)] * 2,
            jax.ShapeDtypeStruct(batch, dtype),
        ]

        def answer(results: list[np.ndarray]) -> list[Answer]:
            a = wide(matrices) + wide(damping)[..., None, None] * np.eye(n)
            finite = np.all(np.isfinite(wide(rhs)), axis=-1)
            x = np.linalg.solve(
                np.broadcast_to(a, (*batch, n, n)), np.where(finite[..., None], wide(rhs), 0)[..., None]
            )
            x = np.where(finite[..., None], x[..., 0], np.nan)
            size = np.broadcast_to(np.linalg.norm(x, axis=-1, keepdims=True), x.shape)
            code = np.where(finite, 0.0, 4.0)
            return [(x, size), (code, code), (0 * code, 0 * code), (wide(results[3]), code)]

        return Call("curvax_batched_cholesky_solve", [matrices, rhs, damping], results, answer)

    def factorizations(self) -> Call:
        """Stacks of matrices that are nearly diagonal; what factors make together is the answer."""
        dtype = (np.float32, np.float64)[self.rng.integers(2)]
        batch = ((), (3,), (2, 2), (0,))[self.rng.integers(4)]
        n, c = (int(k) for k in self.rng.choice([0, 1, 5, 33, 70], 2))
        half = self.rng.standard_normal((*batch, n, n))
        matrices = np.asarray(half + np.swapaxes(half, -1, -2) + 6 * math.sqrt(n + 1) * np.eye(n), dtype)
        a, identity = wide(matrices), np.broadcast_to(np.eye(n), matrices.shape)
        size, ends = np.full(matrices.shape, 20.0 * (n + 1)), (np.zeros(batch), np.zeros(batch))
        square, end = jax.ShapeDtypeStruct(matrices.shape, dtype), jax.ShapeDtypeStruct(batch, np.int32)

        def same(given: np.ndarray, product: np.ndarray, want: np.ndarray) -> Answer:
            return wide(given) + want - product, size

        def eigh(results: list[np.ndarray]) -> list[Answer]:
            values, vectors = wide(results[0]), wide(results[1])
            made = vectors * values[..., None, :] @ np.swapaxes(vectors, -1, -2)
            return [(np.linalg.eigvalsh(a), np.full(values.shape, 20.0 * (n + 1))), same(vectors, made, a), ends]

        def qr(results: list[np.ndarray]) -> list[Answer]:
            q, r = map(wide, results[:2])
            return [same(q, np.swapaxes(q, -1, -2) @ q, identity), same(r, q @ r, a), ends]

        kind = self.rng.integers(4)
        if kind == 0:
            values = jax.ShapeDtypeStruct(matrices.shape[:-1], dtype)
            return Call("curvax_eigh", [matrices], [values, square, end], eigh)
        if kind == 1:
            return Call("curvax_qr", [matrices], [square, square, end], qr)
        if kind == 2:
            return Call("curvax_cholesky", [matrices], [square, end], lambda _: [(np.linalg.cholesky(a), size), ends])
        rhs = np.asarray(self.rng.standard_normal((*batch, n, c)), dtype)
        answer = np.linalg.solve(np.tril(a), wide(rhs)), np.full(rhs.shape, 20.0 * (n + 1))
        result = jax.ShapeDtypeStruct(rhs.shape, dtype)
        attributes = {"transpose": np.int64(0)}
        return Call("curvax_triangular_solve", [matrices, rhs], [result], lambda _: [answer], attributes)

    def vectors(self) -> Call:
        """The vector work of conjugate gradients."""
        dtype = (np.float32, np.float64)[self.rng.integers(2)]
        batch = ((), (3,), (2, 2), (0,))[self.rng.choice(4, p=(0.6, 0.2, 0.15, 0.05))]
        shapes = [batch + shape for shape in self.shapes()]
        n = len(shapes)

        def vector() -> list[np.ndarray]:
            return [self.array(shape, dtype) for shape in shapes]

        def like(leaves: list[np.ndarray]) -> list[jax.ShapeDtypeStruct]:
            return [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

        def scalars(leaf: np.ndarray, scalar: np.ndarray) -> np.ndarray:
            return scalar.astype(np.float64).reshape(batch + (1,) * (leaf.ndim - len(batch)))

        scalar = jax.ShapeDtypeStruct(batch, dtype)
        kind = self.rng.integers(3)
        if kind == 0:
            operands = [self.array(batch, dtype), self.array(batch, dtype), *vector(), *vector(), *vector(), *vector()]

            def update(results: list[np.ndarray]) -> list[Answer]:
                a, lam, *leaves = operands
                x, p, r, q = (leaves[i * n : (i + 1) * n] for i in range(4))
                new_x = [total([wide(u), scalars(u, a) * v]) for u, v in zip(x, p, strict=True)]
                new_r = [
                    total([wide(u), -scalars(u, a) * w, -scalars(u, a) * scalars(u, lam) * v])
                    for u, v, w in zip(r, p, q, strict=True)
                ]
                stored = results[1 + n :]
                return [product(batch, stored, stored), *new_x, *new_r]

            return Call("curvax_cg_update", operands, [scalar, *like(operands[2 : 2 + n]) * 2], update)
        if kind == 1:
            operands = [self.array(batch, dtype), *vector(), *vector()]

            def direction(results: list[np.ndarray]) -> list[Answer]:
                del results
                beta, *leaves = operands
                return [total([wide(z), scalars(z, beta) * p]) for z, p in zip(leaves[:n], leaves[n:], strict=True)]

            return Call("curvax_cg_direction", operands, like(operands[1 : 1 + n]), direction)
        pairs = int(self.rng.integers(1, 5))
        vectors = [vector() for _ in range(2 * pairs)]
        if pairs == 3 and self.rng.random() < 0.5:
            a, b = vectors[:2]
            vectors = [a, b, a, a, b, b]

        def dots(results: list[np.ndarray]) -> list[Answer]:
            del results
            return [product(batch, vectors[2 * i], vectors[2 * i + 1]) for i in range(pairs)]

        return Call("curvax_dots", [leaf for v in vectors for leaf in v], [scalar] * pairs, dots)

    def spoil(self, call: Call) -> None:
        """Makes a call one that a handler may have to refuse."""
        operands, results = call.operands, call.results
        i = int(self.rng.integers(len(operands)))
        old = operands[i]
        match self.rng.integers(6):
            case 0:
                operands.pop(i)
            case 1:
                operands.insert(i, old)
            case 2:
                with np.errstate(invalid="ignore"):
                    operands[i] = old.astype(self.rng.choice([np.float16, np.int32, np.complex64, np.bool_]))
            case 3:
                operands[i] = np.zeros((*old.shape, 2), old.dtype)
            case 4:
                results.append(results[-1])
            case _:
                j = int(self.rng.integers(len(results)))
                results[j] = jax.ShapeDtypeStruct((*results[j].shape, 3), results[j].dtype)


def close(got: np.ndarray, answer: Answer) -> bool:
    """Whether a result is right but for the roundings and underflows of its dtype.

    Where something overflows on the way, a sum may end as an infinity, as no number or as a number: nothing is asked.
    """
    want, magnitude = answer
    if got.dtype == np.int32:
        return bool(np.all(got == want))
    info = np.finfo(got.dtype)
    with np.errstate(all="ignore"):
        near = abs(got - want) <= 64 * float(info.eps) * magnitude + 1e6 * float(info.tiny)
    overflows = np.isfinite(magnitude) & (magnitude > float(info.max) / 8)
    return bool(np.all(np.where(np.isfinite(want), near, ~np.isfinite(got)) | overflows))


def run(call: Call) -> list[np.ndarray] | None:
    """The results of a call; None if it was refused."""
    try:
        results = jax.ffi.ffi_call(call.target, call.results)(
            *map(jax.numpy.asarray, call.operands), threads=np.int64(0), **call.attributes
        )
        found = [np.asarray(result) for result in jax.block_until_ready(results)]
        return [np.tril(result) for result in found] if call.lower else found
    except jax.errors.JaxRuntimeError as error:
        if not SENTENCE.search(str(error)):
            raise AssertionError(f"not a sentence: {error}") from error
        return None


def main() -> None:
    """Prints how many calls were answered and refused."""
    seed, calls = map(int, sys.argv[1:])
    ffi.require_native()
    maker = Maker(seed)
    answered = refused = 0
    for _ in range(calls):
        call = maker.call()
        if maker.rng.random() < 0.4:
            # What is still a call, with an operand and a result more for instance, may be answered.
            maker.spoil(call)
            refused += run(call) is None
            continue
        got = run(call)
        assert got is not None, f"{call.target} refused a legal call"
        with np.errstate(all="ignore"):
            answers = call.answer(got)
        for g, answer in zip(got, answers, strict=True):
            assert g.shape == answer[0].shape and close(g, answer), (call.target, g, answer)
        answered += 1
    print(answered, refused)


if __name__ == "__main__":
    main()
