"""Decoders: UPerHead (Xiao et al., 2018) and FCNHead (the auxiliary one) of mmsegmentation, and a linear one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from ktda_jax.models.initial import normal
from ktda_jax.models.layers import ConvBNReLU, adaptive_avg_pool, conv, dropout2d, resize


def classifier(channels: int, num_classes: int, **common) -> nnx.Linear:
    return conv(channels, num_classes, 1, kernel_init=normal(0.01), **common)


class UPerHead(nnx.Module):
    """Pyramid pooling on the last level, top-down sums, one fused map at the first level's size."""

    def __init__(
        self, inputs: Sequence[int], channels: int, num_classes: int, *, bins: Sequence[int] = (1, 2, 3, 6),
        dropout: float = 0.1, dtype, param_dtype, rngs: nnx.Rngs,
    ):  # fmt: skip
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.psp = nnx.List(ConvBNReLU(inputs[-1], channels, 1, **common) for _ in bins)
        self.bottleneck = ConvBNReLU(inputs[-1] + len(bins) * channels, channels, 3, **common)
        self.lateral_convs = nnx.List(ConvBNReLU(c, channels, 1, **common) for c in inputs[:-1])
        self.fpn_convs = nnx.List(ConvBNReLU(channels, channels, 3, **common) for _ in inputs[:-1])
        self.fpn_bottleneck = ConvBNReLU(len(inputs) * channels, channels, 3, **common)
        self.conv_seg = classifier(channels, num_classes, **common)
        self.bins, self.dropout = tuple(bins), dropout

    def __call__(self, features: Sequence[jax.Array], *, train: bool, key: jax.Array | None) -> jax.Array:
        """features: (B, H_i, W_i, C_i) from fine to coarse -> logits (B, H_0, W_0, classes)."""
        x = features[-1]
        pooled = [
            resize(layer(adaptive_avg_pool(x, bins), train=train), x.shape[1:3])
            for layer, bins in zip(self.psp, self.bins, strict=True)
        ]
        laterals = [layer(f, train=train) for layer, f in zip(self.lateral_convs, features, strict=False)]
        laterals.append(self.bottleneck(jnp.concatenate([x, *pooled], axis=-1), train=train))
        for level in reversed(range(1, len(laterals))):
            laterals[level - 1] += resize(laterals[level], laterals[level - 1].shape[1:3])
        outputs = [layer(f, train=train) for layer, f in zip(self.fpn_convs, laterals, strict=False)]
        outputs.append(laterals[-1])
        size = outputs[0].shape[1:3]
        fused = jnp.concatenate([resize(f, size) for f in outputs], axis=-1)
        fused = self.fpn_bottleneck(fused, train=train)
        return self.conv_seg(dropout2d(fused, self.dropout, key))


class FCNHead(nnx.Module):
    """One 3x3 ConvBNReLU and a classifier."""

    def __init__(
        self, inputs: int, channels: int, num_classes: int, *, dropout: float = 0.1, dtype, param_dtype,
        rngs: nnx.Rngs,
    ):  # fmt: skip
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.convs = nnx.List([ConvBNReLU(inputs, channels, 3, **common)])
        self.conv_seg = classifier(channels, num_classes, **common)
        self.dropout = dropout

    def __call__(self, x: jax.Array, *, train: bool, key: jax.Array | None) -> jax.Array:
        """x: (B, H, W, C) -> logits (B, H, W, classes)."""
        for layer in self.convs:
            x = layer(x, train=train)
        return self.conv_seg(dropout2d(x, self.dropout, key))


class LinearHead(nnx.Module):
    """A classifier on the channels of all levels, resized to the first one's size (hypercolumns, Hariharan et al.,
    2015): a linear probe. One layer a level, since resizing their sums is the same and cheaper."""

    def __init__(
        self, inputs: Sequence[int], num_classes: int, *, dropout: float = 0.1, dtype, param_dtype, rngs: nnx.Rngs
    ):
        common = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.conv_seg = nnx.List(classifier(c, num_classes, **common) for c in inputs)
        self.dropout = dropout

    def __call__(self, features: Sequence[jax.Array], *, train: bool, key: jax.Array | None) -> jax.Array:
        """features: (B, H_i, W_i, C_i) from fine to coarse -> logits (B, H_0, W_0, classes)."""
        keys = (None,) * len(features) if key is None else jax.random.split(key, len(features))
        size = features[0].shape[1:3]
        return sum(
            resize(layer(dropout2d(x, self.dropout, k)), size)
            for layer, x, k in zip(self.conv_seg, features, keys, strict=True)
        )
