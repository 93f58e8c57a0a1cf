"""What a model's structure makes cheap: which examples interact, Gram matrices, diagonals, norms, Kronecker factors.

Row r of example b of the Jacobian, restricted to the weights of a layer h = a W, is the outer product a_b d_br^T of the
layer's input and the row's cotangent of h. So nothing here forms the Jacobian: everything is made of the factors a and
d. The layers are found in the jaxpr of the model, whoever wrote it:

    predict(params, x) = tanh(x @ w + b) @ v, on one example

    step                     what is recognized                           what is recorded
    h = dot_general x w      w: dense, one position per example           a_w = x, d_w = cotangent of h
    s = add h b              b: added to h, so a bias of that layer       a_w gets a one appended
    z = tanh s
    y = dot_general z v      v: dense, one position per example           a_v = z, d_v = cotangent of y

    Gram matrix  ((x, 1) . (x', 1)) (d_w . d_w') + (z . z') (d_v . d_v')      for two rows
    diagonal     sum of x^2 (d_w^2)^T for w, of d_w^2 for b
    Kronecker    A = mean of (x, 1) (x, 1)^T and B = sum of d_w d_w^T, for w and b together

The files in reading order; each imports from those above it only (`tests/docs/import_contract.toml`):

1. A model as a program.
   `real_arithmetic.py` writes complex arithmetic out in real numbers; `replay.py` traces a model and evaluates it with
   perturbations and recordings; `views.py` says what may happen to a leaf on its way to where it is used, `regions.py`
   which parts of one enter by themselves.
2. Do examples interact?
   `batch_axes.py` says which leaves hold examples; `batch_rules.py` has a rule per primitive for where the axis of
   examples goes; `batch_axis.py` proves that a model treats examples one by one, and `additive.py` that a loss adds up
   over them.
3. How do parameters enter?
   `uses.py` is a place that multiplies, with its two factors; `entries.py` the other uses; `branches.py` makes one of
   those in several branches; `biases.py` folds a bias into its layer; `recognize.py` is the walk that finds them all;
   `axes.py` says what the axes of a leaf are to them.
4. The factors.
   `capture.py` evaluates activations and cotangents of every layer; `reach.py` and `positions.py` say which outputs a
   position reaches and what it weighs; `formed.py` multiplies factors out to rows, where that is cheaper.
5. What is made of them.
   `layers.py` takes the cheapest form of each layer; `gram.py` has all inner products; `squares.py` and `diagonal.py`
   have sums of squares; `blocks.py` has the kinds of blocks, `find_blocks.py` says which entries have one together,
   `block_rules.py` lets callers say it, and `kronecker.py` has the sums that make the blocks.
6. For callers.
   `memory.py` and `outputs.py` have defaults and checks; `rows.py` serves the row lane and `joint.py` that of several
   models with the same parameters, `exact.py`, `clipped.py` and `tangent_kernel.py` people who want the quantities by
   themselves, `weighted_grams.py` posteriors, and `report.py` people who want to know what was recognized.
"""

from curvax.structure.batch_axis import examples_independent as examples_independent
from curvax.structure.block_rules import BlockKind as BlockKind
from curvax.structure.block_rules import BlockRule as BlockRule
from curvax.structure.blocks import KroneckerBlocks as KroneckerBlocks
from curvax.structure.clipped import Clipped as Clipped
from curvax.structure.clipped import clipped_gradient as clipped_gradient
from curvax.structure.exact import empirical_fisher_diagonal as empirical_fisher_diagonal
from curvax.structure.exact import ggn_diagonal as ggn_diagonal
from curvax.structure.exact import per_example_gradient_norms as per_example_gradient_norms
from curvax.structure.kronecker import WeightSharing as WeightSharing
from curvax.structure.report import LeafStructure as LeafStructure
from curvax.structure.report import report as report
from curvax.structure.rows import RowSource as RowSource
from curvax.structure.rows import row_gram as row_gram
from curvax.structure.tangent_kernel import jacobian_gram as jacobian_gram
from curvax.structure.tangent_kernel import jacobian_gram_diagonal as jacobian_gram_diagonal
