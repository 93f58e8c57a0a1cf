"""Partitions: every leaf exactly once, or a sentence that says which is missing."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax.layerwise import ByGroup, ByLeaf, ByPath, ByPrefix
from curvax.layerwise.inner import clip_blocks
from tests.oracle.compiling import quick_jit

pytestmark = pytest.mark.fast

PARAMS: dict[str, Any] = {
    "embed": jnp.ones((5, 3)),
    "layers": [{"w": jnp.ones((3, 3)), "b": jnp.ones(3)} for _ in range(11)],
    "stack": {"w": jnp.ones((4, 3, 3)), "b": jnp.ones((4, 3))},
    "head": jnp.ones((3, 5)),
}
LEAVES = len(jax.tree.leaves(PARAMS))


def test_groups_are_the_top_level_entries():
    blocks = ByGroup().blocks(PARAMS)
    assert blocks.names == ("embed", "head", "layers", "stack")
    assert blocks.of_leaf == (0, 1, *[2] * 22, 3, 3)


def test_lists_and_stacks_split_into_layers():
    blocks = ByGroup(split=("layers", "stack")).blocks(PARAMS)
    assert blocks.names[2:13] == tuple(f"layers/{i}" for i in range(11))
    assert blocks.names[13:] == tuple(f"stack/{i}" for i in range(4))
    assert blocks.of_leaf[2:6] == (2, 2, 3, 3)
    assert blocks.of_leaf[-2:] == ((13, 14, 15, 16),) * 2


def test_sequences_and_single_arrays_have_blocks_too():
    assert ByGroup().blocks([(jnp.ones(2), jnp.ones(3)), (jnp.ones(2),)]).names == ("0", "1")
    assert ByGroup().blocks(jnp.ones(3)).names == ("all",)


@pytest.mark.parametrize("rule", [ByGroup(), ByGroup(("layers", "stack")), ByLeaf(), ByPath(lambda p: p[:5])])
def test_every_parameter_is_in_exactly_one_block(rule):
    blocks = rule.blocks(PARAMS)
    scale = quick_jit(lambda f: blocks.scale(f, jax.tree.map(jnp.ones_like, PARAMS)))
    total = jax.tree.map(np.zeros_like, PARAMS)
    for one in np.eye(blocks.count, dtype=np.float32):
        total = jax.tree.map(lambda t, x: t + np.asarray(x), total, scale(one))
    jax.tree.map(np.testing.assert_array_equal, total, PARAMS)
    sizes = np.square(np.asarray(quick_jit(blocks.norms)(PARAMS)))
    np.testing.assert_allclose(sizes.sum(), sum(x.size for x in jax.tree.leaves(PARAMS)), rtol=1e-6)
    assert len(set(blocks.names)) == blocks.count and len(blocks.of_leaf) == LEAVES


def test_leaves_are_named_by_their_paths():
    blocks = ByLeaf().blocks(PARAMS)
    assert blocks.count == LEAVES and blocks.names[2] == "layers/0/b"


def test_leaves_whose_paths_read_alike_stay_apart():
    blocks = ByLeaf().blocks({"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3)})
    assert blocks.of_leaf == (0, 1)


def test_a_string_for_a_tuple_of_names_is_refused():
    with pytest.raises(TypeError, match=r"split is the string 'layers': pass a tuple of names, \('layers',\)"):
        ByGroup(split="layers")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"block 'ends' has the string 'head': pass a tuple of paths"):
        ByPrefix({"ends": "head"})  # type: ignore[dict-item]


def test_a_path_without_a_block_is_named():
    with pytest.raises(ValueError, match=r"no block for 'head'"):
        ByPath(lambda path: None if path == "head" else "rest").blocks(PARAMS)  # type: ignore[arg-type,return-value]


def test_prefixes_end_at_components():
    layers = {f"layer {i}": (f"layers/{i}",) for i in range(11)}
    rest = {"ends": ("embed", "head"), "stack": ("stack",)}
    blocks = ByPrefix({**layers, **rest}).blocks(PARAMS)
    assert blocks.of_leaf.count(blocks.names.index("layer 1")) == 2
    with pytest.raises(ValueError, match=r"parameter 'head' is in no block"):
        ByPrefix({"ends": ("embed",), **layers, "stack": ("stack",)}).blocks(PARAMS)
    with pytest.raises(ValueError, match=r"parameter 'layers/3/b' is in the blocks layer 3, again"):
        ByPrefix({**layers, **rest, "again": ("layers/3/b",)}).blocks(PARAMS)
    with pytest.raises(ValueError, match=r"no parameter that trains belongs to ghost"):
        ByPrefix({**layers, **rest, "ghost": ("nowhere",)}).blocks(PARAMS)


def test_a_split_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"split names 'blocks', but the parameters have embed"):
        ByGroup(split=("blocks",)).blocks(PARAMS)
    with pytest.raises(ValueError, match=r"'pair' is to be split into layers, but its leaves have leading axes"):
        ByGroup(split=("pair",)).blocks({"pair": {"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))}})


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_clipping_is_by_block_and_knows_no_overflow(scale):
    ones = np.ones(4, np.float32)
    params = {"a": 3.0 * scale * ones, "s": np.stack([0.1 * scale * ones, scale * ones])}
    blocks = ByGroup(split=("s",)).blocks(params)
    found = quick_jit(lambda p: clip_blocks(blocks, p, 1.5 * scale))(params)
    np.testing.assert_allclose(found["a"] / scale, 0.75, rtol=1e-6)
    np.testing.assert_allclose(found["s"] / scale, [[0.1] * 4, [0.75] * 4], rtol=1e-6)
