"""curvax: planned, kernel-backed second-order training in JAX."""

import importlib.metadata

from curvax import curvature as curvature
from curvax import damping as damping
from curvax import estimators as estimators
from curvax import influence as influence
from curvax import laplace as laplace
from curvax import layerwise as layerwise
from curvax import losses as losses
from curvax import operators as operators
from curvax import optax as optax
from curvax import optimizers as optimizers
from curvax import preconditioners as preconditioners
from curvax import search as search
from curvax import solvers as solvers
from curvax import structure as structure
from curvax import telemetry as telemetry
from curvax import training as training
from curvax import transforms as transforms
from curvax import viz as viz
from curvax.check import Check as Check
from curvax.check import StepsRefused as StepsRefused
from curvax.curvature import Term as Term
from curvax.curvature import Terms as Terms
from curvax.curvature import balanced_weights as balanced_weights
from curvax.diagnosis import Diagnosis as Diagnosis
from curvax.diagnosis import diagnose as diagnose
from curvax.execute import MethodState as MethodState
from curvax.kernels import Unsupported as Unsupported
from curvax.kernels import clear_report as clear_report
from curvax.kernels import report as report
from curvax.kernels import strict_backend as strict_backend
from curvax.layerwise import full_gn as full_gn
from curvax.layerwise import layerwise_gn as layerwise_gn
from curvax.method import AbstractMethod as AbstractMethod
from curvax.method import Method as Method
from curvax.methods import MethodInfo as MethodInfo
from curvax.methods import adahessian as adahessian
from curvax.methods import assemble as assemble
from curvax.methods import describe as describe
from curvax.methods import egn as egn
from curvax.methods import egn_ce as egn_ce
from curvax.methods import egn_mse as egn_mse
from curvax.methods import egn_mse_cg as egn_mse_cg
from curvax.methods import ekfac as ekfac
from curvax.methods import first_order as first_order
from curvax.methods import gauss_newton as gauss_newton
from curvax.methods import ggn_direct_ce as ggn_direct_ce
from curvax.methods import ggn_direct_mse as ggn_direct_mse
from curvax.methods import kfac as kfac
from curvax.methods import list_methods as list_methods
from curvax.methods import make as make
from curvax.methods import newton_cg as newton_cg
from curvax.methods import newton_direct as newton_direct
from curvax.methods import sgn as sgn
from curvax.methods import sgn_ce as sgn_ce
from curvax.methods import sgn_mse as sgn_mse
from curvax.methods import sophia_g as sophia_g
from curvax.methods import sophia_h as sophia_h
from curvax.methods import spring as spring
from curvax.methods import vmc as vmc
from curvax.plan import Plan as Plan
from curvax.serialization import register_with_flax as register_with_flax
from curvax.training import fit as fit
from curvax.transforms import as_gradient_transformation as as_gradient_transformation
from curvax.versions import warn_if_untested as _warn_if_untested

__version__ = importlib.metadata.version("curvax")

_warn_if_untested()
