"""Laplace approximations: a Gaussian around trained parameters, its evidence, and what it says of predictions.

    posterior = laplace.fit(predict_fn, loss, params, data, form=laplace.KFAC())
    posterior = laplace.tune_prior(posterior)              the prior's precision that maximizes the evidence
    posterior.predict(x)                                   mean and covariance of the linearized model's outputs
    posterior.probabilities(x)                             of classes

With negative log-likelihoods l_i and a prior N(0, P^-1) the posterior is N(theta, (H + P)^-1), H the Gauss-Newton
matrix of sum_i l_i (MacKay 1992; Ritter et al. 2018; Daxberger et al., "Laplace Redux", 2021). Of a linear model with
Gaussian noise
it is exact: y = theta x + noise, x = (1, 2), noise 1, P = 1 have H = 1 + 4 = 5 and a posterior variance of 1/6.
"""

from curvax.laplace.fit import fit as fit
from curvax.laplace.forms import EKFAC as EKFAC
from curvax.laplace.forms import KFAC as KFAC
from curvax.laplace.forms import Diagonal as Diagonal
from curvax.laplace.forms import Form as Form
from curvax.laplace.forms import Full as Full
from curvax.laplace.forms import LowRank as LowRank
from curvax.laplace.posterior import Covariance as Covariance
from curvax.laplace.posterior import Laplace as Laplace
from curvax.laplace.posterior import Predictive as Predictive
from curvax.laplace.subsets import last_layer as last_layer
from curvax.laplace.tune import tune_prior as tune_prior
