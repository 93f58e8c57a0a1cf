"""Evidence and predictions against exact Bayesian linear regression and dense float64 formulas."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from curvax import laplace
from curvax.curvature import Model
from curvax.laplace.forms import SpectralCurvature
from curvax.losses import SoftmaxCrossEntropy, SquaredError
from tests.operators.problem import LOSS, problem
from tests.oracle import dense
from tests.oracle.models import CNN, EMBEDDING, MLP_TANH

pytestmark = pytest.mark.usefixtures("x64", "quick_programs")
PRIOR, NOISE = 0.7, 0.4


def affine(params, x):
    return x @ params["w"] + params["b"]


@dataclasses.dataclass(frozen=True)
class Regression:
    """y = x w + b + noise with one target, at the posterior's mean."""

    x: np.ndarray
    y: np.ndarray
    prior: float
    noise: float

    @property
    def features(self):
        # Leaves in the order of their names: the bias first.
        return np.concatenate([np.ones((len(self.x), 1)), self.x], axis=1)

    @property
    def covariance(self):
        a = self.features
        return np.linalg.inv(a.T @ a / self.noise**2 + self.prior * np.eye(a.shape[1]))

    @property
    def params(self):
        mean = self.covariance @ self.features.T @ self.y / self.noise**2
        return {"b": jnp.asarray(mean[0]), "w": jnp.asarray(mean[1:])}

    @property
    def evidence(self):
        """Of y ~ N(0, noise^2 I + A A^T / prior), without Laplace's method."""
        k = self.noise**2 * np.eye(len(self.x)) + self.features @ self.features.T / self.prior
        quadratic = self.y[:, 0] @ np.linalg.solve(k, self.y[:, 0])
        return -0.5 * (quadratic + np.linalg.slogdet(k)[1] + len(self.x) * np.log(2 * np.pi))


def regression(prior=PRIOR, noise=NOISE):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 3))
    return Regression(x, x @ rng.normal(size=(3, 1)) + 0.3 * rng.normal(size=(9, 1)), prior, noise)


def fitted(r, form, **options):
    data = [{"x": r.x[:4], "y": r.y[:4]}, {"x": r.x[4:], "y": r.y[4:]}]
    return laplace.fit(
        affine, SquaredError(), r.params, data, form=form, prior_precision=r.prior, noise=r.noise, **options
    )


@pytest.mark.fast
@pytest.mark.parametrize("form", [laplace.Full(), laplace.KFAC()], ids=lambda f: type(f).__name__)
def test_linear_regression_is_exact(form):
    """One layer with one output: the factors of K-FAC are the whole matrix."""
    r = regression()
    posterior = fitted(r, form)
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(r.evidence, abs=1e-10)
    np.testing.assert_allclose(posterior.covariance().to_dense(), r.covariance, atol=1e-10)
    new = np.random.default_rng(1).normal(size=(5, 3))
    predictive = posterior.predict(new)
    a = np.concatenate([np.ones((5, 1)), new], axis=1)
    np.testing.assert_allclose(predictive.mean, affine(r.params, new), atol=1e-12)
    np.testing.assert_allclose(predictive.variance[:, 0], np.einsum("bi,ij,bj->b", a, r.covariance, a), atol=1e-10)


def test_tuned_prior_and_noise_are_where_the_exact_evidence_is_flat():
    """At theta as it is; the reference is the evidence as a function of both numbers."""
    r = regression(prior=1.0, noise=1.0)
    posterior = fitted(r, laplace.Full())
    tuned = laplace.tune_prior(posterior, noise=True)

    def evidence(logs):
        return posterior.log_marginal_likelihood(jnp.exp(logs[0]), jnp.exp(logs[1]))

    at = jnp.log(jnp.stack([tuned.prior.values[0], tuned.noise]))
    np.testing.assert_allclose(jax.grad(evidence)(at), 0, atol=1e-5)
    assert evidence(at) > evidence(jnp.zeros(2))
    assert float(tuned.log_marginal_likelihood()) == pytest.approx(float(evidence(at)))
    # The gradient is that of differences of the formula.
    step = 1e-5
    slope = [(evidence(np.eye(2)[i] * step) - evidence(-np.eye(2)[i] * step)) / (2 * step) for i in range(2)]
    np.testing.assert_allclose(jax.grad(evidence)(jnp.zeros(2)), slope, rtol=1e-7)


def per_leaf(params):
    structure = jax.tree.structure(params)
    return jax.tree.unflatten(structure, [0.3 + 0.2 * i for i in range(structure.num_leaves)])


def flat_precision(params, precision):
    return np.concatenate(
        [np.full(x.size, p) for x, p in zip(jax.tree.leaves(params), jax.tree.leaves(precision), strict=True)]
    )


def truth_of(form, p, posterior):
    """H in float64: all of it, its diagonal, or what the factors stand for."""
    if isinstance(form, laplace.Full):
        return p.truth.ggn * p.batch["mask"].sum() * np.prod(np.shape(p.batch["y"])[1:], dtype=int)
    return np.asarray(posterior.curvature.operator.to_dense())


