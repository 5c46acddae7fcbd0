"""DINOv2 (Oquab et al., 2023) and DINOv3 (Siméoni et al., 2025), the frozen teacher: feature maps of chosen layers."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax import UserError
from ktda_jax.models.attention import attention
from ktda_jax.models.initial import trunc_normal
from ktda_jax.models.layers import at_least_float32, gelu, layer_norm, resize
from ktda_jax.models.recompute import activation_linear, norm_linear

PRESETS = {
    "laptop": dict(width=96, depth=4, heads=3),  # ours, for :tiny configs
    "small": dict(width=384, depth=12, heads=6),
    "base": dict(width=768, depth=12, heads=12),
    "large": dict(width=1024, depth=24, heads=16),
    "giant": dict(width=1536, depth=40, heads=24, swiglu=True),
}
# "With registers"; Meta's code resizes their position embedding antialiased.
_REGISTERS = dict(registers=4, antialias=True)
PRESETS |= {f"{name}_reg": {**PRESETS[name], **_REGISTERS} for name in ("small", "base", "large", "giant")}
_DINOV3 = dict(patch=16, registers=4, rope=True)
_SATELLITE = dict(mean=(109.65, 104.805, 75.48), std=(54.315, 39.78, 36.465))  # of the satellite-trained ones
PRESETS |= {
    "dinov3_small": dict(width=384, depth=12, heads=6, **_DINOV3),
    "dinov3_small_plus": dict(width=384, depth=12, heads=6, swiglu=True, **_DINOV3),
    "dinov3_base": dict(width=768, depth=12, heads=12, **_DINOV3),
    "dinov3_large": dict(width=1024, depth=24, heads=16, **_DINOV3),
    "dinov3_large_sat": dict(width=1024, depth=24, heads=16, **_DINOV3, **_SATELLITE),
    "dinov3_huge_plus": dict(width=1280, depth=32, heads=20, swiglu=True, **_DINOV3),
    "dinov3_7b": dict(width=4096, depth=40, heads=32, swiglu=True, mlp_ratio=2.0, **_DINOV3),
    "dinov3_7b_sat": dict(width=4096, depth=40, heads=32, swiglu=True, mlp_ratio=2.0, **_DINOV3, **_SATELLITE),
}
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB, of uint8 values


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    width: int
    depth: int
    heads: int
    image_size: tuple[int, int] = (256, 256)  # the position embedding is stored for this size's grid
    patch: int = 14
    registers: int = 0  # 4 in the published "with registers" models
    swiglu: bool = False
    mlp_ratio: float = 4.0
    rope: bool = False  # DINOv3: rotary positions instead of an embedding
    antialias: bool = False  # how the position embedding is resized
    bands: int = 3  # of the images it takes
    foreign: str | None = None  # name of a teacher that is not ours: width, patch and taps are its features', no more
    mean: tuple[float, ...] = MEAN  # of the images it was trained on
    std: tuple[float, ...] = STD
    taps: tuple[int | None, ...] | None = None  # layers to give out, from 1, by level; None: see `tapped`

    def __post_init__(self):
        for name in ("mean", "std"):
            if len(getattr(self, name)) != self.bands:
                raise UserError(
                    f"config.model.teacher.{name} has {len(getattr(self, name))} number(s), and the teacher sees "
                    f"{self.bands} band(s); give one for each of config.teacher.bands"
                )
        taps = self.taps
        if taps is not None and not (len(taps) == 4 and any(taps) and all(self._is_layer(t) for t in taps)):
            raise UserError(
                f"config.model.teacher.taps is {taps}; give four layers from 1 to {self.depth}, one per level of the "
                "student, None where a level is not distilled"
            )

    def _is_layer(self, tap) -> bool:
        return tap is None or (isinstance(tap, int) and 1 <= tap <= self.depth)

    @property
    def tapped(self) -> tuple[int | None, ...]:
        """By level the index of the layer it is taken from: the last of each quarter (2, 5, 8, 11 of 12), or `taps`."""
        if self.taps is None:
            return tuple((k + 1) * self.depth // 4 - 1 for k in range(4))
        return tuple(None if tap is None else tap - 1 for tap in self.taps)

    @property
    def eps(self) -> float:
        """Of every LayerNorm."""
        return 1e-5 if self.rope else 1e-6

    @property
    def grid(self) -> tuple[int, int]:
        return self.grid_of(*self.image_size)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches of an image that is zero-padded up to a multiple of the patch size."""
        return -(-height // self.patch), -(-width // self.patch)


class Attention(nnx.Module):
    """Multi-head self-attention with one fused qkv projection; also used by the FMM."""

    def __init__(self, width: int, heads: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, **common)
        self.proj = nnx.Linear(width, width, **common)
        self.heads = heads
        self.implementation = None  # of `attention`; an export sets it

    def __call__(self, x: jax.Array, norm: nnx.LayerNorm, rotary: tuple[jax.Array, jax.Array] | None = None):
        """x: (B, N, C), normed here so that the normed copy need not be kept. `rotary`: see `rotary_angles`."""
        batch, tokens, width = x.shape
        # Split, not indexed: the gradient is then one concatenation, not the sum of three padded arrays.
        qkv = jnp.split(norm_linear(norm, self.qkv, x), 3, axis=-1)
        query, key, value = (part.reshape(batch, tokens, self.heads, width // self.heads) for part in qkv)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        out = attention(query, key, value, implementation=self.implementation)
        return self.proj(out.reshape(batch, tokens, width))


def rotary_angles(grid: tuple[int, int], head_dim: int, prefix: int, base: float = 100.0) -> np.ndarray:
    """float64 (prefix + h * w, head_dim) angles of DINOv3: zero, which turns nothing, for class token and registers.

    Patch centres run from -1 to 1 on both axes, whatever the image size.
    """
    frequencies = base ** -np.arange(0, 1, 4 / head_dim)
    centres = [2 * (np.arange(size) + 0.5) / size - 1 for size in grid]
    positions = np.stack(np.meshgrid(*centres, indexing="ij"), -1).reshape(-1, 2)  # (h * w, 2)
    angles = 2 * math.pi * positions[:, :, None] * frequencies
    angles = np.tile(angles.reshape(len(positions), -1), 2)
    return np.concatenate([np.zeros((prefix, head_dim)), angles])


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x: (B, N, heads, D); cos, sin: (N, 1, D). In float32."""
    wide = at_least_float32(x)
    first, second = jnp.split(wide, 2, axis=-1)
    return (wide * cos + jnp.concatenate([-second, first], -1) * sin).astype(x.dtype)


class MLP(nnx.Module):
    """Linear, exact GELU, Linear; also used by the FMM."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, hidden, **common)
        self.fc2 = nnx.Linear(hidden, width, **common)

    def __call__(self, x: jax.Array, norm: nnx.LayerNorm) -> jax.Array:
        """x: (B, N, C), normed here."""
        return activation_linear(gelu, self.fc2, norm_linear(norm, self.fc1, x))


class SwiGLU(nnx.Module):
    """Gated feed-forward of the largest models: fc1 gives gate and value in one product."""

    def __init__(self, width: int, hidden: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(kernel_init=trunc_normal, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.fc1 = nnx.Linear(width, 2 * hidden, **common)
        self.fc2 = nnx.Linear(hidden, width, **common)

    def __call__(self, x: jax.Array, norm: nnx.LayerNorm) -> jax.Array:
        """x: (B, N, C), normed here."""
        gate, value = jnp.split(self.fc1(norm(x)), 2, axis=-1)
        return self.fc2(jax.nn.silu(gate) * value)


class Layer(nnx.Module):
    """Pre-norm transformer layer with LayerScale."""

    def __init__(self, config: ViTConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        if config.swiglu and not config.rope:  # DINOv2 counts gate and value in
            hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.norm1 = layer_norm(width, config.eps, **common)
        self.attn = Attention(width, config.heads, **common)
        self.scale1 = nnx.Param(jnp.ones(width, param_dtype))
        self.norm2 = layer_norm(width, config.eps, **common)
        self.mlp = SwiGLU(width, hidden, **common) if config.swiglu else MLP(width, hidden, **common)
        self.scale2 = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x: jax.Array, rotary: tuple[jax.Array, jax.Array] | None = None) -> jax.Array:
        """x: (B, N, C)."""
        x = x + self.attn(x, self.norm1, rotary) * self.scale1[...].astype(x.dtype)
        return x + self.mlp(x, self.norm2) * self.scale2[...].astype(x.dtype)


class ViT(nnx.Module):
    """Gives the outputs of four layers as maps, the final LayerNorm applied to the last one only."""

    def __init__(self, config: ViTConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, patch = config.width, config.patch
        self.patch_embed = nnx.Conv(
            config.bands, width, (patch, patch), strides=patch, padding="VALID", kernel_init=trunc_normal, **common
        )
        key = rngs.params
        self.cls_token = nnx.Param(trunc_normal(key(), (1, 1, width), param_dtype))
        self.pos_embed_cls = None if config.rope else nnx.Param(trunc_normal(key(), (1, 1, width), param_dtype))
        # Kept as a map, so that resizing it is resizing a map and its grid need not be square.
        shape = (1, *config.grid, width)
        self.pos_embed = None if config.rope else nnx.Param(trunc_normal(key(), shape, param_dtype))
        tokens = (1, config.registers, width)
        self.register_tokens = nnx.Param(trunc_normal(key(), tokens, param_dtype)) if config.registers else None
        self.layers = nnx.List(Layer(config, **common) for _ in range(config.depth))
        self.norm = layer_norm(width, config.eps, **common)
        self.config, self.dtype = config, dtype

    def __call__(self, x: jax.Array) -> list[jax.Array | None]:
        """x: (B, H, W, bands) normalised -> four (B, h, w, C), h = ceil(H / patch); None where `taps` says so."""
        config = self.config
        batch, height, width, _ = x.shape
        grid = config.grid_of(height, width)
        # Zeros at bottom and right, after normalisation: the published code pads where DINOv2's own crops.
        x = jnp.pad(x, ((0, 0), (0, grid[0] * config.patch - height), (0, grid[1] * config.patch - width), (0, 0)))
        x = self.patch_embed(x)
        prefix = [self.cls_token[...]]
        if self.pos_embed is not None:
            method = "bicubic_antialias" if config.antialias else "bicubic"
            x = x + resize(self.pos_embed[...], grid, method=method).astype(x.dtype)
            prefix = [self.cls_token[...] + self.pos_embed_cls[...]]
        x = x.reshape(batch, grid[0] * grid[1], config.width)
        if self.register_tokens is not None:  # registers carry no position
            prefix.append(self.register_tokens[...])
        prefix = jnp.concatenate(prefix, axis=1).astype(x.dtype)
        x = jnp.concatenate([jnp.broadcast_to(prefix, (batch, *prefix.shape[1:])), x], axis=1)
        rotary = None
        if config.rope:
            angles = rotary_angles(grid, config.width // config.heads, prefix.shape[1])[:, None]
            wide = at_least_float32(x).dtype
            rotary = jnp.asarray(np.cos(angles), wide), jnp.asarray(np.sin(angles), wide)
        outputs = {None: None}
        last = max(index for index in config.tapped if index is not None)
        for index in range(last + 1):
            layer = self.layers[index]
            x = layer(x) if rotary is None else layer(x, rotary)
            if index in config.tapped:
                tokens = self.norm(x) if index == config.depth - 1 else x
                outputs[index] = tokens[:, prefix.shape[1] :].reshape(batch, *grid, config.width)
        return [outputs.get(index) for index in config.tapped]
