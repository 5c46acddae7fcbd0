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

from ktda_jax import UserError
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT


def count(function: Callable, *args: Any) -> int:
    """Operations of `function(*args)`; `args` may be ShapeDtypeStructs."""
    return of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def of_jaxpr(jaxpr) -> int:
    return sum(_equation(equation) for equation in used(jaxpr))


def used(jaxpr) -> list:
    """Equations whose results are needed: a recomputation also writes down a product that its gradient does not use."""
    needed, kept = set(map(id, jaxpr.outvars)), []
    for equation in reversed(jaxpr.eqns):
        if not equation.effects and needed.isdisjoint(map(id, equation.outvars)):
            continue
        needed.update(map(id, equation.invars))
        kept.append(equation)
    return kept[::-1]


def repeated_bytes(jaxpr, accumulate: int = 1) -> float:
    """Bytes that the products in loops read and write from the second turn on, which XLA's count leaves out.

    The loop over `accumulate` micro-batches is left out too, but not what loops inside it; and so are kernels
    (`kernels.py`).
    """
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            continue
        inner = sum(repeated_bytes(j, accumulate) for j in inside(equation))
        if equation.primitive.name == "scan":
            length = equation.params["length"]
            (body,) = inside(equation)
            products = [e for e in _all(body) if e.primitive.name == "dot_general"]
            sizes = sum(v.aval.size * v.aval.dtype.itemsize for e in products for v in (*e.invars, *e.outvars))
            micro_batches = length == accumulate > 1 and any(e.primitive.name == "scan" for e in _all(body))
            inner = length * inner + (0 if micro_batches else (length - 1) * sizes)
        total += inner
    return total


def _all(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for inner in inside(equation):
            yield from _all(inner)


def inside(equation) -> list:
    """The jaxprs that an equation runs; of several forms for several platforms, the one for accelerators."""
    params = equation.params
    if equation.primitive.name == "cond":  # platform_dependent, whose default comes last
        return [params["branches"][-1].jaxpr]
    # A custom derivative also carries its rules, which are not part of this computation.
    found = [v for k, v in params.items() if "jaxpr" in k and not k.startswith(("fwd", "bwd", "jvp"))]
    return [getattr(v, "jaxpr", v) for v in found if hasattr(v, "eqns")]


def _equation(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        per_output = math.prod(kernel) // kernel[numbers.rhs_spec[0]]  # window times input channels of one group
        inserted = math.prod(params["lhs_dilation"])  # zeros, in the gradients of strided ones
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output // inserted
    if name == "while":
        raise UserError("a while loop's length is not known before it runs; count a function without one")
    return times(equation) * sum(map(of_jaxpr, inside(equation)))


def times(equation) -> int:
    """How often what is `inside` an equation runs: in a loop, on all devices, in a kernel's grid."""
    name, params = equation.primitive.name, equation.params
    if name == "shard_map":
        return params["mesh"].size
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    return params["length"] if name == "scan" else 1


def of_model(model: KTDAConfig, size: tuple[int, int], *, distill: bool = True) -> dict[str, int]:
    """Of one image of `size` (H, W): `inference`, `teacher` and `training`, the least possible.

    Training counts the student's path three times, forward and the two gradients of every product, and the frozen
    teacher once. What is computed again to save memory does not count.
    """
    image = jax.ShapeDtypeStruct((1, *size, model.student.bands), np.uint8)
    graphdef, params, stats = flat.abstract(lambda: KTDA(model, rngs=nnx.Rngs(0)))

    encodes = model.encoder == "teacher"
    vit, arrays, _ = flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))

    def forward(train):
        def run(params, stats, arrays, image):
            needed = {"teacher": flat.merge(vit, arrays, {})} if encodes else {}
            outputs = flat.merge(graphdef, params, stats)(image, train=train, **needed)
            return outputs.logits, outputs.aux_logits, None if model.decoder else outputs.student

        return count(run, params, stats, arrays, image)

    teacher = 0
    if distill or encodes:
        seen = jax.ShapeDtypeStruct((1, *size, model.teacher.bands), jnp.float32)
        teacher = count(lambda arrays, x: flat.merge(vit, arrays, {})(x), arrays, seen)
    trained = forward(True) - (teacher if encodes else 0)
    return {"inference": forward(False), "teacher": teacher, "training": 3 * trained + teacher}
