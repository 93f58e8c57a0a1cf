"""Every lane's direction is the dense float64 damped solve, on every model, at several lam."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from tests.integration.harness import (
    LAMBDAS,
    TOLERANCE,
    assert_close,
    batch_of,
    directions,
    lam_sequence,
    precision,
    standard_truth,
    truth_of,
)
from tests.oracle import dense, models

CG = {"float64": {"tol": 1e-12, "maxiter": 1000}, "float32": {"tol": 1e-5, "maxiter": 300}}
PRESETS = {
    "sgn_ce": ("ce", curvax.sgn_ce, True),
    "egn_ce": ("ce", curvax.egn_ce, False),
    "ggn_direct_ce": ("ce", curvax.ggn_direct_ce, False),
    "sgn_mse": ("mse", curvax.sgn_mse, True),
    "egn_mse": ("mse", curvax.egn_mse, False),
    "egn_mse_cg": ("mse", curvax.egn_mse_cg, True),
    "ggn_direct_mse": ("mse", curvax.ggn_direct_mse, False),
}
MAIN = {
    "ce": models.CLASSIFIERS,
    "mse": (models.MLP_TANH, models.SHARED, models.GRID, models.SCALAR, models.ONE_OUTPUT),
}
FEW = {"ce": (models.MLP_TANH, models.ODD_TREE), "mse": (models.RECURRENT, models.SCALAR)}


def _cases(dtype):
    """(preset, model): all models for the two main lanes in float64, a few for the rest."""
    for name, (kind, _, _) in PRESETS.items():
        main = name.startswith(("sgn", "egn")) and not name.endswith("cg")
        for model in MAIN[kind] if main and dtype == "float64" else FEW[kind]:
            yield name, model


CASES = [(dtype, name, model) for dtype in TOLERANCE for name, model in _cases(dtype)]


@pytest.mark.parametrize(("dtype", "name", "model"), CASES, ids=lambda v: str(v))
def test_direction_is_the_dense_damped_solve(dtype, name, model):
    kind, preset, iterative = PRESETS[name]
    truth = standard_truth(model, kind)
    with precision(dtype):
        method = preset(predict_fn=model.predict, **lam_sequence(), **(CG[dtype] if iterative else {}))
        found, infos = directions(method, model.params(dtype), batch_of(model, kind, dtype), len(LAMBDAS))
    for lam, got, info in zip(LAMBDAS, found, infos, strict=True):
        assert_close(got, truth.direction(lam), TOLERANCE[dtype], f"{name} on {model} at lam {lam}")
        assert info["lam"] == pytest.approx(lam, rel=1e-6)
        assert info["loss"] == pytest.approx(truth.loss.value, rel=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize(("name", "lam"), [("sgn_ce", 1.0), ("egn_ce", 1e-1), ("egn_mse_cg", 1e-3)])
def test_constant_damping_as_a_number(name, lam):
    kind, preset, iterative = PRESETS[name]
    model = models.MLP_TANH
    with precision("float64"):
        method = preset(predict_fn=model.predict, lam0=lam, **(CG["float64"] if iterative else {}))
        (got,), _ = directions(method, model.params(), batch_of(model, kind, "float64"))
    assert_close(got, standard_truth(model, kind).direction(lam), TOLERANCE["float64"])


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "ggn_direct_ce"])
@pytest.mark.parametrize("variant", ["soft", "weighted"])
def test_soft_labels_and_weights(name, variant):
    _, preset, iterative = PRESETS[name]
    model, options = models.GRID, {variant: True}
    truth = standard_truth(model, "ce", **options)
    with precision("float64"):
        method = preset(
            predict_fn=model.predict,
            weight_key="w" if variant == "weighted" else None,
            **lam_sequence(),
            **(CG["float64"] if iterative else {}),
        )
        found, _ = directions(method, model.params(), batch_of(model, "ce", "float64", **options), len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, truth.direction(lam), TOLERANCE["float64"], f"{variant} at lam {lam}")


def _ridge_cross_entropy(model, ridge):
    """Cross entropy plus ridge/2 |p|^2: with a large enough ridge its Hessian is positive definite."""

    def loss_fn(params, batch):
        log_p = jax.nn.log_softmax(model.predict(params, batch["x"]))
        ce = -jnp.mean(jnp.take_along_axis(log_p, batch["y"][..., None], -1))
        squares = [jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(params)]
        return ce + jnp.asarray(0.5 * ridge, ce.dtype) * sum(squares[1:], squares[0])

    return loss_fn


NEWTON_MODELS = (models.MLP_TANH, models.ATTENTION, models.CUSTOM_VJP, models.ODD_TREE)
NEWTON_CASES = [("float64", model) for model in NEWTON_MODELS] + [("float32", models.MLP_TANH)]


@pytest.mark.parametrize("name", ["newton_cg", "newton_direct"])
@pytest.mark.parametrize(("dtype", "model"), NEWTON_CASES, ids=str)
def test_newton_direction_is_the_dense_damped_solve(name, dtype, model):
    with precision("float64"):
        params, batch = model.params("float64"), batch_of(model, "ce", "float64")
        matrix = dense.hessian(lambda p: _ridge_cross_entropy(model, 0.0)(p, batch), params)
        truth = truth_of(model, "ce", params, batch)
        ridge = 0.5 - np.linalg.eigvalsh(matrix).min()
        matrix = matrix + ridge * np.eye(len(matrix))
        loss_fn = _ridge_cross_entropy(model, ridge)
        gradient = truth.gradient + ridge * dense.vector(params)
    with precision(dtype):
        options = CG[dtype] if name == "newton_cg" else {}
        method = getattr(curvax, name)(loss_fn=loss_fn, **lam_sequence(), **options)
        found, _ = directions(method, model.params(dtype), batch_of(model, "ce", dtype), len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, dense.damped_direction(matrix, gradient, lam), TOLERANCE[dtype], f"lam {lam}")


GENERAL = {
    "sgn_sigmoid": (curvax.sgn, "SigmoidBinaryCrossEntropy", "sigmoid_cross_entropy", CG["float64"]),
    "egn_sigmoid": (curvax.egn, "SigmoidBinaryCrossEntropy", "sigmoid_cross_entropy", {}),
    "sgn_poisson": (curvax.sgn, "Poisson", "poisson", CG["float64"]),
    "egn_poisson": (curvax.egn, "Poisson", "poisson", {}),
}


GENERAL_CASES = [(name, models.MLP_TANH) for name in GENERAL] + [
    (name, models.SCALAR) for name in GENERAL if name.startswith("egn")
]


@pytest.mark.fast
@pytest.mark.parametrize(("name", "model"), GENERAL_CASES, ids=str)
def test_general_forms_with_other_losses(name, model):
    from tests.oracle import losses as by_hand

    preset, ours, theirs, options = GENERAL[name]
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "mse", "float64")
        batch["y"] = jnp.floor(jnp.abs(batch["y"]) * 1.5)
        batch["y"] = batch["y"] if "poisson" in name else jnp.minimum(batch["y"], 1.0)
        truth = dense.truth(model.predict, getattr(by_hand, theirs), params, batch["x"], batch["y"])
        loss = getattr(curvax.losses, ours)()
        method = preset(predict_fn=model.predict, loss=loss, **lam_sequence(), **options)
        found, _ = directions(method, params, batch, len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, truth.direction(lam), TOLERANCE["float64"], f"lam {lam}")


@pytest.mark.parametrize("preset", ["sgn", "egn"])
def test_custom_loss_given_by_one_row(preset):
    """A user's own row loss (here the squared error written by hand) in both lanes."""
    model = models.GRID

    def row(output, target):
        return jnp.asarray(0.5, output.dtype) * jnp.sum((output - target) ** 2)

    with precision("float64"):
        options = CG["float64"] if preset == "sgn" else {}
        method = getattr(curvax, preset)(
            predict_fn=model.predict, loss=curvax.losses.CustomLoss(row), **lam_sequence(), **options
        )
        found, _ = directions(method, model.params(), batch_of(model, "mse", "float64"), len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, standard_truth(model, "mse").direction(lam), TOLERANCE["float64"], f"lam {lam}")


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("preset", ["sgn", "egn"])
def test_reductions(preset, reduction):
    model = models.SHARED
    with precision("float64"):
        params, batch = model.params(), batch_of(model, "ce", "float64", weighted=True)
        truth = truth_of(model, "ce", params, batch, reduction)
        method = getattr(curvax, preset)(
            predict_fn=model.predict,
            loss=curvax.losses.SoftmaxCrossEntropy(reduction=reduction),
            weight_key="w",
            **lam_sequence(),
            **(CG["float64"] if preset == "sgn" else {}),
        )
        found, _ = directions(method, params, batch, len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, truth.direction(lam), TOLERANCE["float64"], f"{reduction} at lam {lam}")


@pytest.mark.parametrize("name", ["sgn_ce", "egn_ce", "egn_mse_cg"])
def test_the_plan_off_gives_the_same_answer(name):
    kind, preset, iterative = PRESETS[name]
    model, plan = models.CNN, "off"
    with precision("float64"):
        method = preset(predict_fn=model.predict, plan=plan, **lam_sequence(), **(CG["float64"] if iterative else {}))
        found, _ = directions(method, model.params(), batch_of(model, kind, "float64"), len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, standard_truth(model, kind).direction(lam), TOLERANCE["float64"], f"plan {plan}, lam {lam}")


@pytest.mark.parametrize("model", [models.MLP_TANH, models.SHARED], ids=str)
def test_rows_made_in_blocks_under_a_bound_on_memory(model):
    """A few rows at a time, made again for each block they meet."""
    with precision("float64"):
        method = curvax.egn_ce(predict_fn=model.predict, max_bytes=3000, **lam_sequence())
        found, _ = directions(method, model.params(), batch_of(model, "ce", "float64"), len(LAMBDAS))
    for lam, got in zip(LAMBDAS, found, strict=True):
        assert_close(got, standard_truth(model, "ce").direction(lam), TOLERANCE["float64"], f"lam {lam}")
