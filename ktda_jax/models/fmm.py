"""Feature Modulation Module (paper section III-C): adapts each level to the domain."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ktda_jax import UserError
from ktda_jax.models.initial import trunc_normal
from ktda_jax.models.layers import gelu, layer_norm
from ktda_jax.models.recompute import recompute
from ktda_jax.models.vit import MLP, Attention

CHUNK = 8192  # tokens


@dataclasses.dataclass(frozen=True)
class FMMConfig:
    form: str = "transformer"  # or "mlp"
    blocks: int = 4
    heads: int = 8  # transformer only
    mlp_ratio: float = 4.0  # transformer only
    remat: bool = False  # transformer only: recompute each block in the backward pass

    def __post_init__(self):
        if self.form not in ("transformer", "mlp"):
            raise UserError(f"config.model.fmm.form is {self.form!r}; choose 'transformer' or 'mlp'")


class TransformerBlock(nnx.Module):
    """Pre-norm attention and MLP; no position embedding, no layer scale; LayerNorm eps 1e-5."""

    def __init__(self, width: int, config: FMMConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = layer_norm(width, 1e-5, **common)
        self.attn = Attention(width, config.heads, **common)
        self.norm2 = layer_norm(width, 1e-5, **common)
        self.mlp = MLP(width, int(width * config.mlp_ratio), **common)
        self.remat = config.remat

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, N, C)."""
        if not self.remat:
            return _feed_forward((self.mlp, self.norm2), _attend((self.attn, self.norm1), x))
        x = recompute(_attend, (self.attn, self.norm1), x)
        # The MLP works token by token; in chunks its hidden layer, four times as wide, is never whole.
        return _in_chunks(lambda x: recompute(_feed_forward, (self.mlp, self.norm2), x), x, CHUNK)


def _attend(modules, x):
    attn, norm = modules
    return x + attn(x, norm)


def _feed_forward(modules, x):
    mlp, norm = modules
    return x + mlp(x, norm)


def _in_chunks(function, x: jax.Array, size: int) -> jax.Array:
    """`function` over (B, N, C), `size` tokens of every sample at a time."""
    batch, tokens, width = x.shape
    count = -(-tokens // size)
    if count == 1:
        return function(x)
    size = -(-tokens // count)
    chunks = jnp.pad(x, ((0, 0), (0, count * size - tokens), (0, 0))).reshape(batch, count, size, width)
    out = jax.lax.map(function, jnp.moveaxis(chunks, 1, 0))
    return jnp.moveaxis(out, 0, 1).reshape(batch, count * size, width)[:, :tokens]


class MLPBlock(nnx.Module):
    """Bottleneck Linear(C, C/4), GELU, Linear(C/4, C), without residual."""

    def __init__(self, width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, width // 4, **common)
        self.fc2 = nnx.Linear(width // 4, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, N, C)."""
        return self.fc2(gelu(self.fc1(x)))


class FMM(nnx.Module):
    """The same stack of blocks, with its own weights, on the tokens of every level."""

    def __init__(self, widths: Sequence[int], config: FMMConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def block(width):
            if config.form == "mlp":
                return MLPBlock(width, **common)
            return TransformerBlock(width, config, **common)

        self.adapters = nnx.List(nnx.List(block(w) for _ in range(config.blocks)) for w in widths)

    def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
        """features: (B, H_i, W_i, C_i) per level -> the same shapes."""
        outputs = []
        for blocks, x in zip(self.adapters, features, strict=True):
            tokens = x.reshape(x.shape[0], -1, x.shape[3])  # (B, H*W, C)
            for block in blocks:
                tokens = block(tokens)
            outputs.append(tokens.reshape(x.shape))
        return outputs
