"""Optimizers that Optax lacks, as Optax transformations: SOAP, Shampoo, and Muon with AdamW by label.

Which matrices they see: `axes.py` has the rules, `choices.py` the choices that SOAP and Shampoo share, `views.py` what
carries rules out, `matrices.py` the arithmetic on stacks, `scaling.py` the keywords of both, `memory.py` the bytes of a
state.

The optimizers: `soap.py`, `shampoo.py`, `orthogonal.py` (Muon's direction), `labels.py` (which leaves Muon takes), and
`muon.py`, Muon and AdamW together.
"""

from curvax.optimizers.axes import ByFunction as ByFunction
from curvax.optimizers.axes import ByPath as ByPath
from curvax.optimizers.axes import Convolutions as Convolutions
from curvax.optimizers.axes import LastTwoAxes as LastTwoAxes
from curvax.optimizers.axes import MatrixAxes as MatrixAxes
from curvax.optimizers.axes import MatrixRule as MatrixRule
from curvax.optimizers.axes import MergedAxes as MergedAxes
from curvax.optimizers.axes import NoMatrices as NoMatrices
from curvax.optimizers.axes import axes_of_model as axes_of_model
from curvax.optimizers.choices import BasisMethod as BasisMethod
from curvax.optimizers.choices import FactorTerms as FactorTerms
from curvax.optimizers.choices import Sides as Sides
from curvax.optimizers.labels import hidden_matrices as hidden_matrices
from curvax.optimizers.labels import hidden_matrices_by_name as hidden_matrices_by_name
from curvax.optimizers.memory import StateBytes as StateBytes
from curvax.optimizers.memory import state_bytes as state_bytes
from curvax.optimizers.muon import muon_adamw as muon_adamw
from curvax.optimizers.orthogonal import DION as DION
from curvax.optimizers.orthogonal import JORDAN as JORDAN
from curvax.optimizers.orthogonal import POLAR_EXPRESS as POLAR_EXPRESS
from curvax.optimizers.orthogonal import MuonState as MuonState
from curvax.optimizers.orthogonal import NewtonSchulz as NewtonSchulz
from curvax.optimizers.orthogonal import NoScale as NoScale
from curvax.optimizers.orthogonal import RmsScale as RmsScale
from curvax.optimizers.orthogonal import UpdateScale as UpdateScale
from curvax.optimizers.orthogonal import WidthScale as WidthScale
from curvax.optimizers.orthogonal import scale_by_muon as scale_by_muon
from curvax.optimizers.shampoo import ShampooState as ShampooState
from curvax.optimizers.shampoo import scale_by_shampoo as scale_by_shampoo
from curvax.optimizers.shampoo import shampoo as shampoo
from curvax.optimizers.soap import SoapState as SoapState
from curvax.optimizers.soap import scale_by_soap as scale_by_soap
from curvax.optimizers.soap import soap as soap
from curvax.optimizers.views import MatrixView as MatrixView
from curvax.optimizers.views import MatrixViews as MatrixViews
