"""Vector-space arithmetic on pytrees that Optax does not have: accumulation in float32 or wider, and flat views.

A parameter-space vector is a pytree with the structure of the trainable parameters. curvax keeps such vectors in
their *accumulation dtypes*: float32 where the parameter is narrower (bfloat16, float16), the parameter's own otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any


def accumulation_dtype(dtype: Any) -> np.dtype:
    """The dtype in which curvax accumulates values of `dtype`: at least float32."""
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else np.dtype(dtype)


def upcast(tree: PyTree) -> PyTree:
    """Casts every leaf to its accumulation dtype; a `jax.ShapeDtypeStruct` stays one."""

    def one(x: Any) -> Any:
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(x.shape, accumulation_dtype(x.dtype))
        return jnp.asarray(x).astype(accumulation_dtype(x.dtype))

    return jax.tree.map(one, tree)


def upcast_shapes(tree: PyTree) -> PyTree:
    """`jax.ShapeDtypeStruct`s of `upcast(tree)`, without tracing anything: products ask for them again and again."""

    def one(x: Any) -> jax.ShapeDtypeStruct:
        dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
        return jax.ShapeDtypeStruct(np.shape(x), accumulation_dtype(dtype))

    return jax.tree.map(one, tree)


def hollow(tree: PyTree) -> PyTree:
    """Zeros that take no memory in the place of every `jax.ShapeDtypeStruct`, for functions that must be traced."""

    def one(x: Any) -> Any:
        return np.broadcast_to(np.zeros((), x.dtype), x.shape) if isinstance(x, jax.ShapeDtypeStruct) else x

    return jax.tree.map(one, tree)


def places(tree: PyTree) -> tuple[str, ...]:
    """Where each leaf is, as `jax.tree_util.keystr` writes it.

    Boxes are left out: `nnx.Optimizer` makes a state of parameters in their `nnx.Param`s and updates it with bare
    arrays, as Flax's other boxes (`nn.Partitioned`) come and go. A box is a node with one child, its `value`.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    bare = [path[:-1] if path and path[-1] == jax.tree_util.GetAttrKey("value") else path for path in paths]
    return tuple(map(jax.tree_util.keystr, bare))


def in_boxes_of(like: PyTree, tree: PyTree) -> PyTree:
    """`tree` with the boxes, and other containers, of `like`; as it is if its leaves are at other places."""
    structure = jax.tree.structure(like)
    if jax.tree.structure(tree) == structure or places(tree) != places(like):
        return tree
    return jax.tree.unflatten(structure, jax.tree.leaves(tree))


def cast_like(tree: PyTree, like: PyTree) -> PyTree:
    """Casts every leaf of `tree` to the dtype of the matching leaf of `like`."""
    return jax.tree.map(lambda x, y: x.astype(y.dtype), tree, like)


def fixed(tree: PyTree) -> PyTree:
    """Every leaf as an array of a dtype that is its own.

    What JAX calls weakly typed, a Python number that became an array, gives way to the dtype of what it meets; a state
    that starts with one comes back as another type, and what takes it is compiled a second time.
    """

    def one(x: Any) -> Any:
        return x if isinstance(x, jax.ShapeDtypeStruct) else jax.lax.convert_element_type(x, jnp.result_type(x))

    return jax.tree.map(one, tree)


