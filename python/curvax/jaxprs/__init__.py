"""The one walker: everything in curvax that reads or evaluates a jaxpr does it through this package.

JAX writes a function as a jaxpr, a list of equations, some of which contain jaxprs themselves. Five parts:

1. `calls.py`: which primitives contain a jaxpr, and which operands go into it. A new or renamed primitive of JAX is
   added there and nowhere else; `tests/structure/test_jaxprs` fails at one of the installed JAX that is not listed.
2. `programs.py`: a jaxpr as a list of steps without plain calls. To read which parameter enters where, an inner `jit`
   must not be in the way, so its equations stand in its place. The bodies of loops, branches and rematerialized calls
   stay programs of their own, to be evaluated as what they are; so do those of `custom_jvp` and `custom_vjp`, whose
   derivative rules would be lost.
3. `repeats.py`: a program in which nothing is computed twice.
4. `walks.py`: `evaluate` computes, and asks a hook about every step. A `ForwardFlow` says what is known of each value
   from what is known of the arguments: is it zero, which of its axes holds the examples. `backward` goes from the
   results to the arguments: which values does anybody need, which outputs does an entry reach.
5. `liveness.py`: how many bytes an evaluation holds at once.

    jaxpr                                          program
    { lambda ; a:f32[3,2] b:f32[5,3]. let          arguments 0 1
        c:f32[5,2] = jit[jaxpr={ x y.              step 0:  2 = dot_general 1 0
          z = dot_general x y }] b a               step 1:  3 = tanh 2
        d:f32[5,2] = tanh c                        results 3
      in (d,) }

A loop is walked until what is known of its state no longer changes. Facts only get weaker when they are joined, so that
ends. An example, for the axis that holds the examples, is a scan over three layers with state h and weights w:

    1. the first iteration sees    h with the examples on axis 0, and w[i] without any
    2. the body gives              h with the examples on axis 0: nothing has changed, so it holds in every iteration

Built on it: `curvax.live` (what outputs depend on), `curvax.loops` (what CPUs are slow at), `curvax.plan.cost` (what a
program costs), `curvax.layerwise.block_maps` (tangents of blocks) and `curvax.structure` (layers, examples, positions).
"""

from curvax.jaxprs.calls import CALLS as CALLS
from curvax.jaxprs.calls import COND as COND
from curvax.jaxprs.calls import CUSTOM as CUSTOM
from curvax.jaxprs.calls import CUSTOM_VJP as CUSTOM_VJP
from curvax.jaxprs.calls import LINEAR_SOLVE as LINEAR_SOLVE
from curvax.jaxprs.calls import REMATERIALIZED as REMATERIALIZED
from curvax.jaxprs.calls import SCAN as SCAN
from curvax.jaxprs.calls import SHARDED as SHARDED
from curvax.jaxprs.calls import WHILE as WHILE
from curvax.jaxprs.calls import AnyJaxpr as AnyJaxpr
from curvax.jaxprs.calls import Body as Body
from curvax.jaxprs.calls import bind as bind
from curvax.jaxprs.calls import bodies as bodies
from curvax.jaxprs.calls import contains as contains
from curvax.jaxprs.calls import loop_counts as loop_counts
from curvax.jaxprs.calls import opened as opened
from curvax.jaxprs.calls import scan_counts as scan_counts
from curvax.jaxprs.calls import subjaxprs as subjaxprs
from curvax.jaxprs.calls import uses_custom_vjp as uses_custom_vjp
from curvax.jaxprs.liveness import peak_bytes as peak_bytes
from curvax.jaxprs.programs import Atom as Atom
from curvax.jaxprs.programs import Name as Name
from curvax.jaxprs.programs import Path as Path
from curvax.jaxprs.programs import Program as Program
from curvax.jaxprs.programs import Step as Step
from curvax.jaxprs.programs import Wanted as Wanted
from curvax.jaxprs.programs import equations_of as equations_of
from curvax.jaxprs.programs import program_of as program_of
from curvax.jaxprs.repeats import without_repeats as without_repeats
from curvax.jaxprs.walks import BARRIER as BARRIER
from curvax.jaxprs.walks import ForwardFlow as ForwardFlow
from curvax.jaxprs.walks import backward as backward
from curvax.jaxprs.walks import evaluate as evaluate
from curvax.jaxprs.walks import forward as forward
