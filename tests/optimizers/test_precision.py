"""What SOAP and Shampoo owe to numbers of finite precision: no unit, no direction made of rounding, complex leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from curvax.optimizers import muon_adamw, scale_by_muon, scale_by_shampoo, scale_by_soap, shampoo, soap
from tests.oracle.compiling import quick_jit
from tests.oracle.optimizers import many_updates, power, shampoo_by_hand, soap_by_hand
from tests.oracle.optimizers import updates as run

SHAPES = {"matrix": (6, 9), "stack": (2, 5, 4), "vector": (5,), "scalar": (), "long": (12, 3), "low": (10, 14)}
MAKERS = {
    "soap": lambda: scale_by_soap(every=3, max_dim=14),
    "one-sided soap": lambda: scale_by_soap(every=3, max_dim=9),
    "shampoo": lambda: scale_by_shampoo(),
    "shampoo, averages": lambda: scale_by_shampoo(b2=0.9, every=2),
    "diagonal shampoo": lambda: scale_by_shampoo(max_dim=4),
}


def low_rank(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> np.ndarray:
    g = rng.standard_normal((shape[0], rank)) @ rng.standard_normal((rank, shape[1]))
    return g / np.linalg.norm(g)


def gradients(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    grads = [{n: rng.standard_normal(s) for n, s in SHAPES.items()} for _ in range(count)]
    return [{**g, "low": low_rank(rng, (10, 14), 3)} for g in grads]


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_updates_do_not_depend_on_the_scale_of_gradients(make: Any) -> None:
    grads = gradients(7)
    plain, *others = many_updates(
        make(), [single(jax.tree.map(lambda g, e=e: g * 2.0**e, grads)) for e in (0, -40, 40, -13)]
    )
    for scaled, exact in zip(others, (True, True, False), strict=True):
        for a, b in zip(plain, scaled, strict=True):
            for name in SHAPES:
                size = float(np.linalg.norm(a[name]))
                assert size > 0
                # A fourth root of a power of two has the same digits where its exponent is a multiple of four.
                np.testing.assert_allclose(b[name], a[name], rtol=0, atol=0 if exact else 2e-5 * size)


@jax.numpy_dtype_promotion("standard")  # Optax's weight decay relies on promotion
def test_muon_and_its_adamw_do_not_either() -> None:
    grads = [{name: g[name] for name in ("matrix", "stack", "low", "vector")} for g in gradients(3)]
    plain, *others = many_updates(
        muon_adamw(1.0, others=()),
        [single(jax.tree.map(lambda g, e=e: g * 2.0**e, grads)) for e in (0, -40, 40)],
    )
    for scaled in others:
        jax.tree.map(np.testing.assert_array_equal, plain, scaled)


@pytest.mark.parametrize(
    ("shape", "rank"), [((32, 64), 8), ((64, 32), 1), ((48, 48), 20), ((128, 256), 32), ((16, 200), 5)], ids=str
)
def test_the_first_update_of_soap_moves_no_direction_without_a_gradient(shape: tuple[int, int], rank: int) -> None:
    """In the basis of its own singular vectors G is diagonal, and Adam makes signs of the diagonal: U V^T."""
    g = low_rank(np.random.default_rng(rank), shape, rank)
    u, _, vt = np.linalg.svd(g)
    truth, update = u[:, :rank] @ vt[:rank], quick_jit(scale_by_soap().update)
    for size in (1e-6, 1.0, 1e5):
        gradient = single({"w": g * size})
        found = update(gradient, scale_by_soap().init(gradient))[0]["w"]
        assert np.linalg.norm(found - truth) < 2e-2 * np.linalg.norm(truth)


def test_a_stack_takes_the_steps_of_its_matrices() -> None:
    rng = np.random.default_rng(4)
    layers = [[low_rank(rng, (12, 20), 4) for _ in range(3)] for _ in range(12)]
    stacked = run(scale_by_soap(every=4), single([{"w": np.stack(step)} for step in layers]))
    apart = [single([{"w": step[i]} for step in layers]) for i in range(3)]
    for i, alone in enumerate(many_updates(scale_by_soap(every=4), apart)):
        for a, b in zip(stacked, alone, strict=True):
            np.testing.assert_allclose(a["w"][i], b["w"], atol=2e-2)


@pytest.mark.parametrize(
    ("make", "shape", "rank"),
    [
        (scale_by_soap, (32, 48), 4),
        (scale_by_soap, (24, 64), 24),
        (scale_by_soap, (40, 40), 1),
        (scale_by_shampoo, (32, 48), 4),
    ],
    ids=["soap-32-4", "soap-24-24", "soap-40-1", "shampoo-32-4"],
)
def test_rounding_of_gradients_does_not_choose_a_basis(make: Any, shape: tuple[int, int], rank: int) -> None:
    """As gradients differ when they are summed over another number of devices."""
    rng = np.random.default_rng(5)
    grads = [low_rank(rng, shape, rank) for _ in range(14)]
    rounded = [g * (1 + 6e-8 * rng.standard_normal(shape)) for g in grads]
    plain, other = many_updates(make(every=10), [single([{"w": g} for g in of]) for of in (grads, rounded)])
    for a, b in zip(plain, other, strict=True):
        assert np.linalg.norm(a["w"] - b["w"]) < 0.1 * np.linalg.norm(a["w"])


@pytest.mark.parametrize("make", [scale_by_soap, scale_by_shampoo])
def test_rows_and_columns_without_gradients_stay(make: Any) -> None:
    rng = np.random.default_rng(6)
    grads = [low_rank(rng, (20, 30), 3) for _ in range(12)]
    for g in grads:
        g[[2, 3, 11]] = 0
        g[:, 7] = 0
    for found in run(make(every=5), single([{"w": g} for g in grads])):
        size = 2e-3 * np.abs(found["w"]).max()
        np.testing.assert_allclose(found["w"][jnp.asarray([2, 3, 11])], 0, atol=size)
        np.testing.assert_allclose(found["w"][:, 7], 0, atol=size)


def test_gradients_of_zero_first() -> None:
    zero, (g,) = {"w": np.zeros((6, 9)), "b": np.zeros(4)}, [{"w": np.ones((6, 9)), "b": np.ones(4)}]
    for make in MAKERS.values():
        *still, moved = run(make(), single([zero, zero, g]))
        assert all(not np.any(x) for x in jax.tree.leaves(still))
        assert all(np.all(np.isfinite(x)) and np.any(x) for x in jax.tree.leaves(moved))


@pytest.mark.parametrize("every", [1, 3])
def test_complex_matrices_have_conjugates_where_they_belong(every: int, x64: None) -> None:
    rng = np.random.default_rng(7)
    history = [rng.standard_normal((5, 3)) + 1j * rng.standard_normal((5, 3)) for _ in range(5)]
    vectors = [g[:, 0] for g in history]
    grads = [{"w": jnp.asarray(g), "v": jnp.asarray(v)} for g, v in zip(history, vectors, strict=True)]
    soaped = run(scale_by_soap(b1=0.8, b2=0.9, every=every, max_dim=4), grads)
    shampooed = run(scale_by_shampoo(eps=1e-2, every=every, max_dim=4), grads)
    for t in range(5):
        expected = soap_by_hand(history[: t + 1], 0.8, 0.9, 1e-8, every, long=True)
        np.testing.assert_allclose(soaped[t]["w"], expected, rtol=1e-6, atol=1e-9)
        expected = shampoo_by_hand(history[: t + 1], 1e-2, every, None, long=True)
        np.testing.assert_allclose(shampooed[t]["w"], expected, rtol=1e-8)
    seen = vectors[: 4 // every * every + 1]
    long = np.mean([np.abs(v) ** 2 for v in seen], axis=0) * len(seen)
    np.testing.assert_allclose(shampooed[4]["v"], (long + 1e-2 * long.mean()) ** -0.5 * vectors[4], rtol=1e-8)
    whole = run(scale_by_shampoo(eps=1e-2), [{"v": jnp.asarray(v)} for v in vectors])
    factor = sum(np.outer(v, v.conj()) for v in vectors)
    damped = factor + 1e-2 * np.mean(np.diag(factor)) * np.eye(5)
    np.testing.assert_allclose(whole[4]["v"], power(damped, -0.5) @ vectors[4], rtol=1e-8)


@jax.numpy_dtype_promotion("standard")  # Optax's Adam relies on promotion
@pytest.mark.parametrize(
    "make",
    [
        lambda: scale_by_soap(every=2),
        lambda: scale_by_shampoo(b2=0.9, every=2, graft=optax.scale_by_adam()),
        scale_by_muon,
    ],
    ids=["soap", "shampoo", "muon"],
)
def test_a_gradient_that_is_not_a_number_is_skipped_and_counted(make: Any) -> None:
    rng, tx = np.random.default_rng(10), make()
    good = [{"w": rng.standard_normal((4, 3)), "v": rng.standard_normal((2, 3))} for _ in range(4)]
    bad = {"w": np.where(np.eye(4, 3), np.nan, 1.0), "v": good[0]["v"]}
    update = quick_jit(tx.update)

    def after(grads: Any) -> Any:
        updates, state = None, tx.init(single(good[0]))
        for g in single(grads):
            updates, state = update(g, state, single(good[0]))
        return updates, state

    _, skipping = after([*good[:2], bad])
    assert int(skipping.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, skipping._replace(skipped=jnp.int32(0)), after(good[:2])[1])
    assert all(not np.any(x) for x in jax.tree.leaves(after([*good[:2], bad])[0]))
    for place in (0, 2):
        found, _ = after([*good[:place], bad, *good[place:]])
        jax.tree.map(np.testing.assert_array_equal, found, after(good)[0])


def test_bases_stay_orthogonal_and_rank_one_gradients_finite() -> None:
    """Over a thousand updates in single precision, of a matrix whose gradients have one direction among them."""
    rng, tx = np.random.default_rng(11), scale_by_soap(every=1)
    shapes = single({"full": np.zeros((6, 9)), "one": np.zeros((8, 5))})
    line = single(np.outer(rng.standard_normal(8), rng.standard_normal(5)))
    shampoo = scale_by_shampoo(every=7)

    def step(states: Any, key: jax.Array) -> Any:
        full, size = jax.random.normal(key, (6, 9)), jax.random.normal(key, ())
        grads = {"full": full, "one": line * size}
        pairs: list[Any] = [of.update(grads, state) for of, state in zip((tx, shampoo), states, strict=True)]
        return [state for _, state in pairs], jnp.stack([jnp.sum(jnp.abs(u["one"])) for u, _ in pairs])

    run = quick_jit(lambda s: jax.lax.scan(step, s, jax.random.split(jax.random.key(0), 1000)))
    (soaped, _), sizes = run([tx.init(shapes), shampoo.init(shapes)])
    sizes = np.asarray(sizes)
    assert np.all(np.isfinite(sizes)) and np.all(sizes[-1] > 0)
    for basis in jax.tree.leaves(soaped.bases):
        q = np.asarray(basis, np.float64)
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-5)


def test_a_matrix_that_waits_for_its_first_gradient_gets_an_exact_basis() -> None:
    """As LoRA's A, whose gradient is zero while B is."""
    rng = np.random.default_rng(12)
    zero, later = np.zeros((5, 8)), [rng.standard_normal((5, 8)) for _ in range(2)]
    tx, grads = scale_by_soap(every=10), [{"w": g} for g in (zero, zero, *later)]
    state: Any = tx.init(single(grads[0]))
    update = quick_jit(tx.update)
    for g in single(grads[:3]):
        _, state = update(g, state)
    for side, basis in state.bases[0].items():
        turned = np.asarray(basis.T @ state.factors[0][side] @ basis, np.float64)
        np.testing.assert_allclose(turned, np.diag(np.diag(turned)), atol=1e-5 * np.trace(turned))