@pytest.mark.parametrize(
    ("model", "form", "each"),
    [
        (MLP_TANH, laplace.Full(), True),
        (CNN, laplace.Diagonal(), True),
        (EMBEDDING, laplace.EKFAC(), False),
    ],
    ids=lambda v: str(v) if not isinstance(v, laplace.Form) else type(v).__name__,
)
def test_networks(model, form, each):
    p = problem(model)
    precision = per_leaf(p.params) if each else PRIOR
    posterior = laplace.fit(p.model, SoftmaxCrossEntropy(), p.params, p.batches, form=form, prior_precision=precision)
    h = truth_of(form, p, posterior)
    flat = flat_precision(p.params, precision if each else jax.tree.map(lambda _: PRIOR, p.params))
    matrix = h + np.diag(flat)
    theta = dense.vector(p.params)
    weights = posterior.loss.effective_weights(p.predict(p.params, p.batch["x"]), p.batch["mask"])
    loss = posterior.loss.value(p.predict(p.params, p.batch["x"]), p.batch["y"], weights)
    want = -loss - 0.5 * theta @ (flat * theta) + 0.5 * np.log(flat).sum() - 0.5 * np.linalg.slogdet(matrix)[1]
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(float(want), abs=1e-9)
    sigma = np.linalg.inv(matrix)
    np.testing.assert_allclose(posterior.covariance().to_dense(), sigma, atol=1e-9)
    x = p.batch["x"]
    j = dense.outputs_and_jacobian(p.predict, p.params, x)[1].reshape(len(x), -1, len(theta))
    predictive = posterior.predict(x, max_bytes=1 << 12)
    covariance = np.einsum("bki,ij,blj->bkl", j, sigma, j)
    np.testing.assert_allclose(predictive.covariance, covariance, atol=1e-9)
    f = np.asarray(predictive.mean)
    scaled = f / np.sqrt(1 + np.pi / 8 * np.einsum("bkk->bk", covariance).reshape(f.shape))
    np.testing.assert_allclose(posterior.probabilities(x), jax.nn.softmax(scaled), atol=1e-9)


def classes(params, x):
    return jnp.tanh(x @ params["w"]) @ jnp.asarray([[1.0, -1.0]]) + params["b"]


def test_draws_have_the_covariance():
    r = regression()
    y = np.arange(9) % 2
    posterior = laplace.fit(classes, LOSS, r.params, {"x": r.x, "y": y}, form=laplace.Diagonal(), prior_precision=3.0)
    n = 20_000
    predictive = posterior.predict(r.x)
    draws = posterior.sample(jax.random.key(0), n)
    flat = np.concatenate([np.reshape(leaf, (n, -1)) for leaf in jax.tree.leaves(draws)], axis=1)
    assert dense.relative_error(np.cov(flat.T), np.asarray(posterior.covariance().to_dense())) < 0.05
    outputs = posterior.sample_outputs(r.x, jax.random.key(0), n)
    spread = np.sqrt(predictive.variance / n)
    assert np.all(np.abs(np.mean(outputs, 0) - predictive.mean) < 5 * spread)
    np.testing.assert_allclose(np.var(outputs, axis=0), predictive.variance, rtol=0.06)
    nonlinear = posterior.sample_outputs(r.x, jax.random.key(0), n, linearized=False)
    np.testing.assert_allclose(nonlinear[0], classes(jax.tree.map(lambda v: v[0], draws), r.x), atol=1e-12)
    sampled = posterior.probabilities(r.x, jax.random.key(0), n)
    np.testing.assert_allclose(sampled, np.mean(jax.nn.softmax(outputs), axis=0), atol=1e-12)
    assert np.abs(sampled - posterior.probabilities(r.x)).max() < 0.05


def test_last_layer_is_that_of_its_features():
    p = problem(MLP_TANH)
    mask = laplace.last_layer(p.predict, p.params, p.batch["x"])
    kept = [i for i, keep in enumerate(jax.tree.leaves(mask)) if keep]
    assert len(kept) == 2
    posterior = laplace.fit(p.model, LOSS, p.params, p.batches, form=laplace.Full(), subset=mask)
    ends = np.cumsum([0, *(x.size for x in jax.tree.leaves(p.params))])
    index = np.concatenate([np.arange(ends[i], ends[i + 1]) for i in kept])
    h = p.truth.ggn[np.ix_(index, index)] * p.batch["mask"].sum()
    np.testing.assert_allclose(posterior.covariance().to_dense(), np.linalg.inv(h + np.eye(len(h))), atol=1e-10)
    sample = posterior.sample(jax.random.key(0), 2)
    for i, (drawn, old) in enumerate(zip(jax.tree.leaves(sample), jax.tree.leaves(p.params), strict=True)):
        assert (np.ptp(np.asarray(drawn), axis=0).max() > 0) == (i in kept)
        assert drawn.shape == (2, *old.shape)


