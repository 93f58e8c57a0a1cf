"""The Gram matrix of the rows of several models that share their parameters: blocks of one, and of one with another.

A loss of several terms has a set of examples for each, with outputs and layers of its own. Their rows stand one after
another, and meet in blocks:

                     interior (900)   boundary (120)
    interior (900)   [ K11                          ]     K11, K22   `structure.gram`, each by itself
    boundary (120)   [ K21             K22          ]     K21        here; K12 is its transpose

A block of two models is a sum over the leaves that both depend on. Where layer uses of both see the same entries of a
leaf in the same order, rows meet as pairs of activations and cotangents, however many positions and rows an example
has in either model,

    <sum_t a_t d_t^T, sum_u b_u e_u^T> = sum_tu (a_t . b_u) (d_t . e_u),

and layer uses that see different entries do not meet. Where the layouts disagree, or one model has explicit rows of the
leaf, the rows of that leaf alone are laid out as the leaf is (`structure.formed`).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from curvax.kernels import Choice, Implementation
from curvax.kernels.gram_accumulate import gram_of_layers
from curvax.kernels.gram_accumulate.whole import mirror
from curvax.output_space import IdentityCurvature, OutputCurvature
from curvax.structure.capture import Capture, Factors
from curvax.structure.formed import formed, uses_by_leaf
from curvax.structure.gram import RowGroups, gram, meet
from curvax.structure.layers import Layer, flat, layers, scaled_activations
from curvax.structure.memory import DEFAULT_MAX_BYTES
from curvax.structure.rows import RowSource, example_factors, joint_groups, outputs_like
from curvax.structure.uses import LayerUse, same_entries
from curvax.structure.views import disjoint


def joint_gram(
    sources: Sequence[RowSource],
    max_bytes: int = DEFAULT_MAX_BYTES,
    implementation: Implementation | Choice | None = None,
) -> jax.Array:
    """S^T J J^T S of all sources, whose rows stand one after another.

    Args:
      sources: what the rows of each model are made from; the parameters are the same in all.
      max_bytes: bound on the memory of factors and formed rows; more are made in blocks, and made again for each block
        that they meet. 2 GiB by default.
      implementation: of the op `gram_accumulate`.

    Returns:
      (rows, rows), symmetric, in the accumulation dtype; products at highest precision.

    Raises:
      ValueError: there are no trainable parameters.
    """
    if not jax.tree.leaves(sources[0].params):
        raise ValueError("there are no trainable parameters: leave at least one leaf of the parameters unfrozen.")
    sets = [_RowSet.of(source) for source in sources]
    pairs = [_Pair.of(sets[i], sets[j]) for i, j in _pairs(len(sets))]
    # Of two models, the parts in which they meet are alive beside the factors; pairs follow one another.
    across = max((pair.bytes_of(rows) * rows.count for pair in pairs for rows in (pair.first, pair.second)), default=0)
    fits = sum(rows.count * rows.groups.bytes for rows in sets) + 2 * across <= max_bytes
    own, across = _at_once(sets, implementation) if fits else _by_blocks(sets, max_bytes, implementation)
    ends = list(itertools.accumulate((rows.total for rows in sets), initial=0))
    lower = jnp.zeros((ends[-1], ends[-1]), sets[0].dtype)
    for (i, j), block in {**own, **across}.items():
        # Models whose loss couples examples: K so far, and S^T K S now.
        block = sets[j].on_columns(sets[i].on_columns(block.T).T)
        lower = jax.lax.dynamic_update_slice(lower, block, (ends[i], ends[j]))
    return mirror(lower)


_Blocks = dict[tuple[int, int], jax.Array]


def _at_once(sets: Sequence[_RowSet], implementation: Implementation | Choice | None) -> tuple[_Blocks, _Blocks]:
    """(blocks of a model with itself, of one with another), from factors that are made once."""
    made = [jax.vmap(rows.make)(jnp.arange(rows.count, dtype=jnp.int32)) for rows in sets]
    own: _Blocks = {}
    for i, rows in enumerate(sets):
        parts = [(x.activations, x.cotangents) for x in jax.vmap(rows.parts)(made[i])]
        nothing = jnp.zeros((rows.total, rows.total), rows.dtype)
        own[i, i] = gram_of_layers(parts, rows.dtype, implementation=implementation) if parts else nothing
    across: _Blocks = {}
    for i, j in _pairs(len(sets)):
        pair = _Pair.of(sets[i], sets[j])
        empty = jnp.zeros((sets[i].total, sets[j].total), sets[i].dtype)
        across[i, j] = meet(empty, pair.left(made[i]), pair.right(made[j]), implementation)
    return own, across


def _by_blocks(
    sets: Sequence[_RowSet], max_bytes: int, implementation: Implementation | Choice | None
) -> tuple[_Blocks, _Blocks]:
    """The same from factors that are made anew wherever they meet."""
    own = {(i, i): gram(rows.groups, max_bytes, implementation) for i, rows in enumerate(sets)}
    across = {}
    for i, j in _pairs(len(sets)):
        across[i, j] = _tiles(_Pair.of(sets[i], sets[j]), max_bytes, implementation)
    return own, across


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i)]


def cross_gram(
    first: RowSource,
    second: RowSource,
    max_bytes: int = DEFAULT_MAX_BYTES,
    implementation: Implementation | Choice | None = None,
    *,
    traced: bool = False,
) -> jax.Array:
    """S1^T J1 J2^T S2, the inner products of the rows of one source with those of another at the same parameters.

    Args:
      first, second: neither couples examples in its S.
      max_bytes, implementation: as in `joint_gram`.
      traced: sums the inner products of row r of one example with row r of another over r; both then have as many rows
        an example. No matrix of all rows is made, unless examples interact. False by default.

    Returns:
      (rows of the first, rows of the second); with `traced` (examples, examples).
    """
    sets = _RowSet.of(first), _RowSet.of(second)
    if not traced:
        return _tiles(_Pair.of(*sets), max_bytes, implementation)
    if all(rows.captured is not None for rows in sets):
        return _tiles(dataclasses.replace(_Pair.of(*sets), traced=True), max_bytes, implementation)
    whole = _tiles(_Pair.of(*sets), max_bytes, implementation)
    (b, c), k = (source.output.row_shape[0] for source in (first, second)), math.prod(first.output.row_shape[1:])
    return jnp.einsum("bkck->bc", whole.reshape(b, k, c, k))


def _tiles(pair: _Pair, max_bytes: int, implementation: Implementation | Choice | None) -> jax.Array:
    """One model's rows with another's, tile by tile."""
    (left, n), (right, m) = (
        (rows, max(1, min(rows.count, max_bytes // (2 * max(1, rows.groups.bytes + pair.bytes_of(rows))))))
        for rows in (pair.first, pair.second)
    )
    many, others = -(-left.count // n), -(-right.count // m)
    # The last tile is filled up by repeating the last group; the surplus is cut off below.
    rows = jnp.minimum(jnp.arange(many * n, dtype=jnp.int32), left.count - 1).reshape(many, n)
    columns = jnp.minimum(jnp.arange(others * m, dtype=jnp.int32), right.count - 1).reshape(others, m)
    height, width = (size * (1 if pair.traced else side.rows) for size, side in ((n, left), (m, right)))
    empty = jnp.zeros((height, width), left.dtype)

    def band(i: jax.Array, block: jax.Array) -> jax.Array:
        own = pair.left(jax.vmap(left.make)(rows[i]))

        def tile(j: jax.Array, block: jax.Array) -> jax.Array:
            made = meet(empty, own, pair.right(jax.vmap(right.make)(columns[j])), implementation)
            return jax.lax.dynamic_update_slice(block, made, (i * height, j * width))

        return jax.lax.fori_loop(jnp.zeros_like(i), jnp.asarray(others, i.dtype), tile, block)

    block = jnp.zeros((many * height, others * width), left.dtype)
    block = jax.lax.fori_loop(jnp.zeros((), jnp.int32), jnp.asarray(many, jnp.int32), band, block)
    return block[: left.count, : right.count] if pair.traced else block[: left.total, : right.total]


@dataclasses.dataclass(frozen=True)
class _RowSet:
    """The rows of one model, in groups: those of an example, or single rows of a model whose examples interact.

    Attributes:
      captured: the model by example, or `None`.
      count: number of groups.
      rows: of a group.
      dtype: of inner products.
      make: index of a group -> its `Factors`; without `captured` its rows, a list of one array (1, *leaf) per leaf.
      coupling: S, where it is applied to the finished matrix.
    """

    captured: Capture | None
    count: int
    rows: int
    dtype: np.dtype
    make: Callable[[jax.Array], Any]
    coupling: OutputCurvature | None = None

    @staticmethod
    def of(source: RowSource) -> _RowSet:
        """The rows that a source makes."""
        params, output = source.params, source.output
        captured = source.captured()
        if captured is None:
            joint = joint_groups(params, output, source.vjp)
            shapes = [leaf.shape for leaf in jax.tree.leaves(params)]

            def rows(index: jax.Array) -> list[jax.Array]:
                return [x.cotangents.reshape(1, *shape) for x, shape in zip(joint.make(index), shapes, strict=True)]

            return _RowSet(None, joint.groups, 1, joint.dtype, rows)
        coupling = None
        if output.couples_examples:
            like, coupling = outputs_like(output), output
            output = IdentityCurvature(jnp.zeros(like.shape, like.dtype))
        make = example_factors(captured, params, source.filled_inputs(captured), output)
        return _RowSet(captured, output.row_shape[0], math.prod(output.row_shape[1:]), captured.dtype, make, coupling)

    @property
    def total(self) -> int:
        """Number of rows."""
        return self.count * self.rows

    @functools.cached_property
    def groups(self) -> RowGroups:
        """The rows as `structure.gram` takes them."""
        return RowGroups(self.count, self.rows, self.dtype, lambda index: self.parts(self.make(index)))

    def parts(self, made: Any) -> list[Layer]:
        """All that the rows of a group are made of."""
        if self.captured is None:
            return [Layer(None, flat(rows)[None]) for rows in made]
        return layers(self.captured, made)

    def on_columns(self, matrix: jax.Array) -> jax.Array:
        """K S."""
        output = self.coupling
        if output is None:
            return matrix
        shape = outputs_like(output).shape
        return jax.vmap(lambda row: output.factor_transpose(row.reshape(shape)).reshape(-1))(matrix)

    def uses(self, leaf: int) -> list[LayerUse]:
        """The layer uses of a leaf."""
        if self.captured is None:
            return []
        return [self.captured.structure.uses[i] for i in uses_by_leaf(self.captured).get(leaf, ())]

    def touches(self, leaf: int) -> bool:
        """Whether there are rows of a leaf."""
        if self.captured is None:
            return True
        structure = self.captured.structure
        biases = {use.bias.leaf for use in structure.uses if use.bias is not None}
        return bool(self.uses(leaf)) or leaf in biases or leaf in structure.explicit

    def leaf_rows(self, made: Any, leaf: int) -> Layer:
        """The rows of a leaf, laid out as it is."""
        if self.captured is None:
            return Layer(None, flat(made[leaf])[None])
        structure, factors = self.captured.structure, made
        if leaf in structure.explicit:
            return Layer(None, flat(factors.explicit[structure.explicit.index(leaf)])[None])
        if indices := uses_by_leaf(self.captured).get(leaf):
            uses = [structure.uses[i] for i in indices]
            chosen = [[factors.activations[i] for i in indices], [factors.cotangents[i] for i in indices]]
            return Layer(None, flat(formed(uses, *chosen))[None])
        rows = [
            jax.vmap(use.bias.to_leaf)(jnp.sum(d, axis=1))
            for use, d in zip(structure.uses, factors.cotangents, strict=True)
            if use.bias is not None and use.bias.leaf == leaf
        ]
        return Layer(None, flat(sum(rows[1:], rows[0]))[None])

    def pairs(self, made: Factors, leaf: int, like: LayerUse) -> Layer:
        """The rows of the entries of a leaf that one layer use sees, without its bias, as pairs."""
        if self.captured is None:
            raise AssertionError("a model without capture has no layer uses.")
        uses = self.captured.structure.uses
        same = [i for i in uses_by_leaf(self.captured)[leaf] if same_entries(uses[i], like)]
        a = jnp.concatenate([scaled_activations(uses[i], made.activations[i], self.dtype) for i in same])
        d = jnp.concatenate([made.cotangents[i] for i in same], axis=1)
        return Layer(a.transpose(1, 0, 2), d.transpose(2, 0, 1, 3))


_Part = Callable[[_RowSet, Any], Layer]


@dataclasses.dataclass(frozen=True)
class _Pair:
    """The rows of two models, in parts of which each meets its counterpart alone.

    Attributes:
      first, second: the models.
      parts: of each, for one group.
      traced: whether rows of one number meet, and add up.
    """

    first: _RowSet
    second: _RowSet
    parts: tuple[_Part, ...]
    traced: bool = False

    @staticmethod
    def of(first: _RowSet, second: _RowSet) -> _Pair:
        """Leaf by leaf."""
        leaves = range(_leaf_count(first, second))
        parts = [part for leaf in leaves for part in _parts_of(leaf, first, second)]
        return _Pair(first, second, tuple(parts))

    def bytes_of(self, rows: _RowSet) -> int:
        """Of the parts of one group of a model: pairs as they are, or formed rows as large as their leaves."""
        index = jax.ShapeDtypeStruct((), jnp.int32)
        parts = jax.eval_shape(lambda i: [part(rows, made) for made in [rows.make(i)] for part in self.parts], index)
        return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(parts))

    def left(self, made: Any) -> list[Layer]:
        """The parts of several groups of the first."""
        return self._of(self.first, made)

    def right(self, made: Any) -> list[Layer]:
        """The parts of several groups of the second."""
        return self._of(self.second, made)

    def _of(self, rows: _RowSet, made: Any) -> list[Layer]:
        parts = jax.vmap(lambda own: [part(rows, own) for part in self.parts])(made)
        return [layer.joined() for layer in parts] if self.traced else parts


def _leaf_count(*sets: _RowSet) -> int:
    for rows in sets:
        if rows.captured is not None:
            return len(rows.captured.structure.findings)
    return len(jax.eval_shape(sets[0].make, jax.ShapeDtypeStruct((), jnp.int32)))


def _parts_of(leaf: int, first: _RowSet, second: _RowSet) -> list[_Part]:
    if not (first.touches(leaf) and second.touches(leaf)):
        return []
    mine, theirs = _distinct(first.uses(leaf)), _distinct(second.uses(leaf))
    both = [(a, b) for a in mine for b in theirs]
    if both and all(same_entries(a, b) or disjoint(a.views, b.views) for a, b in both):
        shared = [a for a, b in both if same_entries(a, b)]
        return [functools.partial(_RowSet.pairs, leaf=leaf, like=a) for a in shared]
    return [functools.partial(_RowSet.leaf_rows, leaf=leaf)]


def _distinct(uses: Sequence[LayerUse]) -> list[LayerUse]:
    """One layer use of each kind of entries."""
    found: list[LayerUse] = []
    for use in uses:
        if not any(same_entries(use, other) for other in found):
            found.append(use)
    return found
