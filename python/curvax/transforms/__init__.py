"""curvax as Optax transformations.

`scale_by_*` turn the incoming updates g into s with (C + lam I) s = g (or the diagonal lane's s), without sign or
learning rate: chain them with `optax.scale_by_learning_rate`. `as_gradient_transformation(method)` is a whole method:
its update includes the method's own transform and rejection. Both take the incoming updates as the gradient, so
clipping before them, or accumulation by `optax.MultiSteps`, is respected, and both need what a gradient alone cannot
tell:

    updates, state = tx.update(grads, state, params, batch=batch, rng=rng)

Inner loops (`full_gn`, `layerwise_gn`) take their gradients themselves, one per minibatch, and read no more than the
structure of the incoming updates.

Inside `optax.masked`, `optax.partition` and the like, parameters arrive with holes (`optax.MaskedNode`); the model
still needs all of them: pass `full_params=params` to `update`.

`whole.py` has the latter; `options.py` and `scale_by.py` the keywords and functions of the former.
"""

from curvax.transforms.scale_by import scale_by_adahessian as scale_by_adahessian
from curvax.transforms.scale_by import scale_by_egn as scale_by_egn
from curvax.transforms.scale_by import scale_by_ggn as scale_by_ggn
from curvax.transforms.scale_by import scale_by_kfac as scale_by_kfac
from curvax.transforms.scale_by import scale_by_newton_cg as scale_by_newton_cg
from curvax.transforms.scale_by import scale_by_sophia_g as scale_by_sophia_g
from curvax.transforms.scale_by import scale_by_sophia_h as scale_by_sophia_h
from curvax.transforms.whole import as_gradient_transformation as as_gradient_transformation
