"""Curvature operators: Hessian, generalized Gauss-Newton, Fisher, empirical Fisher."""

from curvax.curvature.base import Curvature as Curvature
from curvax.curvature.base import Evaluation as Evaluation
from curvax.curvature.base import JacobianRows as JacobianRows
from curvax.curvature.base import Linearization as Linearization
from curvax.curvature.base import Needs as Needs
from curvax.curvature.gauss_newton import GaussNewton as GaussNewton
from curvax.curvature.hessian import Hessian as Hessian
from curvax.curvature.hessian import LossFunction as LossFunction
from curvax.curvature.hessian import ModelLoss as ModelLoss
from curvax.curvature.hessian import Objective as Objective
from curvax.curvature.microbatch import Microbatched as Microbatched
from curvax.curvature.model import Extras as Extras
from curvax.curvature.model import Model as Model
from curvax.curvature.partition import TrainablePartition as TrainablePartition
from curvax.curvature.sum_of_terms import SumOfTerms as SumOfTerms
from curvax.curvature.sum_of_terms import in_pieces as in_pieces
from curvax.curvature.terms import Term as Term
from curvax.curvature.terms import Terms as Terms
from curvax.output_space import FisherType as FisherType
from curvax.output_space import GeneralizedGaussNewton as GeneralizedGaussNewton
from curvax.output_space import MonteCarloFisher as MonteCarloFisher
from curvax.output_space import ObservedFisher as ObservedFisher
from curvax.output_space import OutputCurvature as OutputCurvature
