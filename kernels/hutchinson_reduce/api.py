"""The op hutchinson_reduce: the diagonal that several Hutchinson probes estimate, averaged over blocks.

| reads | writes | FLOPs | (n: elements over all leaves, k: probes)
|---|---|---|---|
| 2 k n | n, or one entry per block | 2 k n |

Batching: `jax.vmap` is exact. Partitioning: as XLA partitions it; inside `jax.shard_map` each device averages over its
own shard, so a block must not be cut. Differentiation: none; the op stays off the differentiated path.

Papers: Bekas, Kokiopoulou and Saad, "An estimator for the diagonal of a matrix" (2007); Yao et al., "ADAHESSIAN: An
Adaptive Second Order Optimizer for Machine Learning" (2021), section 3.2.
"""

from __future__ import annotations

import jax

from curvax.kernels._dispatch import Choice, Implementation, Op, Request, Variant, select
from curvax.kernels._operands import floating
from curvax.kernels.hutchinson_reduce import reference
from curvax.tree import PyTree

HUTCHINSON_REDUCE = Op("hutchinson_reduce", (Variant("reference"),))
OPS = (HUTCHINSON_REDUCE,)


def hutchinson_reduce(
    probes: PyTree,
    products: PyTree,
    axes: tuple[tuple[int, ...], ...] | None = None,
    *,
    use_abs: bool = False,
    implementation: Implementation | Choice | None = None,
) -> PyTree:
    """The mean over probes of z * C z, then its magnitude, then its mean over blocks.

    Args:
      probes: z, pytree of floating arrays with an axis of probes in front of each leaf.
      products: C z, alike.
      axes: for each leaf in turn the axes (counted without that of the probes) that a block extends over; no blocks if
        `None`.
      use_abs: take magnitudes, between the mean over probes and that over blocks. Off by default: it biases.
      implementation: None for the best supported one.

    Returns:
      The estimate without the axis of probes, in the accumulation dtype; averaged axes have size 1, so that it
      broadcasts to what it estimates.

    Raises:
      Unsupported: the named implementation cannot run here.
      TypeError: probes and products differ in structure or shapes, lack the axis of probes, or are not floating.
      ValueError: the leaves differ in their number of probes, or axes do not fit.
    """
    probes, products = floating("hutchinson_reduce", probes=probes, products=products)
    _check(probes, products)
    leaves = jax.tree.leaves(probes)
    blocks = ((),) * len(leaves) if axes is None else tuple(
        tuple(sorted(axis % max(leaf.ndim - 1, 1) for axis in own)) for leaf, own in _paired(leaves, axes)
    )  # fmt: skip
    select(HUTCHINSON_REDUCE, implementation, Request.of(probes, products))
    return reference.hutchinson_reduce(probes, products, blocks, use_abs=use_abs)


def _check(probes: PyTree, products: PyTree) -> None:
    actual, expected = jax.tree.structure(products), jax.tree.structure(probes)
    if actual != expected:
        raise TypeError(f"hutchinson_reduce: products have structure {actual}, probes {expected}: pass trees alike")
    counts = set()
    for i, (z, c) in enumerate(zip(jax.tree.leaves(probes), jax.tree.leaves(products), strict=True)):
        if z.shape != c.shape or not z.ndim:
            raise TypeError(
                f"hutchinson_reduce: leaf {i} of probes has shape {z.shape}, of products {c.shape}: "
                "give both an axis of probes in front and one shape"
            )
        counts.add(z.shape[0])
    if len(counts) > 1 or 0 in counts:
        raise ValueError(f"hutchinson_reduce: leaves have {sorted(counts)} probes: give all the same, at least one")


def _paired(leaves: list[jax.Array], axes: tuple[tuple[int, ...], ...]) -> list[tuple[jax.Array, tuple[int, ...]]]:
    if len(axes) != len(leaves) or any(isinstance(own, int) for own in axes):
        raise ValueError(f"hutchinson_reduce: axes are {axes} for {len(leaves)} leaves: give a tuple of axes for each")
    for i, (leaf, own) in enumerate(zip(leaves, axes, strict=True)):
        rank = leaf.ndim - 1
        if any(not -rank <= axis < rank for axis in own) or len({axis % rank for axis in own if rank}) != len(own):
            raise ValueError(f"hutchinson_reduce: axes {own} of leaf {i} are not distinct axes among its {rank}")
    return list(zip(leaves, axes, strict=True))
