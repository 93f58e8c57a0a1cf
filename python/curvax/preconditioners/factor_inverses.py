"""The inverse of a damped A kron B, in one of two forms: eigenvectors, or inverses of damped factors.

Factored damping (Martens and Grosse 2015, section 6.3) splits lam over the factors,

    A kron B + lam I  ~  (A + pi sqrt(lam) I) kron (B + sqrt(lam) / pi I),   pi = sqrt((tr A / n) / (tr B / m)).

The product on the right has two extra terms, pi sqrt(lam) I kron B and sqrt(lam) / pi A kron I. This pi minimizes the
trace norm of their sum. With eigenvectors the damping of A kron B is exact, and a new lam needs no new factorization.

An example with 1 x 1 factors: A = 4, B = 1 and lam = 0.01 give pi = 2, so A becomes 4.2 and B becomes 1.05. Their
product is 4.41; exact damping gives 4.01.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from curvax import tree
from curvax.kernels._dispatch import Choice, Implementation, Op, Request
from curvax.kernels.dense_linalg import CHOLESKY, EIGH, TRIANGULAR_SOLVE, cholesky, eigh, triangular_solve
from curvax.preconditioners._blocks import by_size, trace
from curvax.structure.blocks import FactoredBlock, KroneckerBlocks
from curvax.tree import PyTree


class FactorInverse(abc.ABC):
    """A form of the inverse of A kron B + lam I, per block.

    An implementor is a frozen dataclass with `init`, `compute` (at the cadence of the inverses) and `apply` (in every
    step); `kernels` and `with_kernels` are for those that call ops.
    """

    @abc.abstractmethod
    def init(self, block: FactoredBlock, dtype: Any) -> Any:
        """The state of a block before any refresh."""

    @abc.abstractmethod
    def compute(
        self, blocks: KroneckerBlocks, inputs: Sequence[jax.Array], outputs: Sequence[jax.Array], lam: jax.Array
    ) -> list[Any]:
        """The states of all blocks, from factors A and B, at damping `lam`."""

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The ops that `compute` calls for upcast parameters, and what it asks of them; see
        `Preconditioner.kernels`.
        """
        del upcast
        return ()

    def with_kernels(self, choices: Mapping[str, Choice]) -> FactorInverse:
        """The same form with the planner's choices for its ops, by name."""
        del choices
        return self

    @abc.abstractmethod
    def apply(self, state: Any, lam: jax.Array, scale: jax.Array, v: jax.Array) -> jax.Array:
        """The inverse on the entries (G, n, m) of a block, at damping `lam`.

        Args:
          state: one of those that `compute` returns.
          lam: damping.
          scale: mean curvature. It replaces a damped curvature that is zero, which can happen only when lam is zero.
          v: the entries.
        """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eigen:
    """Eigenvalues and eigenvectors of A and B.

    Attributes:
      input_values: (G, n).
      input_vectors: (G, n, n), or `None` where A is a diagonal.
      output_values, output_vectors: (G, m), (G, m, m).
    """

    input_values: jax.Array
    input_vectors: jax.Array | None
    output_values: jax.Array
    output_vectors: jax.Array