def zeros_like(tree: PyTree) -> PyTree:
    """An upcast zero vector with the structure and shapes of `tree` (arrays or `jax.ShapeDtypeStruct`s)."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, accumulation_dtype(x.dtype)), tree)


def by_leaf(tree: PyTree, make: Callable[[Any], PyTree]) -> PyTree:
    """A tuple with what `make` makes of each leaf, for a state that follows the parameters and is none of them.

    Of a tree without leaves, one scalar. So a state of no parameters has a leaf where that of others has a subtree:
    `optax.tree.map_params` makes one to tell what in a state are parameters, and takes the subtree as one that is not.
    """
    leaves = jax.tree.leaves(tree)
    return tuple(map(make, leaves)) if leaves else jnp.zeros(())


def scalar_dtype(tree: PyTree) -> np.dtype:
    """The dtype of scalars (dot products, `lam`) that go with `tree`: the widest of its leaves, at least float32."""
    dtypes = {accumulation_dtype(x.dtype) for x in jax.tree.leaves(tree)}
    return max(dtypes, key=lambda dtype: dtype.itemsize, default=np.dtype(np.float32))


def size(tree: PyTree) -> int:
    """Number of scalars in `tree`."""
    return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


def vdot(a: PyTree, b: PyTree) -> jax.Array:
    """Inner product over all leaves, accumulated in the accumulation dtype. An empty tree gives 0.

    XLA adds up long reductions as trees of shorter ones, so a float32 result over 10^8 terms keeps its seven digits.
    """
    dtype = scalar_dtype((a, b))
    total = jnp.zeros((), dtype)
    for x, y in zip(_parts(a, dtype), _parts(b, dtype), strict=True):
        total = total + jnp.vdot(x, y, precision=jax.lax.Precision.HIGHEST)
    return total


_SMALL_LEAF = 2**14


def _parts(tree: PyTree, dtype: np.dtype) -> list[jax.Array]:
    """The leaves to reduce one by one: large ones as they are, all small ones as one vector.

    Each reduction is some loops that XLA compiles and starts by themselves. Of biases, gains and small matrices that
    takes longer than a copy of them.
    """
    leaves = [x.astype(dtype) for x in jax.tree.leaves(tree) if x.size]
    small = [x.ravel() for x in leaves if x.size <= _SMALL_LEAF]
    large = [x for x in leaves if x.size > _SMALL_LEAF]
    return [*large, *([jnp.concatenate(small)] if len(small) > 1 else small)]


def max_abs(tree: PyTree) -> jax.Array:
    """Largest magnitude over all leaves; 0 for an empty tree. NaN entries may go unnoticed: backends differ there."""
    dtype = scalar_dtype(tree)
    largest = jnp.zeros((), dtype)
    for part in _parts(tree, dtype):
        largest = jnp.maximum(largest, jnp.max(jnp.abs(part)))
    return largest


def divisor(largest: jax.Array) -> jax.Array:
    """What numbers up to `largest` are divided by before they are squared; 1 where it is zero or not finite.

    A power of two, so that the division is exact, and so far from both ends of the range that its inverse is a
    normal number (compilers multiply by that, and processors take others for zero); what remains of the size of the
    numbers their squares can bear.
    """
    bound = jnp.finfo(largest.dtype).maxexp - 28
    usable = (largest > 0) & jnp.isfinite(largest)
    one = jnp.ones_like(largest)
    _, exponent = jnp.frexp(jnp.where(usable, largest, one))
    return jnp.where(usable, jnp.ldexp(one, jnp.clip(exponent, -bound, bound)), one)


def norm(tree: PyTree) -> jax.Array:
    """Euclidean norm, safe against overflow and underflow of the squares."""
    safe, unit = _scaled_norm(tree)
    return safe * unit


def relative_norm(part: PyTree, whole: PyTree) -> jax.Array:
    """|part| / |whole|, where neither norm need fit its dtype; 0 if `whole` is zero."""
    (scale, above), (other, below) = _scaled_norm(part), _scaled_norm(whole)
    some = below > 0
    ratio = above / jnp.where(some, below, jnp.ones_like(below)) * (scale / other)
    return jnp.where(some, ratio, jnp.zeros_like(ratio))


def _scaled_norm(tree: PyTree) -> tuple[jax.Array, jax.Array]:
    """(a scale, the norm of the tree divided by it); what is not finite has the scale 1."""
    scale = max_abs(tree)
    safe = divisor(scale)
    parts = [x / safe for x in _parts(tree, scale.dtype)]
    unit = jnp.sqrt(vdot(parts, parts))
    return safe, jnp.where(jnp.isfinite(scale), unit, scale)


def all_finite(tree: PyTree) -> jax.Array:
    """True if no leaf holds NaN or infinity.

    0 x is 0 for finite x and NaN otherwise, so one sum tells; XLA's sums on CPUs take half the time of its
    conjunctions.
    """
    by_dtype: dict[Any, list[jax.Array]] = {}
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            by_dtype.setdefault(leaf.dtype, []).append(leaf)
    finite = jnp.asarray(True)
    for dtype, leaves in by_dtype.items():
        for part in _parts(leaves, dtype):
            finite = finite & (jnp.sum(part * jnp.zeros((), dtype)) == 0)
    return finite


def scale(alpha: jax.Array, tree: PyTree) -> PyTree:
    """alpha * tree, in the dtypes of `tree`."""
    return jax.tree.map(lambda x: alpha.astype(x.dtype) * x, tree)


def add(a: PyTree, b: PyTree) -> PyTree:
    """a + b."""
    return jax.tree.map(jnp.add, a, b)


def axpy(alpha: jax.Array, x: PyTree, y: PyTree) -> PyTree:
    """alpha * x + y, in the dtypes of `y`."""
    return jax.tree.map(lambda a, b: alpha.astype(b.dtype) * a.astype(b.dtype) + b, x, y)


def where(condition: jax.Array, a: PyTree, b: PyTree) -> PyTree:
    """Leafwise selection by one scalar condition."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def ravel(tree: PyTree) -> tuple[jax.Array, Callable[[jax.Array], PyTree]]:
    """One upcast vector of all leaves, and the function that splits it into leaves again."""
    leaves, structure = jax.tree.flatten(tree)
    dtype = scalar_dtype(tree)
    sizes = [int(np.prod(x.shape)) for x in leaves]

    def unravel(flat: jax.Array) -> PyTree:
        parts = jnp.split(flat, np.cumsum(sizes)[:-1]) if leaves else []
        restored = [p.reshape(x.shape).astype(accumulation_dtype(x.dtype)) for p, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(structure, restored)

    flat = jnp.concatenate([x.astype(dtype).ravel() for x in leaves]) if leaves else jnp.zeros((0,), dtype)
    return flat, unravel
