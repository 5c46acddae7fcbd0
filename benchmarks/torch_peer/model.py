"""The published KTDA in plain PyTorch, to compare with: needs torch alone, NCHW, parameters named as upstream's.

Written as one would write it with torch's own operators. `config` is a `ktda_jax.models.ktda.KTDAConfig`, or
anything with the same attributes; only what was published is built. Weights are always loaded, so the modules keep
torch's initial values. Source: mmsegmentation 1.2.2, mmpretrain 1.2.0 and the paper (arXiv 2412.06664).
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # ImageNet's, RGB, of uint8 values
BINS, SCALES = (1, 2, 3, 6), (4, 2, 1, 0.5)
AUX_LEVEL = 2


def resize(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(B, C, H, W) -> (B, C, *size), bilinear."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class DropPath(nn.Module):
    """Zeroes whole samples in training."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rate == 0.0 or not self.training:
            return x
        keep = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * keep / (1 - self.rate)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of (B, C, H, W)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 in NCHW; norm and both pointwise layers as linear ones on the last axis, as mmpretrain does it."""

    def __init__(self, channels: int, rate: float):
        super().__init__()
        self.depthwise_conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.ones(channels))
        self.drop_path = DropPath(rate)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.depthwise_conv(x).permute(0, 2, 3, 1))
        y = self.pointwise_conv2(F.gelu(self.pointwise_conv1(y))) * self.gamma
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class ConvNeXt(nn.Module):
    """The student: four maps at strides 4, 8, 16, 32, each through a LayerNorm of its own."""

    def __init__(self, config):
        super().__init__()
        channels = config.channels
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(nn.Conv2d(3, channels[0], 4, stride=4), LayerNorm2d(channels[0], eps=1e-6))]
        )
        for inputs, outputs in itertools.pairwise(channels):
            layers = LayerNorm2d(inputs, eps=1e-6), nn.Conv2d(inputs, outputs, 2, stride=2)
            self.downsample_layers.append(nn.Sequential(*layers))
        rates = iter(torch.linspace(0, config.drop_path, sum(config.depths), device="cpu").tolist())
        self.stages = nn.ModuleList(
            nn.Sequential(*(ConvNeXtBlock(width, next(rates)) for _ in range(depth)))
            for depth, width in zip(config.depths, channels, strict=True)
        )
        for level, width in enumerate(channels):
            self.add_module(f"norm{level}", LayerNorm2d(width, eps=1e-6))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        outputs = []
        for level, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages, strict=True)):
            x = stage(downsample(x))
            outputs.append(getattr(self, f"norm{level}")(x))
        return outputs


class LayerScale(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


class Attention(nn.Module):
    """Self-attention of (B, N, C); `scale`: the teacher's LayerScale behind it."""

    def __init__(self, width: int, heads: int, *, scale: bool):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gamma1 = LayerScale(width) if scale else nn.Identity()
        self.heads = heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.gamma1(self.proj(x.transpose(1, 2).reshape(batch, tokens, width)))


class FFN(nn.Module):
    """mmcv's feed-forward with LayerScale, whose names it keeps."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Sequential(nn.Linear(width, hidden), nn.GELU()), nn.Linear(hidden, width))
        self.gamma2 = LayerScale(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma2(self.layers(x))


class ViTLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config.width, config.heads, scale=True)
        self.ln2 = nn.LayerNorm(config.width, eps=1e-6)
        self.ffn = FFN(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.ffn(self.ln2(x))


class ViT(nn.Module):
    """DINOv2, the frozen teacher: outputs of four layers as maps, the final norm on the last one only."""

    def __init__(self, config):
        super().__init__()
        width, self.patch = config.width, config.patch
        self.grid = tuple(-(-side // config.patch) for side in config.image_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], width))
        self.patch_embed = nn.Module()
        self.patch_embed.projection = nn.Conv2d(3, width, config.patch, stride=config.patch)
        self.layers = nn.ModuleList(ViTLayer(config) for _ in range(config.depth))
        self.ln1 = nn.LayerNorm(width, eps=1e-6)
        self.taps = [(k + 1) * config.depth // 4 - 1 for k in range(4)]

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """(1, 1 + h * w, C), resized in float32 whatever the model's dtype, as mmpretrain does."""
        if grid == self.grid:
            return self.pos_embed
        cls, patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patches = patches.reshape(1, *self.grid, -1).permute(0, 3, 1, 2).float()
        patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False)
        return torch.cat([cls, patches.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """x: (B, 3, H, W) normalised, zero-padded here up to a multiple of the patch."""
        x = F.pad(x, (0, -x.shape[3] % self.patch, 0, -x.shape[2] % self.patch))
        x = self.patch_embed.projection(x)
        batch, width, *grid = x.shape
        x = torch.cat([self.cls_token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)], dim=1)
        x = x + self.positions(tuple(grid))
        outputs = []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.taps:
                tokens = self.ln1(x) if index == len(self.layers) - 1 else x
                outputs.append(tokens[:, 1:].transpose(1, 2).reshape(batch, width, *grid))
        return outputs


class FAM(nn.Module):
    """1x1 convolutions to the teacher's width, then its grid."""

    def __init__(self, channels, width: int):
        super().__init__()
        self.convert = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)

    def forward(self, features: list[torch.Tensor], grid: tuple[int, int]) -> list[torch.Tensor]:
        return [resize(convert(x), grid) for convert, x in zip(self.convert, features, strict=True)]


