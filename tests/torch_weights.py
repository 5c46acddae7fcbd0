"""Torch modules as independent oracles: random weights, and the same weights under our paths."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import torch

from ktda_jax.models import flat
from ktda_jax.weights.table import to_our_layout

torch.set_num_threads(1)  # these sizes are too small to share among threads

LEAVES = {"running_mean": "mean", "running_var": "var"}


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """In float64, with random parameters and statistics: scales of 1 and biases of 0 would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for name, tensor in module.state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("bias") or name.endswith("running_mean"):
            tensor.copy_(0.3 * noise)
        elif tensor.ndim > 1:
            tensor.copy_(noise / math.sqrt(math.prod(tensor.shape[1:])))
        elif tensor.ndim == 1:  # scales and running variances
            tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator, dtype=torch.float64))
    return module


def ours(tensors, renames, expected) -> dict[str, np.ndarray]:
    """torch's tensors (or gradients) by name -> our paths and layout; copies, since torch writes in place.

    `renames`: (pattern, replacement) pairs, as of re.sub, applied in order to each name.
    """
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        for pattern, replacement in renames:
            name = re.sub(pattern, replacement, name)
        *parts, leaf = name.split(".")
        if leaf == "weight":
            leaf = "scale" if tensor.ndim == 1 else "kernel"
        path = "/".join([*parts, LEAVES.get(leaf, leaf)])
        found[path] = to_our_layout(tensor.detach().numpy().copy(), "/" + path)
    return found


def adopt(build, tensors, renames):
    """flat.split of the module that build() makes, in float64, with torch's values."""
    graphdef, params, stats = flat.abstract(build)
    found = ours(tensors, renames, {**params, **stats})
    flat.check_shapes(found, {**params, **stats}, "the torch module")
    return graphdef, *({k: jnp.asarray(found[k], jnp.float64) for k in part} for part in (params, stats))


def compiled(graphdef, params, stats):
    """The module as a jitted function; eager calls would compile every operation by itself."""
    function = jax.jit(lambda params, stats, *args, **kw: flat.merge(graphdef, params, stats)(*args, **kw))
    return functools.partial(function, params, stats)


@functools.partial(jax.jit, static_argnums=0)
def value_and_pullback(function, primals, cotangents):
    """function(primals) and the cotangents pulled back to them."""
    value, pullback = jax.vjp(function, primals)
    return value, pullback(cotangents)[0]


def kept_for_backward(function, *args) -> int:
    """Number of values, besides those of args, that the forward pass of function stores for the backward pass."""
    pullback = jax.eval_shape(lambda *args: jax.vjp(function, *args)[1], *args)
    kept, given = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (pullback, args))
    return kept - given


def gradients(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def nchw(x) -> torch.Tensor:
    return torch.tensor(np.moveaxis(np.asarray(x, np.float64), -1, 1))


def nhwc(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.detach().numpy(), 1, -1)


def random(*shape, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def error(a, b) -> float:
    """||a - b|| / ||b||; raises where the shapes differ."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def worst(a, b) -> tuple[float, str]:
    """The largest `error` over two dicts of arrays, and its name."""
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    return max((error(a[k], b[k]), k) for k in b)
