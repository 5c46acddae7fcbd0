"""Feature Modulation Module (paper section III-C): adapts each level to the domain."""

import dataclasses
from collections.abc import Sequence

import jax
from flax import nnx

from ktda_jax.models.layers import gelu, layer_norm, trunc_normal
from ktda_jax.models.recompute import recompute
from ktda_jax.models.vit import MLP, Attention


@dataclasses.dataclass(frozen=True)
class FMMConfig:
    form: str = "transformer"  # or "mlp"
    blocks: int = 4
    heads: int = 8  # transformer only
    mlp_ratio: float = 4.0  # transformer only
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        if self.form not in ("transformer", "mlp"):
            raise ValueError(f"model.fmm.form is {self.form!r}; choose 'transformer' or 'mlp'")


class TransformerBlock(nnx.Module):
    """Pre-norm attention and MLP; no position embedding, no layer scale; LayerNorm eps 1e-5."""

    def __init__(self, width: int, config: FMMConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = layer_norm(width, 1e-5, **common)
        self.attn = Attention(width, config.heads, **common)
        self.norm2 = layer_norm(width, 1e-5, **common)
        self.mlp = MLP(width, int(width * config.mlp_ratio), **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, N, C)."""
        x = x + self.attn(x, self.norm1)
        return x + self.mlp(x, self.norm2)


class MLPBlock(nnx.Module):
    """Bottleneck Linear(C, C/4), GELU, Linear(C/4, C), without residual."""

    def __init__(self, width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, width // 4, **common)
        self.fc2 = nnx.Linear(width // 4, width, **common)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, N, C)."""
        return self.fc2(gelu(self.fc1(x)))


def _call(block, x):
    return block(x)


class FMM(nnx.Module):
    """The same stack of blocks, with its own weights, on the tokens of every level."""

    def __init__(self, widths: Sequence[int], config: FMMConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        def block(width):
            if config.form == "mlp":
                return MLPBlock(width, **common)
            return TransformerBlock(width, config, **common)

        self.adapters = nnx.List(nnx.List(block(w) for _ in range(config.blocks)) for w in widths)
        self.remat = config.remat

    def __call__(self, features: Sequence[jax.Array]) -> list[jax.Array]:
        """features: (B, H_i, W_i, C_i) per level -> the same shapes."""
        outputs = []
        for blocks, x in zip(self.adapters, features, strict=True):
            tokens = x.reshape(x.shape[0], -1, x.shape[3])  # (B, H*W, C)
            for block in blocks:
                tokens = recompute(_call, block, tokens) if self.remat else block(tokens)
            outputs.append(tokens.reshape(x.shape))
        return outputs
