"""Modules as flat dicts of arrays: {'student/stages/0/0/norm/scale': ...}.

A flat dict keeps every rule (sharding, weight decay, conversion, checkpoints) a function of path and shape.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from ktda_jax import UserError

Arrays = dict[str, jax.Array]


def _flatten(state: nnx.State) -> Arrays:
    return {"/".join(map(str, path)): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _variables(arrays: Mapping[str, jax.Array], kind: type[nnx.Variable]):
    for path, value in arrays.items():
        yield tuple(int(p) if p.isdigit() else p for p in path.split("/")), kind(value)


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """Module -> structure, parameters, BatchNorm statistics."""
    graphdef, params, stats = nnx.split(module, nnx.Param, nnx.BatchStat)
    return graphdef, _flatten(params), _flatten(stats)


def merge(graphdef: nnx.GraphDef, params: Arrays, stats: Arrays) -> nnx.Module:
    """The inverse of `split`: a fresh module, which may be called (and mutated) inside a traced function."""
    flat = [*_variables(params, nnx.Param), *_variables(stats, nnx.BatchStat)]
    return nnx.merge(graphdef, nnx.from_flat_state(flat))


def batch_stats(module: nnx.Module) -> Arrays:
    """The BatchNorm statistics after a training-mode call."""
    return _flatten(nnx.state(module, nnx.BatchStat))


def abstract(build: Callable[[], nnx.Module]) -> tuple[nnx.GraphDef, Arrays, Arrays]:
    """`split` of a module that is never allocated: shapes and dtypes only."""
    return split(nnx.eval_shape(build))


def check_shapes(found: Mapping[str, Any], expected: Mapping[str, Any], what: str) -> None:
    """Raises one UserError that names missing, unexpected and mis-shaped tensors, a few of each."""

    def some(names):
        names = sorted(names)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    problems = []
    if missing := expected.keys() - found.keys():
        problems.append(f"missing {some(missing)}")
    if extra := found.keys() - expected.keys():
        problems.append(f"unexpected {some(extra)}")
    wrong = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in found.keys() & expected.keys()
        if tuple(found[name].shape) != tuple(expected[name].shape)
    ]
    if wrong:
        problems.append(f"shapes differ: {some(wrong)}")
    if problems:
        raise UserError(f"{what} does not fit the model: " + "; ".join(problems))


def check_finite(arrays: Mapping[str, Any], what: str) -> None:
    """Raises one UserError that names the tensors with a NaN or an infinity: a model with one maps all to class 0."""
    wrong = []
    for name, array in arrays.items():
        array = np.asarray(array)
        if array.dtype.kind in "fV" and not np.isfinite(array).all():  # V: bfloat16 and the like
            wrong.append(f"{name} ({np.count_nonzero(~np.isfinite(array)):,} of {array.size:,} values)")
    if wrong:
        more = f" and {len(wrong) - 3} more tensors" if len(wrong) > 3 else ""
        raise UserError(
            f"{what} is not finite in {', '.join(wrong[:3])}{more}; take weights of a training that went well"
        )


def count(arrays: Mapping[str, Any]) -> int:
    """Number of values."""
    return sum(int(a.size) for a in arrays.values())
