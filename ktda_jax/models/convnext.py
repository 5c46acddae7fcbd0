"""ConvNeXt student (Liu et al., 2022) as mmpretrain builds it, and ConvNeXt-V2 blocks (Woo et al., 2023)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax.models.depthwise import depthwise_conv
from ktda_jax.models.initial import trunc_normal
from ktda_jax.models.layers import drop_path, gelu, layer_norm
from ktda_jax.models.recompute import activation_linear, norm_linear, recompute

PRESETS = {
    "laptop": dict(depths=(1, 1, 3, 1), channels=(32, 64, 128, 256)),  # ours, for :tiny configs
    "tiny": dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768)),
    "small": dict(depths=(3, 3, 27, 3), channels=(96, 192, 384, 768)),
    "base": dict(depths=(3, 3, 27, 3), channels=(128, 256, 512, 1024)),
    "large": dict(depths=(3, 3, 27, 3), channels=(192, 384, 768, 1536)),
    "v2_atto": dict(depths=(2, 2, 6, 2), channels=(40, 80, 160, 320), v2=True),
    "v2_femto": dict(depths=(2, 2, 6, 2), channels=(48, 96, 192, 384), v2=True),
}
# Meta's, distilled from DINOv3's 7B. Its dense features (`get_intermediate_layers`, normed as by default) are the first
# three stages as they are, and the LayerNorm of the last.
PRESETS |= {f"dinov3_{name}": {**PRESETS[name], "first_norms": False} for name in ("tiny", "small", "base", "large")}


@dataclasses.dataclass(frozen=True)
class ConvNeXtConfig:
    depths: tuple[int, ...]
    channels: tuple[int, ...]
    drop_path: float = 0.0  # of the last block; rises linearly from 0
    layer_scale: float = 1.0  # initial value, published KTDA setting
    v2: bool = False  # global response normalisation instead of layer scale
    bands: int = 3
    first_norms: bool = True  # a LayerNorm on each of the first three maps too, as mmpretrain has it
    remat: bool = False  # recompute each block in the backward pass


class Block(nnx.Module):
    """Depthwise 7x7, LayerNorm, two pointwise layers; layer scale (V1) or GRN (V2); residual."""

    def __init__(self, channels: int, rate: float, config: ConvNeXtConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.depthwise_conv = nnx.Conv(
            channels, channels, (7, 7), feature_group_count=channels, kernel_init=trunc_normal, **common
        )
        self.norm = layer_norm(channels, 1e-6, **common)
        self.pointwise_conv1 = nnx.Linear(channels, 4 * channels, kernel_init=trunc_normal, **common)
        self.pointwise_conv2 = nnx.Linear(4 * channels, channels, kernel_init=trunc_normal, **common)
        self.grn = GRN(4 * channels, param_dtype=param_dtype) if config.v2 else None
        self.gamma = None if config.v2 else nnx.Param(jnp.full(channels, config.layer_scale, param_dtype))
        self.rate = rate
        self.dtype = dtype
        self.implementation = None  # of `depthwise_conv`; an export sets it

    def __call__(self, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """x: (B, H, W, C)."""
        conv = self.depthwise_conv
        # nnx.Conv holds the parameters; the product itself is ours, since XLA's is very slow on CPU.
        y = depthwise_conv(x, conv.kernel[...].astype(self.dtype), implementation=self.implementation)
        y = y + conv.bias[...].astype(self.dtype)
        y = norm_linear(self.norm, self.pointwise_conv1, y)
        if self.grn is None:
            y = activation_linear(gelu, self.pointwise_conv2, y)
        else:
            y = self.pointwise_conv2(self.grn(gelu(y)))
        if self.gamma is not None:
            y = y * self.gamma[...].astype(self.dtype)
        return x + drop_path(y, self.rate, key)


def _call(block: Block, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return block(x, key)


class GRN(nnx.Module):
    """Global response normalisation (ConvNeXt V2, section 3.2)."""

    def __init__(self, channels: int, *, param_dtype):
        self.gamma = nnx.Param(jnp.zeros(channels, param_dtype))
        self.beta = nnx.Param(jnp.zeros(channels, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: (B, H, W, C)."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        # The clamp keeps the gradient of the norm finite where a channel is all zero.
        norm = jnp.sqrt(jnp.maximum(jnp.square(wide).sum((1, 2), keepdims=True), 1e-12))
        wide = self.gamma[...] * (wide * (norm / (norm.mean(-1, keepdims=True) + 1e-6))) + self.beta[...] + wide
        return wide.astype(x.dtype)


class Downsample(nnx.Module):
    """The stem (convolution, then LayerNorm) or a stage transition (LayerNorm, then convolution)."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, stem: bool, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # Named ln, not norm: upstream gives these weight decay, and the decay rule goes by "norm" in the path.
        self.ln = layer_norm(outputs if stem else inputs, 1e-6, **common)
        self.conv = nnx.Conv(
            inputs,
            outputs,
            (stride, stride),
            strides=stride,
            padding="VALID",
            kernel_init=trunc_normal,
            **common,
        )
        self.stem = stem

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.ln(self.conv(x)) if self.stem else self.conv(self.ln(x))


class ConvNeXt(nnx.Module):
    """Four stages at strides 4, 8, 16, 32, each output through its own LayerNorm."""

    def __init__(self, config: ConvNeXtConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inputs = (config.bands, *config.channels[:-1])
        self.downsample = nnx.List(
            Downsample(i, o, 4 if k == 0 else 2, stem=k == 0, **common)
            for k, (i, o) in enumerate(zip(inputs, config.channels, strict=True))
        )
        rates = iter(np.linspace(0.0, config.drop_path, sum(config.depths)).tolist())
        self.stages = nnx.List(
            nnx.List(Block(channels, next(rates), config, **common) for _ in range(depth))
            for depth, channels in zip(config.depths, config.channels, strict=True)
        )
        self.norms = nnx.List(
            layer_norm(channels, 1e-6, **common) if config.first_norms or k + 1 == len(config.channels) else None
            for k, channels in enumerate(config.channels)
        )
        self.remat = config.remat

    def __call__(self, x: jax.Array, *, key: jax.Array | None = None) -> list[jax.Array]:
        """x: (B, H, W, bands) normalised -> [(B, H/4, W/4, C0), ..., (B, H/32, W/32, C3)]. `key`: drop path."""
        outputs, index = [], 0
        for downsample, stage, norm in zip(self.downsample, self.stages, self.norms, strict=True):
            x = downsample(x)
            for block in stage:
                block_key = None if key is None else jax.random.fold_in(key, index)
                call = functools.partial(_call, key=block_key)
                x = recompute(call, block, x) if self.remat else call(block, x)
                index += 1
            outputs.append(x if norm is None else norm(x))
        return outputs
