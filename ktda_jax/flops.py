"""Floating point operations of a traced function, from its products alone.

XLA's own count takes a loop's body once and differs between compilers. Here every dot product and convolution counts
two operations per multiplication, as often as it runs; elementwise work is left out, as is usual for MFU.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax import state
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT


def count(function: Callable, *args: Any) -> int:
    """Operations of `function(*args)`; `args` may be ShapeDtypeStructs."""
    return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr) -> int:
    return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # window times input channels of one group
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
    if name == "cond":  # as in platform_dependent: whichever form the platform takes computes the same
        return max(_jaxpr(branch.jaxpr) for branch in params["branches"])
    if name == "scan":
        return params["length"] * _jaxpr(params["jaxpr"].jaxpr)
    if name == "while":
        raise ValueError("a while loop's length is not known before it runs; count a function without one")
    total = 0
    for key, value in params.items():
        # A custom derivative also carries its rules, which are not part of this computation.
        if "jaxpr" in key and not key.startswith(("fwd", "bwd", "jvp")) and hasattr(value, "eqns"):
            total += _jaxpr(getattr(value, "jaxpr", value))
    return total


def of_model(model: KTDAConfig, size: tuple[int, int], *, distill: bool = True) -> dict[str, int]:
    """Of one image of `size` (H, W): `inference`, `teacher` and `training`, which is their least possible sum.

    Training counts the student's path three times, forward and the two gradients of every product, and the frozen
    teacher once. What is computed again to save memory does not count.
    """
    image = jax.ShapeDtypeStruct((1, *size, model.student.bands), np.uint8)
    graphdef, params, stats = state.abstract(lambda: KTDA(model, rngs=nnx.Rngs(0)))

    def forward(train):
        def run(params, stats, image):
            outputs = state.merge(graphdef, params, stats)(image, train=train)
            return outputs.logits, outputs.aux_logits

        return count(run, params, stats, image)

    teacher = 0
    if distill:
        vit, arrays, _ = state.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))
        seen = jax.ShapeDtypeStruct((1, *size, 3), jnp.float32)
        teacher = count(lambda arrays, x: state.merge(vit, arrays, {})(x), arrays, seen)
    return {"inference": forward(False), "teacher": teacher, "training": 3 * forward(True) + teacher}
