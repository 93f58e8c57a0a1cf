"""Optimizers that Optax lacks, as Optax transformations: SOAP, Shampoo, and Muon with AdamW by label."""

from curvax.optimizers.labels import hidden_matrices as hidden_matrices
from curvax.optimizers.labels import hidden_matrices_by_name as hidden_matrices_by_name
from curvax.optimizers.labels import muon_adamw as muon_adamw
from curvax.optimizers.shampoo import ShampooState as ShampooState
from curvax.optimizers.shampoo import scale_by_shampoo as scale_by_shampoo
from curvax.optimizers.shampoo import shampoo as shampoo
from curvax.optimizers.soap import SoapState as SoapState
from curvax.optimizers.soap import scale_by_soap as scale_by_soap
from curvax.optimizers.soap import soap as soap
