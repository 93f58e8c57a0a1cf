"""Presets: ready-made methods, a few lines each."""

from curvax.methods.assemble import assemble as assemble
from curvax.methods.diagonal import adahessian as adahessian
from curvax.methods.diagonal import sophia_g as sophia_g
from curvax.methods.diagonal import sophia_h as sophia_h
from curvax.methods.first_order import FirstOrder as FirstOrder
from curvax.methods.first_order import first_order as first_order
from curvax.methods.gauss_newton import egn as egn
from curvax.methods.gauss_newton import egn_ce as egn_ce
from curvax.methods.gauss_newton import egn_mse as egn_mse
from curvax.methods.gauss_newton import egn_mse_cg as egn_mse_cg
from curvax.methods.gauss_newton import gauss_newton as gauss_newton
from curvax.methods.gauss_newton import ggn_direct_ce as ggn_direct_ce
from curvax.methods.gauss_newton import ggn_direct_mse as ggn_direct_mse
from curvax.methods.gauss_newton import sgn as sgn
from curvax.methods.gauss_newton import sgn_ce as sgn_ce
from curvax.methods.gauss_newton import sgn_mse as sgn_mse
from curvax.methods.gauss_newton import spring as spring
from curvax.methods.kronecker import ekfac as ekfac
from curvax.methods.kronecker import kfac as kfac
from curvax.methods.newton import newton_cg as newton_cg
from curvax.methods.newton import newton_direct as newton_direct
from curvax.methods.registry import MethodInfo as MethodInfo
from curvax.methods.registry import describe as describe
from curvax.methods.registry import list_methods as list_methods
from curvax.methods.registry import make as make
from curvax.methods.variational import vmc as vmc