def test_subsets_by_path():
    r = regression()
    by_path, by_function = (
        fitted(r, laplace.Full(), subset="w"),
        fitted(r, laplace.Full(), subset=lambda path: path == "w"),
    )
    assert by_path.covariance().shape == (3, 3)
    np.testing.assert_array_equal(by_path.covariance().to_dense(), by_function.covariance().to_dense())
    with pytest.raises(ValueError, match="no leaf that trains: the leaves are b, w"):
        fitted(r, laplace.Full(), subset="v")


def test_tuning_by_block_and_under_jit():
    r = regression()
    posterior = fitted(r, laplace.Full())
    tuned = laplace.tune_prior(posterior, per_leaf=True)
    assert len(tuned.prior.values) == 2
    assert tuned.log_marginal_likelihood() > laplace.tune_prior(posterior).log_marginal_likelihood() - 1e-9
    in_jit = jax.jit(lambda q, x: q.predict(x).covariance)(tuned, r.x)
    np.testing.assert_allclose(in_jit, tuned.predict(r.x).covariance, atol=1e-12)
    # A layer and its bias are one block of Kronecker factors.
    assert len(laplace.tune_prior(fitted(r, laplace.KFAC()), per_leaf=True, max_steps=3).prior.values) == 1


def test_low_rank_under_a_prior_by_leaf():
    r, precision = regression(), {"b": 0.5, "w": 2.0}
    posterior = fitted(r, laplace.LowRank(2)).replace(prior_precision=precision)
    assert isinstance(posterior.curvature, SpectralCurvature)
    h = np.asarray(posterior.curvature.operator.to_dense()) / NOISE**2
    flat = np.array([0.5, 2.0, 2.0, 2.0])
    sigma = np.linalg.inv(h + np.diag(flat))
    np.testing.assert_allclose(posterior.covariance().to_dense(), sigma, atol=1e-10)
    a, theta = np.concatenate([np.ones((9, 1)), r.x], axis=1), dense.vector(r.params)
    variance = np.einsum("bi,ij,bj->b", a, sigma, a)
    np.testing.assert_allclose(posterior.predict(r.x).variance[:, 0], variance, atol=1e-10)
    want = posterior.log_likelihood() - (theta @ (flat * theta) - np.log(flat).sum() - np.linalg.slogdet(sigma)[1]) / 2
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(float(want), abs=1e-10)


def test_bfloat16_parameters():
    r = regression()
    params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), r.params)
    batch = {"x": jnp.asarray(r.x, jnp.bfloat16), "y": jnp.asarray(r.y, jnp.bfloat16)}
    narrow = laplace.fit(affine, SquaredError(), params, batch, noise=NOISE, prior_precision=PRIOR)
    assert narrow.predict(batch["x"]).covariance.dtype == np.float32
    assert jax.tree.leaves(narrow.sample(jax.random.key(0)))[0].dtype == jnp.bfloat16
    assert float(narrow.log_marginal_likelihood()) == pytest.approx(r.evidence, rel=0.05)


def test_what_weighs_nothing_and_examples_that_interact():
    r = regression()
    x, y = np.concatenate([r.x, np.full((1, 3), np.nan)]), np.concatenate([r.y, [[np.inf]]])
    batch = {"x": x, "y": y, "w": np.arange(10) < 9}
    posterior = laplace.fit(
        Model(affine, weight_key="w"),
        SquaredError(),
        r.params,
        batch,
        form=laplace.Full(),
        prior_precision=PRIOR,
        noise=NOISE,
    )
    assert float(posterior.log_marginal_likelihood()) == pytest.approx(r.evidence, abs=1e-10)

    def centered(params, x):
        return affine(params, x - jnp.mean(x, axis=0))

    with pytest.warns(UserWarning, match="interact"):
        mixed = laplace.fit(centered, SquaredError(), r.params, {"x": r.x, "y": r.y}, form=laplace.Diagonal())
    j = dense.outputs_and_jacobian(centered, r.params, r.x)[1]
    sigma = np.asarray(mixed.covariance().to_dense())
    np.testing.assert_allclose(
        mixed.predict(r.x).covariance[:, 0, 0], np.einsum("bi,ij,bj->b", j, sigma, j), atol=1e-12
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda r: fitted(r, laplace.KFAC()).replace(prior_precision={"b": 1.0, "w": 2.0}).covariance(),
            "share Kronecker factors",
        ),
        (lambda r: fitted(r, laplace.Full()).replace(prior_precision={"b": 1.0}), "a prefix of these"),
        (lambda r: fitted(r, laplace.Full()).replace(prior_precision=-1.0), "positive"),
        (
            lambda r: laplace.fit(affine, SquaredError(), r.params, {"x": r.x, "y": r.y}, noise=0.0),
            "noise must be positive",
        ),
        (lambda r: fitted(r, laplace.Full()).probabilities(r.x), "has no classes"),
        (
            lambda r: laplace.fit(affine, SquaredError(centered=True), r.params, {"x": r.x, "y": r.y}),
            "couples examples",
        ),
        (
            lambda r: laplace.fit(
                affine, SoftmaxCrossEntropy(), r.params, {"x": r.x, "y": np.zeros(9, int)}, noise=2.0
            ),
            "has no noise",
        ),
    ],
)
def test_one_sentence(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make(regression())