class ConvModule(nn.Module):
    """mmcv's: a bare convolution, or one without bias followed by BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, norm: bool):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
        self.bn = nn.BatchNorm2d(outputs) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class Neck(nn.Module):
    """MultiLevelNeck: four maps of one size become a pyramid."""

    def __init__(self, width: int):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(width, width, 1, norm=False) for _ in SCALES)
        self.convs = nn.ModuleList(ConvModule(width, width, 3, norm=False) for _ in SCALES)

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = []
        for lateral, conv, x, scale in zip(self.lateral_convs, self.convs, features, SCALES, strict=True):
            outputs.append(conv(F.interpolate(lateral(x), scale_factor=scale, mode="bilinear", align_corners=False)))
        return outputs


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block of the FMM."""

    def __init__(self, width: int, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-5), nn.LayerNorm(width, eps=1e-5)
        self.attn = Attention(width, config.heads, scale=False)
        self.mlp = MLP(width, int(width * config.mlp_ratio))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class FMM(nn.Module):
    def __init__(self, width: int, config):
        super().__init__()
        self.adapters = nn.ModuleList(
            nn.Sequential(*(Block(width, config) for _ in range(config.blocks))) for _ in SCALES
        )

    def forward(self, features: list[torch.Tensor]) -> list[torch.Tensor]:
        return [
            blocks(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)
            for blocks, x in zip(self.adapters, features, strict=True)
        ]


class UPerHead(nn.Module):
    def __init__(self, width: int, channels: int, classes: int, dropout: float):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), ConvModule(width, channels, 1, norm=True)) for bins in BINS
        )
        self.bottleneck = ConvModule(width + len(BINS) * channels, channels, 3, norm=True)
        self.lateral_convs = nn.ModuleList(ConvModule(width, channels, 1, norm=True) for _ in SCALES[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3, norm=True) for _ in SCALES[:-1])
        self.fpn_bottleneck = ConvModule(len(SCALES) * channels, channels, 3, norm=True)
        self.dropout, self.conv_seg = nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1)

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Four (B, C, H_i, W_i), fine to coarse -> logits (B, classes, H_0, W_0)."""
        last = features[-1]
        pooled = [resize(module(last), last.shape[2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, features[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat([last, *pooled], dim=1)))
        for level in range(len(laterals) - 1, 0, -1):
            laterals[level - 1] = laterals[level - 1] + resize(laterals[level], laterals[level - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + laterals[-1:]
        fused = torch.cat([outputs[0], *(resize(x, outputs[0].shape[2:]) for x in outputs[1:])], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCNHead(nn.Module):
    def __init__(self, width: int, channels: int, classes: int, dropout: float):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(width, channels, 3, norm=True))
        self.dropout, self.conv_seg = nn.Dropout2d(dropout), nn.Conv2d(channels, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


class KTDA(nn.Module):
    """Student, FAM, neck, FMM, heads, and the frozen teacher. Called, it gives the logits at head resolution."""

    def __init__(self, config):
        super().__init__()
        width, classes = config.teacher.width, config.num_classes
        self.backbone, self.teach_backbone = ConvNeXt(config.student), ViT(config.teacher)
        self.fam, self.neck = FAM(config.student.channels, width), Neck(width)
        self.fmm = FMM(width, config.fmm)
        self.decode_head = UPerHead(width, config.head_channels, classes, config.dropout)
        self.auxiliary_head = FCNHead(width, config.aux_channels, classes, config.dropout)
        self.teach_backbone.requires_grad_(False)
        self.grid = config.grid
        for name, values in (("mean", MEAN), ("std", STD)):  # on the CPU, also where the rest is built on "meta"
            self.register_buffer(name, torch.tensor(values, device="cpu").view(3, 1, 1), persistent=False)

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8, RGB -> zero mean, unit variance."""
        return (images.to(self.mean.dtype) - self.mean) / self.std

    def align(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The student's maps of normalised images in the teacher's width and grid."""
        grid = self.grid or tuple(-(-side // self.teach_backbone.patch) for side in x.shape[2:])
        return self.fam(self.backbone(x), grid)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decode_head(self.fmm(self.neck(self.align(self.normalize(images)))))
