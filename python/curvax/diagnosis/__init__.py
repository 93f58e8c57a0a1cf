"""One page about a training run: noise of its gradient, curvature, structure, what steps would cost, and what follows.

print(curvax.diagnose(predict_fn, loss, params, batch))
"""

from curvax.diagnosis.advice import Advice as Advice
from curvax.diagnosis.noise import GradientNoise as GradientNoise
from curvax.diagnosis.report import Diagnosis as Diagnosis
from curvax.diagnosis.report import diagnose as diagnose
from curvax.diagnosis.spectrum import Curved as Curved
from curvax.diagnosis.steps import StepCost as StepCost
from curvax.diagnosis.structure import LostLeaf as LostLeaf