@pytest.mark.parametrize(("make", "rate"), [(soap, 0.05), (shampoo, 0.5)])
def test_complex_parameters_train(make: Any, rate: float) -> None:
    rng = np.random.default_rng(8)
    a = jnp.asarray(rng.standard_normal((20, 6)) + 1j * rng.standard_normal((20, 6)), jnp.complex64)
    target = a @ jnp.asarray(rng.standard_normal((6, 4)) + 1j * rng.standard_normal((6, 4)), jnp.complex64)
    tx = make(rate)

    def loss(p: Any) -> jax.Array:
        return jnp.mean(jnp.square(jnp.abs(a @ p["w"] + p["b"] - target)))

    def step(carry: Any, _: None) -> Any:
        p, s = carry
        u, s = tx.update(jax.tree.map(jnp.conj, jax.grad(loss)(p)), s, p)
        return (jax.tree.map(lambda x, d: x + d.astype(x.dtype), p, u), s), loss(p)

    params = {"w": jnp.zeros((6, 4), jnp.complex64), "b": jnp.zeros(4, jnp.complex64)}
    with jax.numpy_dtype_promotion("standard"):
        _, curve = quick_jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=150))(params)
    assert curve[-1] < 0.05 * curve[0]


def test_muon_refuses_complex_matrices_and_says_what_to_wrap() -> None:
    params = {"w": jnp.ones((3, 4), jnp.complex64), "b": jnp.ones(4, jnp.complex64)}
    tx = muon_adamw(0.1, others=())
    with pytest.raises(TypeError, match=r"'w' is complex.*split_real_and_imaginary"):
        tx.init(params)
    wrapped = optax.contrib.split_real_and_imaginary(tx)
    with jax.numpy_dtype_promotion("standard"):
        updates: Any = wrapped.update(params, wrapped.init(params), params)[0]
    assert updates["w"].dtype == jnp.complex64
    assert np.all(np.isfinite(np.asarray(updates["w"])))


@pytest.mark.parametrize(
    "make",
    [lambda: soap(0.1, every=2), lambda: shampoo(0.1), lambda: muon_adamw(0.1, others=())],
    ids=["soap", "shampoo", "muon"],
)
def test_leaves_of_any_shape(make: Any) -> None:
    shapes = [(0, 5), (5, 0), (3, 0, 4), (0,), (), (1,), (1, 1), (1, 6), (6, 1), (2, 1, 1), (2, 3)]
    rng = np.random.default_rng(9)
    tx, params = make(), single([np.ones(shape) for shape in shapes])
    state, update = tx.init(params), quick_jit(tx.update)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(3):
            updates, state = update(single([rng.standard_normal(shape) for shape in shapes]), state, params)
    assert [u.shape for u in updates] == shapes
    assert all(np.all(np.isfinite(np.asarray(u))) for u in updates)
