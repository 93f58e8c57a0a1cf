"""What a model's structure makes cheap: which examples interact, Gram matrices, diagonals, norms, Kronecker factors."""

from curvax.structure.batch_axis import examples_independent as examples_independent
from curvax.structure.blocks import KroneckerBlocks as KroneckerBlocks
from curvax.structure.exact import empirical_fisher_diagonal as empirical_fisher_diagonal
from curvax.structure.exact import ggn_diagonal as ggn_diagonal
from curvax.structure.exact import jacobian_gram as jacobian_gram
from curvax.structure.exact import per_example_gradient_norms as per_example_gradient_norms
from curvax.structure.kronecker import WeightSharing as WeightSharing
from curvax.structure.report import LeafStructure as LeafStructure
from curvax.structure.report import report as report
from curvax.structure.rows import row_gram as row_gram