@dataclasses.dataclass(frozen=True)
class EigenInverse(FactorInverse):
    """By eigenvectors: (A kron B + lam I)^-1 exactly, at the lam of each use.

    Attributes:
      factored: damp the factors as `CholeskyInverse` does, in place of their product. False by default: factored
        damping is what one settles for where only inverses of the factors are at hand.
      decompose: implementation of `eigh`, by name or as the planner's choice; `None` takes the best one.
    """

    factored: bool = False
    decompose: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The op `eigh`."""
        return ((EIGH, of_matrices(upcast)),)

    def with_kernels(self, choices: Mapping[str, Choice]) -> EigenInverse:
        """With the choice for `eigh`."""
        return dataclasses.replace(self, decompose=choices.get(EIGH.name, self.decompose))

    def init(self, block: FactoredBlock, dtype: Any) -> Eigen:
        """No curvature: zero values in the basis of the entries."""
        groups, n, m = block.shape
        vectors = None if block.embedding else identities(groups, n, dtype)
        return Eigen(
            jnp.zeros((groups, n), dtype), vectors, jnp.zeros((groups, m), dtype), identities(groups, m, dtype)
        )

    def compute(
        self, blocks: KroneckerBlocks, inputs: Sequence[jax.Array], outputs: Sequence[jax.Array], lam: jax.Array
    ) -> list[Eigen]:
        """Eigendecompositions, one batched call per size."""
        del blocks, lam

        def decompose(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
            # Where eigenvalues are rounding any vectors will do: all of them are divided by the same.
            pairs = eigh(matrices, implementation=self.decompose)
            return pairs.values, pairs.vectors

        return eigen(inputs, outputs, decompose)

    def apply(self, state: Eigen, lam: jax.Array, scale: jax.Array, v: jax.Array) -> jax.Array:
        """Into the eigenbasis, divided by its damped values, and back."""
        a, b = jnp.maximum(state.input_values, 0)[..., :, None], jnp.maximum(state.output_values, 0)[..., None, :]
        if self.factored:
            on_inputs, on_outputs = split_damping(jnp.mean(a, (-1, -2)), jnp.mean(b, (-1, -2)), lam)
            denominators = (a + on_inputs[:, None, None]) * (b + on_outputs[:, None, None])
        else:
            denominators = damp(a * b, lam)
        inside = into_basis(state.input_vectors, state.output_vectors, v)
        return out_of_basis(state.input_vectors, state.output_vectors, divided(inside, denominators, scale))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Inverses:
    """Inverses of the damped factors: (G, n, n), where A is a diagonal (G, n), and (G, m, m)."""

    inputs: jax.Array
    outputs: jax.Array


@dataclasses.dataclass(frozen=True)
class CholeskyInverse(FactorInverse):
    """By inverses of the damped factors, made by Cholesky: several times cheaper than eigenvectors.

    Damping is factored, at the lam of the refresh that made the inverses. A factor that is singular to rounding is
    damped by rounding at least.

    Attributes:
      factorize, substitute: implementations of `cholesky` and `triangular_solve`, by name or as the planner's choices;
        `None` takes the best ones.
    """

    factorize: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)
    substitute: Implementation | Choice | None = dataclasses.field(default=None, repr=False, compare=False)

    def kernels(self, upcast: PyTree) -> tuple[tuple[Op, Request], ...]:
        """The ops `cholesky` and `triangular_solve`."""
        request = of_matrices(upcast)
        return ((CHOLESKY, request), (TRIANGULAR_SOLVE, request))

    def with_kernels(self, choices: Mapping[str, Choice]) -> CholeskyInverse:
        """With the choices for both."""
        return dataclasses.replace(
            self,
            factorize=choices.get(CHOLESKY.name, self.factorize),
            substitute=choices.get(TRIANGULAR_SOLVE.name, self.substitute),
        )

    def init(self, block: FactoredBlock, dtype: Any) -> Inverses:
        """The identity."""
        groups, n, m = block.shape
        inputs = jnp.ones((groups, n), dtype) if block.embedding else identities(groups, n, dtype)
        return Inverses(inputs, identities(groups, m, dtype))

    def compute(
        self, blocks: KroneckerBlocks, inputs: Sequence[jax.Array], outputs: Sequence[jax.Array], lam: jax.Array
    ) -> list[Inverses]:
        """Cholesky factorizations, one batched call per size."""
        damped: list[jax.Array] = []
        for block, a, b in zip(blocks.kronecker, inputs, outputs, strict=True):
            _, n, m = block.shape
            on_inputs, on_outputs = split_damping(trace(a) / n, trace(b) / m, lam)
            damped += [_damped(a, on_inputs), _damped(b, on_outputs)]
        dense = [x for x in damped if x.ndim == 3]
        inverted = iter(x for (x,) in by_size(lambda x: (self._inverse(x),), dense))
        inverses = [next(inverted) if x.ndim == 3 else 1 / x for x in damped]
        return [Inverses(a, b) for a, b in zip(inverses[::2], inverses[1::2], strict=True)]

    def apply(self, state: Inverses, lam: jax.Array, scale: jax.Array, v: jax.Array) -> jax.Array:
        """A^-1 V B^-1."""
        del lam, scale
        left = state.inputs[..., None] * v if state.inputs.ndim == 2 else matmul(state.inputs, v)
        return matmul(left, state.outputs)

    def _inverse(self, matrices: jax.Array) -> jax.Array:
        """L^-T L^-1, symmetric up to rounding by construction."""
        lower = cholesky(matrices, implementation=self.factorize).lower
        identity = identities(matrices.shape[0], matrices.shape[-1], matrices.dtype)
        root = triangular_solve(lower, identity, implementation=self.substitute)
        return matmul(jnp.swapaxes(root, -1, -2), root)


def of_matrices(upcast: PyTree) -> Request:
    """What is asked of the ops on factors of upcast parameters: how large they are does not matter to them."""
    return Request.of(jax.ShapeDtypeStruct((1, 1), tree.scalar_dtype(upcast)))


def eigen(
    inputs: Sequence[jax.Array],
    outputs: Sequence[jax.Array],
    decompose: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> list[Eigen]:
    """Eigendecompositions of all factors, one call of `decompose`, (values, vectors) of a stack, per size."""
    dense = [x for pair in zip(inputs, outputs, strict=True) for x in pair if x.ndim == 3]
    pairs = iter(by_size(decompose, dense))
    results = []
    for a, _ in zip(inputs, outputs, strict=True):
        values, vectors = next(pairs) if a.ndim == 3 else (a, None)
        results.append(Eigen(values, vectors, *next(pairs)))
    return results


def into_basis(u: jax.Array | None, v: jax.Array, x: jax.Array) -> jax.Array:
    """U^T x V; `None` for the identity."""
    return matmul(x if u is None else matmul(jnp.swapaxes(u, -1, -2), x), v)


def out_of_basis(u: jax.Array | None, v: jax.Array, x: jax.Array) -> jax.Array:
    """U x V^T."""
    return matmul(x if u is None else matmul(u, x), jnp.swapaxes(v, -1, -2))


def damp(curvature: jax.Array, lam: jax.Array) -> jax.Array:
    """Eigenvalues (G, n, m) plus lam; what is below rounding, relative to the largest, is raised to it."""
    level = rounding(curvature.dtype) * jnp.max(curvature, axis=(-1, -2), keepdims=True, initial=0)
    return jnp.maximum(curvature, level) + lam


def divided(x: jax.Array, denominators: jax.Array, scale: jax.Array) -> jax.Array:
    """x / denominators. A denominator of 0 is replaced by `scale`, or by 1 if `scale` is 0 too."""
    safe = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    return x / jnp.where(denominators > 0, denominators, safe)


def split_damping(input_mean: jax.Array, output_mean: jax.Array, lam: jax.Array) -> tuple[jax.Array, jax.Array]:
    """pi sqrt(lam) and sqrt(lam) / pi from the mean eigenvalues of A and B; pi is 1 where one of them is 0.

    A lam below rounding, relative to the mean curvature, counts as rounding.
    """
    known = (input_mean > 0) & (output_mean > 0)
    one = jnp.ones_like(input_mean)
    pi = jnp.sqrt(jnp.where(known, input_mean, one) / jnp.where(known, output_mean, one))
    root = jnp.sqrt(jnp.maximum(lam, rounding(input_mean.dtype) * input_mean * output_mean))
    return pi * root, root / pi


def rounding(dtype: Any) -> float:
    """The assumed error of a computed eigenvalue, relative to the largest eigenvalue."""
    return 10 * float(jnp.finfo(dtype).eps)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), inline=True)
def identities(groups: int, n: int, dtype: Any) -> jax.Array:
    """(groups, n, n). Jitted, for outside a compiled step each operation is a program of its own."""
    return jnp.tile(jnp.eye(n, dtype=dtype), (groups, 1, 1))


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
    """Batched product in the full precision of the inputs."""
    return jnp.matmul(x, y, precision=jax.lax.Precision.HIGHEST)


def _damped(factor: jax.Array, damping: jax.Array) -> jax.Array:
    """The factor plus a multiple of the identity that leaves it positive definite: 1 if there is nothing else."""
    least = float(jnp.finfo(factor.dtype).eps) * trace(factor)
    total = jnp.maximum(damping, least)
    total = jnp.where(total > 0, total, jnp.ones_like(total))
    if factor.ndim == 2:
        return factor + total[:, None]
    return factor + total[:, None, None] * jnp.eye(factor.shape[-1], dtype=factor.dtype)
