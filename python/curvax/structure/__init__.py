"""What a model's structure makes cheap: which examples interact, and the Gram matrix of its rows."""

from curvax.structure.batch_axis import examples_independent as examples_independent
from curvax.structure.report import LeafStructure as LeafStructure
from curvax.structure.report import report as report
from curvax.structure.rows import row_gram as row_gram
