"""Meshes: what comes with explicit axes is worked on with automatic ones, and leaves as it came.

On an explicit axis JAX carries the sharding of every array in its type, and refuses each operation whose result could
be sharded in several ways. A user says which in the own model. A step is a hundred such operations, on arrays that the
user never sees: there XLA's partitioner chooses, as it does on automatic axes.

    params f32[6,8@model], batch f32[16@data,6]      explicit axes, in the types
        | entered: the same arrays, axes automatic
    step                                             XLA's partitioner propagates what it sees
        | left: like the parameters, like the state
    params f32[6,8@model], state, info               explicit axes again, so that the next step is the same program

Nothing moves at either end: only the types change. `jax.sharding.auto_axes` is the same for functions that know the
shardings of their results before they run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator
from contextvars import ContextVar
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jax.tree_util import keystr

from curvax.tree import PyTree

R = TypeVar("R")


@dataclasses.dataclass(frozen=True)
class ShardedBy:
    """Shardings that follow from a result: a function from it to one for each of its leaves, `None` to replicate it."""

    rule: Callable[[PyTree], list[NamedSharding | None]]


Like: TypeAlias = PyTree | ShardedBy | None


_entered: ContextVar[Door | None] = ContextVar("curvax_door", default=None)


def entered() -> Door | None:
    """The door that was gone through, where explicit axes are automatic; else `None`."""
    return _entered.get()


@dataclasses.dataclass(frozen=True)
class Door:
    """Between a caller's explicit axes and automatic ones.

    Attributes:
      mesh: the mesh with explicit axes, as the caller has it.
      arrays: what comes in with a sharding in its type, and where it is.
    """

    mesh: AbstractMesh
    arrays: tuple[tuple[str, jax.Array], ...] = dataclasses.field(default=(), repr=False)

    @staticmethod
    def of(*trees: PyTree) -> Door | None:
        """The door for these arrays, or `None` where no axis is explicit."""
        meshes = (_mesh_of(x) for x in jax.tree.leaves(trees))
        mesh = next((m for m in meshes if _is_explicit(m)), jax.sharding.get_abstract_mesh())
        if mesh is None or not _is_explicit(mesh):
            return None
        paths = (leaf for tree in trees for leaf in jax.tree_util.tree_leaves_with_path(tree))
        return Door(mesh, tuple((keystr(path), x) for path, x in paths if _is_explicit(_mesh_of(x))))

    @contextlib.contextmanager
    def inside(self) -> Generator[None]:
        """Where all explicit axes are automatic."""
        explicit = {name: AxisType.Auto for name, kind in _types(self.mesh) if kind == AxisType.Explicit}
        token = _entered.set(self)
        try:
            with jax.sharding.use_abstract_mesh(self.mesh.update_axis_types(explicit)):
                yield
        finally:
            _entered.reset(token)

    def spec_of(self, place: str, shape: tuple[int, ...]) -> PartitionSpec:
        """How an array at the end of this path, of this shape, is sharded outside; replicated if nobody knows."""
        same = [x for path, x in self.arrays if path.endswith(place) and x.ndim == len(shape)]
        exact = [x for x in same if x.shape == shape]
        pieces = [x for x in same if x.shape[1:] == shape[1:]]
        return next((jax.typeof(x).sharding.spec for x in (*exact, *pieces)), PartitionSpec())

    def entered(self, tree: PyTree) -> PyTree:
        """`tree` for use inside; call it there."""

        def one(x: Any) -> Any:
            return jax.sharding.reshard(x, PartitionSpec()) if _is_explicit(_mesh_of(x)) else x

        return jax.tree.map(one, tree)

    def left(self, tree: PyTree, like: Like) -> PyTree:
        """What was made inside for use outside, with the shardings of `like`."""
        leaves, structure = jax.tree.flatten(tree)
        if like is None:
            shardings: list[NamedSharding | None] = [None] * len(leaves)
        elif isinstance(like, ShardedBy):
            shardings = like.rule(tree)
        else:
            shardings = [sharding_of(x) for x in jax.tree.leaves(like)]
        return jax.tree.unflatten(structure, [self._one(x, s) for x, s in zip(leaves, shardings, strict=True)])

    def _one(self, x: Any, sharding: NamedSharding | None) -> Any:
        if not isinstance(x, jax.Array):
            return x
        spec = PartitionSpec() if sharding is None else sharding.spec
        return jax.sharding.reshard(x, NamedSharding(self.mesh, spec))


def automatic(function: Callable[..., R], args: tuple[Any, ...], like: tuple[Like, ...]) -> R:
    """`function(*args)` with all explicit mesh axes automatic inside of it.

    Args:
      function: of pytrees; returns a tuple.
      args: its arguments.
      like: for each part of the result the arrays whose shardings it leaves with, as many as it has, or the rule
        for these shardings; `None` replicates it.
    """
    door = Door.of(*args)
    if door is None:
        return function(*args)
    with door.inside():
        results: Any = function(*door.entered(args))
    return type(results)(door.left(part, of) for part, of in zip(results, like, strict=True))


def refuse_manual_axes(params: PyTree, batch: PyTree) -> None:
    """Raises ValueError inside `jax.shard_map`, where a device would step on its own part of the batch and drift off.

    Models that are each device's own, whose parameters vary over all manual axes, may do so.
    """
    manual = frozenset(name for name, kind in _types(jax.sharding.get_abstract_mesh()) if kind == AxisType.Manual)
    own = [jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(params) if isinstance(x, jax.Array)]
    shared = manual - frozenset().union(*own)
    if shared and jax.tree.leaves(batch):
        raise ValueError(
            f"step runs inside jax.shard_map over {', '.join(map(repr, sorted(shared)))}, where every device would "
            "take a step of its own from its part of the batch: call it in jax.jit, the batch sharded over the mesh."
        )


def sharded_like(tree: PyTree, params: PyTree) -> list[Any]:
    """For each leaf of a state the sharding of the parameter that it belongs to; `None` where it belongs to none.

    A part of the state belongs to the parameters if it has their structure and shapes, or those with further axes in
    front: averages, momentum, second moments, sketches.

    Args:
      tree: a state, of arrays or shapes.
      params: arrays, or `jax.ShapeDtypeStruct`s with shardings.
    """
    leaves, structure = jax.tree.flatten(params)
    shapes = [x.shape for x in leaves]

    def is_like(node: Any) -> bool:
        parts = jax.tree.leaves(node)
        return (
            len(parts) == len(shapes)
            and all(hasattr(x, "shape") for x in parts)
            and all(x.shape[x.ndim - len(s) :] == s and x.ndim >= len(s) for x, s in zip(parts, shapes, strict=True))
            and jax.tree.structure(node) == structure
        )

    found: list[Any] = []
    for node in jax.tree.leaves(tree, is_leaf=is_like):
        if is_like(node):
            found += [
                _behind(sharding_of(p), x.ndim - p.ndim) for x, p in zip(jax.tree.leaves(node), leaves, strict=True)
            ]
        else:
            found.append(None)
    return found


def typed(tree: PyTree, mesh: AbstractMesh) -> PyTree:
    """Shapes of arrays inside a door with the shardings that they have outside of it, on this mesh of the same axes.

    An array is known by its place in the tree that it came in, and its shape; a part of a batch, or a single example,
    by all axes but the first. What is not known is replicated.
    """
    door = entered()

    def one(path: Any, x: Any) -> jax.ShapeDtypeStruct:
        shape, dtype, place = jnp.shape(x), jnp.result_type(x), keystr(path[2:])
        spec = PartitionSpec() if door is None else door.spec_of(place, shape)
        divides = all(n % _parts(mesh, names) == 0 for n, names in zip(shape, spec, strict=False))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec if divides else PartitionSpec()))

    return jax.tree_util.tree_map_with_path(one, tree)


def _parts(mesh: AbstractMesh, names: Any) -> int:
    sizes = [mesh.shape[name] for name in (names if isinstance(names, tuple) else (names,)) if name is not None]
    return math.prod(sizes)


def by_examples(inputs: PyTree) -> ShardedBy:
    """The shardings of results with the examples on their first axis, which is split as that of the inputs is."""
    shardings = (sharding_of(x) for x in jax.tree.leaves(inputs) if getattr(x, "ndim", 0))
    first = next((NamedSharding(s.mesh, PartitionSpec(*s.spec[:1])) for s in shardings if s is not None), None)
    return ShardedBy(lambda results: [first for _ in jax.tree.leaves(results)])


def on_any_mesh(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """A transformation whose update sees automatic mesh axes, and whose state is sharded like the parameters."""
    inner = optax.with_extra_args_support(tx)

    def init(params: PyTree) -> Any:
        return placed(inner.init, params)

    def update(updates: PyTree, state: Any, params: PyTree = None, **extra: Any) -> tuple[PyTree, Any]:
        def updated(updates: PyTree, state: Any, params: PyTree, extra: dict[str, Any]) -> tuple[PyTree, Any]:
            return inner.update(updates, state, params, **extra)

        return automatic(updated, (updates, state, params, extra), (updates, state))

    return optax.GradientTransformationExtraArgs(init, update)


def sharding_of(x: Any) -> NamedSharding | None:
    """The sharding of an array, of a shape or of a traced array on explicit axes, if it has one on a mesh."""
    if isinstance(x, Tracer):
        sharding = jax.typeof(x).sharding
    else:
        sharding = getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _behind(sharding: NamedSharding | None, axes: int) -> NamedSharding | None:
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(*[None] * axes, *sharding.spec))


def placed(make: Callable[..., R], params: PyTree, *others: PyTree) -> R:
    """`make(params, *others)`, a state, sharded like the parameters: see `sharded_like`; the rest of it is replicated.

    Each device makes its own part, and nothing is made whole first.

    Args:
      make: -> state.
      params: arrays, or `jax.ShapeDtypeStruct`s, with shardings or without.
      others: further arrays, or shapes.
    """
    leaves, structure = jax.tree.flatten((params, others))
    arrays = [x if isinstance(x, jax.Array) else None for x in leaves]

    def inside(arrays: list[jax.Array | None]) -> R:
        filled = [x if a is None else a for x, a in zip(leaves, arrays, strict=True)]
        first, rest = jax.tree.unflatten(structure, filled)
        like = (ShardedBy(lambda state: sharded_like(state, params)),)
        return automatic(lambda *args: (make(*args),), (first, *rest), like)[0]

    shardings = [s for s in map(sharding_of, jax.tree.leaves(params)) if s is not None and s.mesh.size > 1]
    if not shardings or any(isinstance(x, Tracer) for x in leaves):
        return inside(arrays)
    shapes, mesh = jax.eval_shape(inside, arrays), shardings[0].mesh
    out = [
        s or _whole(mesh, x.ndim) for s, x in zip(sharded_like(shapes, params), jax.tree.leaves(shapes), strict=True)
    ]
    return jax.jit(inside, out_shardings=jax.tree.unflatten(jax.tree.structure(shapes), out))(arrays)


def _whole(mesh: Any, axes: int) -> NamedSharding:
    """Replicated, written as a step returns it: JAX compiles again for another way to say the same."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axes) if _is_explicit(mesh) else PartitionSpec())


def _mesh_of(x: Any) -> AbstractMesh | None:
    if not isinstance(x, jax.Array):
        return None
    return jax.typeof(x).sharding.mesh


def _types(mesh: AbstractMesh) -> list[tuple[Any, AxisType]]:
    return list(zip(mesh.axis_names, mesh.axis_types, strict=True))


def _is_explicit(mesh: AbstractMesh | None) -> bool:
    return mesh is not None and not mesh.empty and AxisType.Explicit in mesh.axis_types
