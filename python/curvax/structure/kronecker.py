"""What Kronecker-factored curvature is estimated from: sums over examples of products of activations and cotangents.

With cotangents d that carry the square root of the weights of the loss, the Gauss-Newton matrix of a block is

    C = sum_b sum_r vec(sum_t a_bt d_brt^T) vec(sum_t a_bt d_brt^T)^T,

rows r of example b, positions t. Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate
Curvature" (2015), take activations and cotangents as independent and get C ~ A kron B with A the mean of a a^T and B
the sum of d d^T. Where weights are shared over positions there are two ways (Eschenhagen et al., "Kronecker-Factored
Approximate Curvature for Modern Neural Network Architectures", 2023):

    expand   A = mean_b mean_t a_bt a_bt^T             B = sum_br sum_t d_brt d_brt^T
    reduce   A = mean_b (mean_t a_bt)(mean_t a_bt)^T   B = sum_br (sum_t d_brt)(sum_t d_brt)^T

Expand takes positions as examples; for convolutions it is the approximation of Grosse and Martens, "A Kronecker-
factored approximate Fisher matrix for convolution layers" (2016), whose factor |T| moves from one factor to the other.
All means are weighted with what positions weigh in the loss (`curvax.structure.positions`), as cotangents are: a masked
example or position counts in neither factor, and a linear layer with squared error stays exact whatever the weights.

A model that returns derivatives uses its weights several times: on values and on the tangents of a Taylor mode, which
are positions like any others (Dangel, Mueller and Zeinhofer, "Kronecker-Factored Approximate Curvature for
Physics-Informed Neural Networks", 2024), and, in reverse mode, transposed. There h = g W^T has the gradient
sum_u c_u g_u^T of W with c the cotangent of h, so cotangents are on the side of A:

    forward      A1 = mean a a^T      B1 = sum d d^T          C ~ A1 kron B1 + A2 kron B2
    transposed   A2 = sum c c^T       B2 = mean g g^T           ~ A kron B
    A = (s1 A1 + s2 (tr A1 / tr A2) A2) / (s1 + s2)             s_i = tr A_i tr B_i
    B = B1 + (tr A2 / tr A1) B2

Both factors are means of normalized ones, weighted with what each has of the trace, which A kron B keeps. Of an
embedding whose transpose is the output layer, A1 and so A is a diagonal, and of A2, as wide as a vocabulary, the
diagonal is taken.

George et al., "Fast Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis" (2018), keep the
eigenvectors U of A and V of B and measure the diagonal of C in their basis, sum_br (U^T (sum_t a d^T) V)^2 entrywise,
which is the closest of all matrices with these eigenvectors.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from curvax.structure.blocks import DiagonalBlock, FullBlock, KroneckerBlock, KroneckerBlocks, Wiring
from curvax.structure.capture import Capture, Factors
from curvax.structure.formed import one_hot
from curvax.structure.positions import LossWeights, position_weights
from curvax.structure.uses import EmbeddingUse, LayerUse
from curvax.structure.views import back

# Entries of projected or formed rows alive at once: 64 MiB of float32.
_ENTRIES_AT_ONCE = 1 << 24
# A product with its own transpose is cut into strips from this width on, and if it sums over more rows than it has
# columns. Otherwise copies cost more than is saved: on a CPU, 785 columns take 0.72 of the time with 1,024 rows, 1.14
# with 128.
_CUT = 512
_STRIPS = 4


class WeightSharing(enum.Enum):
    """How positions that share weights enter the factors: as examples of their own, or reduced to one."""

    EXPAND = "expand"
    REDUCE = "reduce"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Examples:
    """Factors of the rows of some examples.

    Attributes:
      factors: with a leading example axis B; `None` in the places of another model's layer uses and leaves.
      weights: per layer use (B, T), what its positions weigh in the loss.
      wiring: the model that they are of; static.
      around: how many layer uses, and leaves with explicit rows, of other models are before and behind; static.
    """

    factors: Factors
    weights: list[jax.Array]
    wiring: Wiring = dataclasses.field(metadata={"static": True})
    around: tuple[tuple[int, int], tuple[int, int]] = dataclasses.field(
        default=((0, 0), (0, 0)), metadata={"static": True}
    )

    def placed(self, uses: tuple[int, int], explicit: tuple[int, int]) -> Examples:
        """The same among several models' (`blocks.join_blocks`): how many layer uses, and leaves with explicit rows,
        the models before and behind this one have.
        """

        def padded(own: list[Any], around: tuple[int, int]) -> list[Any]:
            return [*[None] * around[0], *own, *[None] * around[1]]

        own = self.factors
        factors = Factors(padded(own.activations, uses), padded(own.cotangents, uses), padded(own.explicit, explicit))
        return Examples(factors, padded(self.weights, uses), self.wiring, (uses, explicit))

    def check(self, blocks: KroneckerBlocks) -> None:
        """Raises ValueError if the blocks are those of a model that uses its parameters in another way."""
        if blocks.wiring.part(*self.around) != self.wiring:
            raise ValueError(
                "the state's Kronecker factors were made for a model that uses its parameters in another way (other "
                "layers, or a bias in place of a gain): call init again with this model, or pass its own state."
            )

    def here(self, uses: Sequence[int]) -> list[int]:
        """Those of some layer uses that are this model's."""
        places = cast("Sequence[Any]", self.factors.cotangents)
        return [i for i in uses if places[i] is not None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorSums:
    """Sums over examples; those of slices of a batch add up.

    Attributes:
      inputs: per Kronecker block the weighted sum of a a^T, (G, n, n); of an embedding its diagonal (G, n).
      outputs: per Kronecker block the sum of d d^T, (G, m, m).
      diagonal: per diagonal block the sum of the squared rows, leaf-shaped.
      weights: per Kronecker block the sum of the weights, by which `inputs` become means.
      swapped: per Kronecker block with transposed layer uses their sums, else `None`.
    """

    inputs: list[jax.Array]
    outputs: list[jax.Array]
    diagonal: list[jax.Array]
    weights: list[jax.Array]
    swapped: list[SwappedSums | None]

    def means(self) -> list[jax.Array]:
        """A1 per Kronecker block; zero if there is no weight at all."""
        return [_quotient(x, weight) for x, weight in zip(self.inputs, self.weights, strict=True)]

    def factors(self) -> tuple[list[jax.Array], list[jax.Array]]:
        """A and B per Kronecker block."""
        pairs = zip(self.means(), self.outputs, self.swapped, strict=True)
        joined = [(a, b) if other is None else other.joined(a, b) for a, b, other in pairs]
        return [a for a, _ in joined], [b for _, b in joined]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SwappedSums:
    """Sums over examples at transposed layer uses.

    Attributes:
      inputs: sum of c c^T, (G, n, n), zero in the row of a bias; of an embedding its diagonal (G, n).
      outputs: weighted sum of g g^T, (G, m, m).
      weights: the sum of the weights, by which `outputs` become means.
    """

    inputs: jax.Array
    outputs: jax.Array
    weights: jax.Array

    def joined(self, a1: jax.Array, b1: jax.Array) -> tuple[jax.Array, jax.Array]:
        """A and B from A1 and B1, as in the module's docstring."""
        a2, b2 = self.inputs, _quotient(self.outputs, self.weights)
        t1, t2 = _traces(a1), _traces(a2)
        s1, s2 = t1 * _traces(b1), t2 * _traces(b2)
        a = _quotient(_each(s1, a1) * a1 + _each(s2 * _quotient(t1, t2), a2) * a2, _each(s1 + s2, a1))
        b = b1 + _each(_quotient(t2, t1), b2) * b2
        # Without anything forwards there is nothing to be normalized to.
        none = t1 == 0
        return jnp.where(_each(none, a1), a2, a), jnp.where(_each(none, b1), b2, b)


def _traces(x: jax.Array) -> jax.Array:
    """(G,) of matrices (G, n, n), or of diagonals (G, n)."""
    return jnp.sum(x, axis=-1) if x.ndim == 2 else jnp.trace(x, axis1=-2, axis2=-1)


def _each(numbers: jax.Array, x: jax.Array) -> jax.Array:
    """Numbers (G,) for the groups of an array."""
    return numbers.reshape(-1, *[1] * (x.ndim - 1))


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """The quotient x / y, zero where y is."""
    none = y == 0
    return jnp.where(none, jnp.zeros((), x.dtype), x / jnp.where(none, jnp.ones_like(y), y))


def examples_of(capture: Capture, factors: Factors, weights: LossWeights) -> Examples:
    """Factors with the weights of their positions; what has none is zero, whatever it holds."""
    each = position_weights(capture, factors, weights)
    wiring = Wiring.of(capture.structure.uses, [region for region, _ in capture.structure.regions])
    if not weights.masks:
        return Examples(factors, each, wiring)

    def keep(counted: jax.Array, x: jax.Array, otherwise: int = 0) -> jax.Array:
        return jnp.where(
            counted.reshape(*counted.shape, *[1] * (x.ndim - counted.ndim)), x, jnp.full((), otherwise, x.dtype)
        )

    activations, cotangents = [], []
    for use, w, a, d in zip(capture.structure.uses, each, factors.activations, factors.cotangents, strict=True):
        # An index past the table finds nothing.
        activations.append(keep(w != 0, a, use.block[1] if isinstance(use, EmbeddingUse) else 0))
        cotangents.append(keep((w != 0)[:, None], d))
    explicit = [keep(weights.examples != 0, x) for x in factors.explicit]
    return Examples(Factors(activations, cotangents, explicit), each, wiring)


def factor_sums(blocks: KroneckerBlocks, examples: Examples, sharing: WeightSharing) -> FactorSums:
    """The sums that make all Kronecker factors and diagonals.

    Raises:
      ValueError: the blocks are those of another model.
    """
    examples.check(blocks)
    inputs, outputs, weights, swapped = [], [], [], []
    for block in blocks.kronecker:
        dtype = blocks.dtype
        if isinstance(block, FullBlock):
            inputs.append(jnp.ones(block.input_shape, dtype))
            outputs.append(_full_sum(blocks, block, examples))
            weights.append(jnp.ones((), dtype))
            swapped.append(None)
            continue
        uses = examples.here(block.uses)
        if not uses:
            inputs.append(jnp.zeros(block.input_shape, dtype))
            outputs.append(jnp.zeros(block.output_shape, dtype))
            weights.append(jnp.zeros((), dtype))
        else:
            w = _weights(uses, examples)
            make = _embedding_input_sum if block.embedding else _input_sum
            inputs.append(make(block, examples, w, sharing))
            outputs.append(_output_sum(cotangents_of(uses, examples), sharing))
            weights.append(jnp.sum(w))
        swapped.append(_swapped_sums(block, examples, sharing, dtype) if block.swapped else None)
    diagonal = [_diagonal_sum(blocks, block, examples) for block in blocks.diagonal]
    return FactorSums(inputs, outputs, diagonal, weights, swapped)


def projected_squares(
    blocks: KroneckerBlocks, examples: Examples, bases: Sequence[tuple[jax.Array | None, jax.Array]]
) -> list[jax.Array]:
    """Per Kronecker block sum_br (U^T (sum_t a d^T) V)^2 entrywise, (G, n, m).

    Args:
      blocks: the blocks.
      examples: factors of rows.
      bases: per block U (G, n, n), or `None` for an embedding, whose basis is that of its entries, and V (G, m, m).
    """
    squares: list[jax.Array] = []
    for block, (u, v) in zip(blocks.kronecker, bases, strict=True):
        if isinstance(block, FullBlock):
            product = jnp.einsum("gij,gjm->gim", _full_sum(blocks, block, examples), v, precision="highest")
            squares.append(jnp.sum(v * product, axis=1, keepdims=True))
        elif u is None and not block.swapped:
            squares.append(_embedding_squares(block, examples, v))
        else:
            squares.append(_squares(block, examples, u, v))
    return squares


def second_moment(x: jax.Array) -> jax.Array:
    """x^T x of (G, N, n): symmetric (G, n, n).

    Where there are many rows the columns are cut into strips. Each meets itself and those before it, and the rest is
    copied from there: (s + 1) / 2s of the work for s strips.
    """
    rows, n = x.shape[-2:]
    if n < _CUT or rows < n:
        return _product(x, x)
    ends = [round(i * n / _STRIPS) for i in range(_STRIPS + 1)]
    product = jnp.zeros((x.shape[0], n, n), x.dtype)
    for start, end in itertools.pairwise(ends):
        strip = _product(x[..., start:end], x[..., :end])
        product = product.at[:, start:end, :end].set(strip)
        if start:
            product = product.at[:, :start, start:end].set(jnp.swapaxes(strip[..., :start], -1, -2))
    return product


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.einsum("gbi,gbj->gij", x, y, precision="highest")


def _activations(block: KroneckerBlock, examples: Examples) -> jax.Array:
    """(B, T, G, n), with the ones of a bias; positions of all layer uses one after another."""
    uses = examples.here(block.uses)
    parts = [examples.factors.activations[i] for i in uses]
    if block.scale != 1:
        parts = [x * jnp.asarray(block.scale, x.dtype) for x in parts]
    if block.bias is not None:
        of_bias = dict(block.biased)
        ones = [jnp.full_like(x[..., :1], of_bias.get(i, 0.0)) for i, x in zip(uses, parts, strict=True)]
        parts = [jnp.concatenate(pair, axis=-1) for pair in zip(parts, ones, strict=True)]
    return jnp.concatenate(parts, axis=1)


def _swapped_cotangents(block: KroneckerBlock, examples: Examples, uses: Sequence[int]) -> jax.Array:
    """(B, R, T, G, n) at transposed layer uses, scaled as the block's own activations, with the zeros of a bias."""
    c = cotangents_of(uses, examples)
    if block.scale != 1:
        c = c * jnp.asarray(block.scale, c.dtype)
    return c if block.bias is None else jnp.pad(c, [(0, 0)] * (c.ndim - 1) + [(0, 1)])


def _swapped_activations(examples: Examples, uses: Sequence[int]) -> jax.Array:
    """(B, T, G, m) at transposed layer uses."""
    return jnp.concatenate([examples.factors.activations[i] for i in uses], axis=1)


def indices_of(block: KroneckerBlock, examples: Examples) -> jax.Array:
    """(B, T) of an embedding."""
    return jnp.concatenate([examples.factors.activations[i] for i in examples.here(block.uses)], axis=1)


def _one_hot(block: KroneckerBlock, examples: Examples, dtype: np.dtype) -> jax.Array:
    """(B, T, 1, n) of an embedding, scaled as `_activations`."""
    rows = one_hot(block.use, indices_of(block, examples), dtype)
    return rows * jnp.asarray(block.scale, dtype)


def cotangents_of(uses: Sequence[int], examples: Examples) -> jax.Array:
    """(B, R, T, G, m)."""
    return jnp.concatenate([examples.factors.cotangents[i] for i in uses], axis=2)


def _rows_by_group(x: jax.Array) -> jax.Array:
    """(..., G, n) as (G, N, n)."""
    return jnp.moveaxis(x.reshape(-1, *x.shape[-2:]), 1, 0)


def _weights(uses: Sequence[int], examples: Examples) -> jax.Array:
    """(B, T); several layer uses share the weight of an example by their positions."""
    parts = [examples.weights[i] for i in uses]
    positions = sum(w.shape[1] for w in parts)
    return jnp.concatenate([w * (w.shape[1] / positions) for w in parts], axis=1)


def _input_sum(block: KroneckerBlock, examples: Examples, weights: jax.Array, sharing: WeightSharing) -> jax.Array:
    return _weighted_sum(_activations(block, examples), weights, sharing)


def _weighted_sum(a: jax.Array, weights: jax.Array, sharing: WeightSharing) -> jax.Array:
    """The sum of w a a^T of activations (B, T, G, n) and weights (B, T)."""
    w = weights[:, :, None, None]
    if sharing is WeightSharing.REDUCE:
        total = jnp.sum(w, axis=1, keepdims=True)
        a, w = _reduced(a * _quotient(w, total), 1)[:, None], total
    return second_moment(_rows_by_group(a * jnp.sqrt(w)))


def _swapped_sums(block: KroneckerBlock, examples: Examples, sharing: WeightSharing, dtype: np.dtype) -> SwappedSums:
    uses = examples.here(block.swapped)
    if not uses:
        zero = jnp.zeros((), dtype)
        return SwappedSums(jnp.zeros(block.input_shape, dtype), jnp.zeros(block.output_shape, dtype), zero)
    weights = _weights(uses, examples)
    c = _swapped_cotangents(block, examples, uses)
    return SwappedSums(
        _output_squares(c, sharing) if block.embedding else _output_sum(c, sharing),
        _weighted_sum(_swapped_activations(examples, uses), weights, sharing),
        jnp.sum(weights),
    )


def _embedding_input_sum(
    block: KroneckerBlock, examples: Examples, weights: jax.Array, sharing: WeightSharing
) -> jax.Array:
    """Expand: how often each row is looked up. Reduce: the diagonal of A, squares of each example's frequencies."""
    indices, rows = indices_of(block, examples), block.shape[1]
    each = weights
    if sharing is WeightSharing.REDUCE:
        # Positions with one index have the frequency f together; each brings its share of the weight times f.
        each = each * _together(indices, _quotient(each, jnp.sum(each, axis=1, keepdims=True)))
    counts = jnp.zeros((rows + 1,), each.dtype).at[indices].add(each)
    return counts[None, :rows] * jnp.asarray(block.scale**2, each.dtype)


def _together(indices: jax.Array, x: jax.Array) -> jax.Array:
    """(B, T): the sum of x (B, T) over all positions of an example with the same index."""
    same = (indices[:, :, None] == indices[:, None, :]).astype(x.dtype)
    return jnp.einsum("btu,bu->bt", same, x, precision="highest")


def _occurrences(indices: jax.Array) -> jax.Array:
    """(B, T): how often each example holds the index at each position."""
    return jnp.sum(indices[:, :, None] == indices[:, None, :], axis=-1)


def _output_sum(d: jax.Array, sharing: WeightSharing) -> jax.Array:
    """The sum of d d^T of cotangents (B, R, T, G, m)."""
    if sharing is WeightSharing.REDUCE:
        d = _reduced(d, 2)
    return second_moment(_rows_by_group(d))


def _output_squares(d: jax.Array, sharing: WeightSharing) -> jax.Array:
    """The diagonal of `_output_sum`, (G, m)."""
    if sharing is WeightSharing.REDUCE:
        d = _reduced(d, 2)
    return jnp.sum(jnp.square(d), axis=tuple(range(d.ndim - 2)))


def _reduced(x: jax.Array, axis: int) -> jax.Array:
    """The sum over positions, zero where no more is left of the terms than rounding.

    Softmax does not see a constant that is added to all keys, so the cotangents of keys sum to zero. Eigenvectors of
    what rounding leaves are arbitrary. Terms are rounded relative to what they are differences of, of which the largest
    terms of all examples tell: 32 units of these, whose squares are nothing beside the largest in a second moment.
    """
    total, squares = jnp.sum(x, axis=axis), jnp.sum(jnp.square(x), axis=axis)
    least = 32 * jnp.finfo(x.dtype).eps * jnp.sqrt(jnp.max(squares, initial=0))
    return jnp.where(jnp.abs(total) > least, total, jnp.zeros_like(total))


def _diagonal_sum(blocks: KroneckerBlocks, block: DiagonalBlock, examples: Examples) -> jax.Array:
    """Squared rows of a region.

    Within one model it has explicit rows, or layer uses, or is a bias; or several parts of it have, each another kind,
    where another model does not take them apart.
    """
    total = jnp.zeros(block.shape, blocks.dtype)
    for rows in _small_rows(blocks, block, examples):
        total = total + jnp.sum(jnp.square(rows), axis=(0, 1))
    if uses := examples.here(block.uses):
        total = total + _formed_squares(blocks, block, examples, uses)
    return jnp.full_like(total, jnp.mean(total)) if block.scaled else total


def _full_sum(blocks: KroneckerBlocks, block: FullBlock, examples: Examples) -> jax.Array:
    """The sum of the outer products of the rows of a region, (1, size, size)."""
    rows = region_rows(blocks, block.of, examples)
    if rows is None:
        return jnp.zeros(block.output_shape, blocks.dtype)
    return second_moment(rows.reshape(1, -1, block.size))


def region_rows(blocks: KroneckerBlocks, block: DiagonalBlock, examples: Examples) -> jax.Array | None:
    """All rows (B, R, *region) of a region, formed; `None` where the model does not use it."""
    parts = _small_rows(blocks, block, examples)
    if indices := examples.here(block.uses):
        uses = _inside(blocks, block, indices)
        activations = [examples.factors.activations[i] for i in indices]
        cotangents = [examples.factors.cotangents[i] for i in indices]
        parts.append(jax.vmap(functools.partial(_formed, uses, block, blocks.dtype))(activations, cotangents))
    # Rows of one region add up before they are squared.
    return functools.reduce(jnp.add, parts) if parts else None


def _small_rows(blocks: KroneckerBlocks, block: DiagonalBlock, examples: Examples) -> list[jax.Array]:
    """The rows (B, R, *region) of what has explicit ones, and of biases; one or the other within one model."""
    explicit, found = cast("Sequence[Any]", examples.factors.explicit), []
    for place, entry in block.explicit:
        if explicit[place] is not None:
            found.append((explicit[place].astype(blocks.dtype), entry.region.views))
    for i in examples.here(block.bias_of):
        bias = blocks.uses[i].bias
        if bias is not None:
            rows = jax.vmap(jax.vmap(bias.to_region))(jnp.sum(examples.factors.cotangents[i], axis=2))
            found.append((rows * jnp.asarray(bias.scale, rows.dtype), bias.region.views))
    inside = block.region.inside
    return [jax.vmap(jax.vmap(functools.partial(back, inside(views))))(rows) for rows, views in found]


def _inside(blocks: KroneckerBlocks, block: DiagonalBlock, indices: Sequence[int]) -> list[LayerUse]:
    """Layer uses as those of the region in place of its leaf."""
    uses = [blocks.uses[i] for i in indices]
    return [dataclasses.replace(use, views=block.region.inside(use.views)) for use in uses]


def _formed(
    uses: Sequence[LayerUse], block: DiagonalBlock, dtype: np.dtype, a: Sequence[jax.Array], d: Sequence[jax.Array]
) -> jax.Array:
    """The rows (R, *region) of one example, from its activations and cotangents at layer uses."""
    total = jnp.zeros((d[0].shape[0], *block.shape), dtype)
    for use, x, y in zip(uses, a, d, strict=True):
        dense = one_hot(use, x, dtype) if isinstance(use, EmbeddingUse) else x
        total = total + jax.vmap(use.to_leaf)(jnp.einsum("tgn,rtgm->rgnm", dense, y, precision="highest"))
    return total


def _formed_squares(
    blocks: KroneckerBlocks, block: DiagonalBlock, examples: Examples, indices: Sequence[int]
) -> jax.Array:
    """Squared rows of a region whose layer uses disagree about the order of its entries: formed, some examples at a
    time.
    """
    rows = functools.partial(_formed, _inside(blocks, block, indices), block, blocks.dtype)

    def some(part: tuple[list[jax.Array], list[jax.Array]]) -> jax.Array:
        return jnp.sum(jnp.square(jax.vmap(rows)(*part)), axis=(0, 1))

    activations = [examples.factors.activations[i] for i in indices]
    cotangents = [examples.factors.cotangents[i] for i in indices]
    entries = cotangents[0].shape[1] * max(1, math.prod(block.shape))
    return _over_examples(some, (activations, cotangents), entries)


@dataclasses.dataclass(frozen=True)
class Projection:
    """Some of the layer uses of a block, in the block's basis: their rows are `einsum(form, first, second)`, (B, R, G,
    n, m).

    Attributes:
      form: "btgk,brtgl->brgkl", or with both sides exchanged for transposed uses.
      first, second: activations and cotangents, or the other way round.
    """

    form: str
    first: jax.Array
    second: jax.Array

    def rows(self) -> jax.Array:
        """All rows, formed."""
        return jnp.einsum(self.form, self.first, self.second, precision="highest")


def projections(
    block: KroneckerBlock, examples: Examples, u: jax.Array | None, v: jax.Array | None
) -> list[Projection]:
    """The rows of a block, U^T (sum_t a d^T) V; `None` is the identity."""

    def turned(x: jax.Array, basis: jax.Array | None) -> jax.Array:
        return x if basis is None else jnp.einsum("...gn,gnk->...gk", x, basis, precision="highest")

    parts: list[Projection] = []
    if uses := examples.here(block.uses):
        d = cotangents_of(uses, examples)
        a = _one_hot(block, examples, d.dtype) if block.embedding else _activations(block, examples)
        parts.append(Projection("btgk,brtgl->brgkl", turned(a, u), turned(d, v)))
    if swapped := examples.here(block.swapped):
        c = turned(_swapped_cotangents(block, examples, swapped), u)
        parts.append(Projection("brtgk,btgl->brgkl", c, turned(_swapped_activations(examples, swapped), v)))
    return parts


def _squares(block: KroneckerBlock, examples: Examples, u: jax.Array | None, v: jax.Array) -> jax.Array:
    parts = projections(block, examples, u, v)
    if not parts:
        return jnp.zeros(block.shape, v.dtype)
    if len(parts) == 1 and not examples.here(block.swapped) and parts[0].first.shape[1] == 1:
        # One position: the square of a product is the product of squares.
        a, d = parts[0].first, parts[0].second
        return jnp.einsum("bgk,bgl->gkl", jnp.square(a[:, 0]), jnp.sum(jnp.square(d[:, :, 0]), 1), precision="highest")
    forms, arrays = [part.form for part in parts], [(part.first, part.second) for part in parts]

    def some(part: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        rows = [Projection(form, *pair).rows() for form, pair in zip(forms, part, strict=True)]
        return jnp.sum(jnp.square(functools.reduce(jnp.add, rows)), axis=(0, 1))

    used = [*examples.here(block.uses), *examples.here(block.swapped)]
    count = examples.factors.cotangents[used[0]].shape[1]
    return _over_examples(some, arrays, count * block.size)


def _embedding_squares(block: KroneckerBlock, examples: Examples, v: jax.Array) -> jax.Array:
    """Positions of one example that look up the same row add up before they are squared."""
    uses, (_, rows, m) = examples.here(block.uses), block.shape
    if not uses:
        return jnp.zeros(block.shape, v.dtype)
    indices = indices_of(block, examples)
    d = jnp.einsum("brtm,ml->brtl", cotangents_of(uses, examples)[..., 0, :], v[0], precision="highest")
    if block.scale != 1:
        d = d * jnp.asarray(block.scale, d.dtype)
    same = (indices[:, :, None] == indices[:, None, :]).astype(d.dtype)
    together = jnp.einsum("btu,brum->brtm", same, d, precision="highest")
    # Each of the positions that look up one row brings its share of the square.
    shares = jnp.sum(jnp.square(together), axis=1) / _occurrences(indices)[..., None].astype(d.dtype)
    return jnp.zeros((rows + 1, m), d.dtype).at[indices].add(shares)[None, :rows]


def _over_examples(some: Callable[..., jax.Array], arrays: object, entries: int) -> jax.Array:
    """The sum of `some` over all examples, as many at once as memory allows; `entries` alive per example."""
    examples = jax.tree.leaves(arrays)[0].shape[0]
    at_once = max(1, _ENTRIES_AT_ONCE // max(entries, 1))
    if at_once >= examples:
        return some(arrays)
    count = examples // at_once
    head = jax.tree.map(lambda x: x[: count * at_once].reshape(count, at_once, *x.shape[1:]), arrays)
    first = jax.eval_shape(some, jax.tree.map(lambda x: x[0], head))

    def body(total: jax.Array, part: object) -> tuple[jax.Array, None]:
        return total + some(part), None

    total, _ = jax.lax.scan(body, jnp.zeros(first.shape, first.dtype), head)
    if count * at_once < examples:
        total = total + some(jax.tree.map(lambda x: x[count * at_once :], arrays))
    return total
