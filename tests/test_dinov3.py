"""DINOv3 as Meta, timm and Hugging Face publish it: their names and shapes, their numbers, and what is refused."""

import dataclasses
import functools
import json
import math
import pathlib

import golden
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from safetensors.torch import save_file
from test_convert_backbones import VIT, random_model, renamed, run, vit_outputs
from torch_weights import error, nchw, random

from ktda_jax import UserError
from ktda_jax.models import convnext, flat, vit
from ktda_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from ktda_jax.models.vit import ViTConfig
from ktda_jax.weights import files, folder, loading, sources

REPOSITORY = pathlib.Path(__file__).parents[1]
NAMES = json.loads((golden.GOLDENS / "dinov3_names.json").read_text())  # written by dinov3_names.py beside it
PERIODS = torch.tensor(100.0).pow(torch.arange(16) / 16).bfloat16().float().numpy()  # as Meta's files have them
FILES = {  # what each calls its files, as in dinov3/hub/backbones.py, timm/models/eva.py and on the hub
    "meta vit": "dinov3_vitx16_pretrain_{data}-01234567.pth",
    "timm vit": "vit_x_patch16_dinov3.{data}",
    "timm vit, biases": "vit_x_patch16_dinov3_qkvb.{data}",
    "hf vit": "hf://facebook/dinov3-vitx16-pretrain-{data}",
}


class Shape:
    """An array of which nothing but the shape is there: the largest model would take 27 GB."""

    dtype = np.dtype(np.float32)

    def __init__(self, *shape: int):
        self.shape, self.ndim, self.size = shape, len(shape), math.prod(shape)

    def __array_function__(self, function, types, arguments, options):
        if function is np.concatenate:
            parts = arguments[0]
            return Shape(sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        made = [np.broadcast_to(np.float32(0), a.shape) if isinstance(a, Shape) else a for a in arguments]
        return Shape(*function(*made, **options).shape)


def published(source: str, model: str) -> dict:
    """The tensors of one model, by the names of those who publish it; those of one axis are real."""
    place = NAMES[source]["models"].index(model)
    tensors = {}
    for name, rows in NAMES[source]["tensors"].items():
        if rows[place]:
            blocks, *shape = rows[place]
            for block in range(blocks):
                tensors[name.format(block)] = Shape(*shape) if len(shape) > 1 else np.zeros(shape, np.float32)
    if "rope_embed.periods" in tensors:
        count = tensors["rope_embed.periods"].size
        tensors["rope_embed.periods"] = np.float32(100.0) ** (np.arange(count, dtype=np.float32) / count)
    return tensors


EXPECTED = functools.cache(sources.expected)


def expected(kind: str, config):
    """`sources.expected` of a shallow model, its blocks repeated: that of the largest takes a minute."""
    if kind == "teacher":
        shallow = dataclasses.replace(config, depth=4, mean=vit.MEAN, std=vit.STD)
        blocks = {"layers/0/": [f"layers/{k}/" for k in range(config.depth)]}
    else:
        shallow = dataclasses.replace(config, depths=(1, 1, 1, 1))
        blocks = {f"stages/{k}/0/": [f"stages/{k}/{j}/" for j in range(n)] for k, n in enumerate(config.depths)}
    params, stats = EXPECTED(kind, shallow)
    repeated = {
        new + path.removeprefix(first): shape
        for first, all_of_them in blocks.items()
        for path, shape in params.items()
        if path.startswith(first)
        for new in all_of_them
    }
    once = {path: shape for path, shape in params.items() if not path.startswith(("layers/", "stages/"))}
    return once | repeated, stats


@pytest.fixture
def given(monkeypatch):
    """Makes `sources.load` find tensors, and settings beside them, under any path."""
    monkeypatch.setattr(sources, "expected", expected)

    def give(tensors, beside=None):
        monkeypatch.setattr(files, "locate", lambda path: (pathlib.Path(path), {"path": path}))
        monkeypatch.setattr(files, "read", lambda path: (tensors, dict(beside or {}), []))

    return give


@pytest.mark.parametrize("source", [name for name in NAMES if name.endswith(("vit", "biases"))])
def test_published_teachers_of_all_sizes(source, given):
    for model in NAMES[source]["models"]:
        given(published(source, model))
        path = FILES[source].format(data="sat493m" if model.endswith("_sat") else "lvd1689m")
        found = sources.load(path, source.split()[0])
        assert found.config == ViTConfig(**vit.PRESETS[f"dinov3_{model}"]), model
        assert found.source["statistics"] == f"by the name {path.rpartition('/')[2]}" and not found.assumed


@pytest.mark.parametrize("source", [name for name in NAMES if name.endswith("convnext")])
def test_published_students_of_all_sizes(source, given):
    for size in NAMES[source]["models"]:
        given(published(source, size))
        found = sources.load("x", source.split()[0])
        preset = size if source == "timm convnext" else f"dinov3_{size}"  # timm's are named as any ConvNeXt of its
        assert found.config == ConvNeXtConfig(**convnext.PRESETS[preset]), size
        if source == "hf convnext":  # as files on the hub are named, before transformers 5
            given({name.removeprefix("model."): array for name, array in published(source, size).items()})
            assert sources.load("x", "hf").config == found.config


def test_every_preset_was_published():
    students = {f"dinov3_{name}" for name in NAMES["meta convnext"]["models"]}
    teachers = {f"dinov3_{name}" for name in NAMES["meta vit"]["models"]}
    assert students == {name for name in convnext.PRESETS if name.startswith("dinov3")}
    assert teachers == {name for name in vit.PRESETS if name.startswith("dinov3")}


def to_meta(tensors) -> dict[str, torch.Tensor]:
    """Hugging Face's names as Meta's, with what only Meta's files have: a key bias, which is masked, and its mask."""
    tensors = renamed(
        tensors,
        [
            (r"^embeddings\.register_tokens", "storage_tokens"),
            (r"^embeddings\.patch_embeddings", "patch_embed.proj"),
            (r"^embeddings\.", ""),
            (r"^model\.layer", "blocks"),
            (r"attention\.o_proj", "attn.proj"),
            (r"layer_scale(\d)\.lambda1", r"ls\1.gamma"),
            *([(r"gate_proj", "w1"), (r"up_proj", "w2"), (r"down_proj", "w3")] if _gated(tensors) else []),
            (r"up_proj", "fc1"),
            (r"down_proj", "fc2"),
        ],
    )
    for stem in [name.removesuffix(".q_proj.weight") for name in tensors if name.endswith(".q_proj.weight")]:
        query, value = tensors.pop(f"{stem}.q_proj.bias"), tensors.pop(f"{stem}.v_proj.bias")
        new = stem.replace("attention", "attn.qkv")
        tensors[f"{new}.weight"] = torch.cat([tensors.pop(f"{stem}.{part}_proj.weight") for part in "qkv"])
        tensors[f"{new}.bias"] = torch.cat([query, torch.full_like(query, 7.0), value])
        tensors[f"{new}.bias_mask"] = torch.ones(3, len(query)).mul(torch.tensor([[1.0], [0.0], [1.0]])).flatten()
    norm = {f"local_cls_norm.{leaf}": torch.full_like(tensors["norm.weight"], 3.0) for leaf in ("weight", "bias")}
    head = tensors["cls_token"].shape[-1] // VIT["num_attention_heads"]
    periods = torch.tensor(100.0).pow(torch.arange(head // 4) / (head // 4)).bfloat16()
    return tensors | norm | {"rope_embed.periods": periods, "mask_token": tensors["mask_token"][0]}


def to_timm(tensors) -> dict[str, torch.Tensor]:
    found = {}
    for name, tensor in to_meta(tensors).items():
        if name.endswith("qkv.bias"):
            query, _, value = tensor.chunk(3)
            found |= {name.replace("qkv.bias", f"{k}_bias"): v for k, v in (("q", query), ("v", value))}
        elif not name.endswith(("bias_mask", "periods", "mask_token")) and "cls_norm" not in name:
            for theirs, ours in (
                ("storage_tokens", "reg_token"), ("ls1.gamma", "gamma_1"), ("ls2.gamma", "gamma_2"),
                ("mlp.w1", "mlp.fc1_g"), ("mlp.w2", "mlp.fc1_x"), ("mlp.w3", "mlp.fc2"),
            ):  # fmt: skip
                name = name.replace(theirs, ours)
            found[name] = tensor
    return found


def _gated(tensors) -> bool:
    return any("gate_proj" in name for name in tensors)


@pytest.mark.parametrize("gated", [False, True])
def test_teacher(gated, tmp_path):
    """The taps of transformers' model, at its own size and at another, and the same arrays from all three."""
    settings = {**VIT, "patch_size": 16, "image_size": 64, "use_gated_mlp": gated}
    settings |= {"hidden_act": "silu"} if gated else {}
    model = random_model(lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**settings)))
    tensors = model.state_dict()
    found = {}
    for name, rename in (("hf", dict), ("meta", to_meta), ("timm", to_timm)):
        save_file({k: v.contiguous() for k, v in rename(tensors).items()}, tmp_path / f"{name}.safetensors")
        heads = None if name == "meta" else 4  # which Meta's periods tell
        found[name] = sources.load(str(tmp_path / f"{name}.safetensors"), name, teacher_heads=heads)
        assert found[name].config == found["hf"].config and found[name].arrays.keys() == found["hf"].arrays.keys()
        for path, array in found[name].arrays.items():
            np.testing.assert_array_equal(array, found["hf"].arrays[path], err_msg=path)
    for size in ((64, 64), (48, 112)):
        x = random(2, *size, 3).astype(np.float32)
        for ours, theirs in zip(run(found["meta"], x), vit_outputs(model, x, 5), strict=True):
            assert error(ours, theirs) < 1e-5


def to_meta_convnext(tensors) -> dict[str, torch.Tensor]:
    tensors = renamed(
        tensors,
        [
            (r"^model\.stages\.(\d)\.downsample_layers", r"downsample_layers.\1"),
            (r"^model\.stages\.(\d)\.layers", r"stages.\1"),
            (r"depthwise_conv", "dwconv"),
            (r"pointwise_conv", "pwconv"),
            (r"\.layer_norm\.", ".norm."),
            (r"^layer_norm", "norm"),
        ],
    )
    return tensors | {f"norms.3.{leaf}": tensors[f"norm.{leaf}"].clone() for leaf in ("weight", "bias")}


def to_timm_convnext(tensors) -> dict[str, torch.Tensor]:
    return renamed(
        tensors,
        [
            (r"^model\.stages\.0\.downsample_layers", "stem"),
            (r"^model\.stages\.(\d)\.downsample_layers", r"stages.\1.downsample"),
            (r"^model\.stages\.(\d)\.layers", r"stages.\1.blocks"),
            (r"depthwise_conv", "conv_dw"),
            (r"pointwise_conv(\d)", r"mlp.fc\1"),
            (r"\.layer_norm\.", ".norm."),
            (r"^layer_norm", "head.norm"),
        ],
    )


@pytest.fixture(scope="module")
def student():
    settings = transformers.DINOv3ConvNextConfig(depths=[1, 1, 2, 1], hidden_sizes=[8, 16, 24, 32])
    return random_model(lambda: transformers.DINOv3ConvNextModel(settings))


def saved(model, rename, place: pathlib.Path) -> str:
    save_file({k: v.contiguous() for k, v in rename(model.state_dict()).items()}, place)
    return str(place)


def as_configured(path: str, **options) -> tuple[ConvNeXtConfig, dict]:
    config = ConvNeXtConfig((1, 1, 2, 1), (8, 16, 24, 32), **options)
    expected = flat.abstract(lambda: ConvNeXt(config, rngs=nnx.Rngs(0)))[1]
    return config, loading.load(path, expected, "student", config)


def test_student(student, tmp_path):
    """The four maps of transformers' model, of which the last alone is normed, and the same arrays from all three."""
    hf, arrays = as_configured(saved(student, dict, tmp_path / "hf.safetensors"), first_norms=False)
    for name, rename in (("meta", to_meta_convnext), ("timm", to_timm_convnext)):
        path = saved(student, rename, tmp_path / f"{name}.safetensors")
        _, found = as_configured(path, first_norms=False)
        assert found.keys() == arrays.keys()
        for key, array in found.items():
            np.testing.assert_array_equal(array, arrays[key], err_msg=key)
    student.save_pretrained(tmp_path / "published")  # with the names of the files on the hub
    assert as_configured(str(tmp_path / "published"), first_norms=False)[1].keys() == arrays.keys()
    converted = sources.load(str(tmp_path / "hf.safetensors"))
    folder.save(tmp_path / "folder", converted)
    again = folder.read(tmp_path / "folder")
    assert again.config == converted.config == hf and again.source == converted.source
    assert all(np.array_equal(again.arrays[k], array) for k, array in converted.arrays.items())
    for size in ((224, 224), (96, 160)):
        x = random(1, *size, 3).astype(np.float32)
        with torch.no_grad():
            outputs = student(nchw(x).float(), output_hidden_states=True)
        *first, last = outputs.hidden_states[-4:]
        expected = [np.moveaxis(b.numpy(), 1, -1) for b in first]
        tokens = outputs.last_hidden_state[:, 1:].numpy()  # the first is their mean
        expected.append(tokens.reshape(1, *last.shape[2:], -1))
        for k, (ours, theirs) in enumerate(zip(run(again, x), expected, strict=True)):
            assert error(ours, theirs) < 1e-5, k


@pytest.mark.parametrize("name, rename", [("hf", dict), ("meta", to_meta_convnext), ("timm", to_timm_convnext)])
def test_a_student_with_the_published_norms(name, rename, student, tmp_path):
    """Under a LayerNorm behind each stage, as KTDA has it, those that no file holds begin without scaling."""
    path = saved(student, rename, tmp_path / f"{name}.safetensors")
    without, with_norms = (as_configured(path, first_norms=first)[1] for first in (False, True))
    new = {f"norms/{k}/{leaf}" for k in range(3) for leaf in ("scale", "bias")}
    assert with_norms.keys() - without.keys() == new
    assert all((with_norms[path] == path.endswith("scale")).all() for path in new)
    folder.save(tmp_path / "converted", sources.load(path))
    for first, arrays in ((False, without), (True, with_norms)):
        assert as_configured(str(tmp_path / "converted"), first_norms=first)[1].keys() == arrays.keys()


def test_norms_that_were_trained_are_not_left_out(student, tmp_path):
    tensors = {k: v for k, v in to_meta_convnext(student.state_dict()).items() if not k.startswith("norms.3")}
    widths = dict(enumerate((8, 16, 24)))
    tensors |= {f"norm{k}.{leaf}": torch.ones(n) for k, n in widths.items() for leaf in ("weight", "bias")}
    path = saved(student, lambda _: tensors, tmp_path / "x.safetensors")
    assert (as_configured(path)[1]["norms/1/bias"] == 1).all()
    with pytest.raises(UserError, match=r"has first_norms True \(config: False\)"):
        as_configured(path, first_norms=False)


def test_what_is_not_as_published_is_one_line(student, tmp_path, given):
    tensors = to_meta_convnext(student.state_dict())
    tensors["norms.3.bias"] = tensors["norms.3.bias"] + 1
    path = saved(student, lambda _: tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"norms.3.bias is another than norm.bias, which it repeats in Meta's files"):
        sources.load(path)
    teacher = published("meta vit", "base")
    for periods in (PERIODS**2, PERIODS * 1.01, np.float32(10) * PERIODS, PERIODS[None]):
        given({**teacher, "rope_embed.periods": periods})
        with pytest.raises(UserError, match="rope_embed.periods goes from .* not in powers of 100 as published"):
            sources.load("x.pth")
    given({**teacher, "rope_embed.periods": PERIODS})
    assert sources.load("x.pth").config.heads == 12
    with pytest.raises(UserError, match="6 heads were asked for, but the weights are of a model with 12"):
        sources.load("x.pth", teacher_heads=6)
    given(published("hf convnext", "tiny"), {"model_type": "dinov3_convnext", "layer_norm_eps": 1e-5})
    with pytest.raises(UserError, match="layer_norm_eps 1e-05 is not what DINOv3's ConvNeXts were published with"):
        sources.load("x")


def test_web_or_satellite(given):
    """No tensor tells: settings beside the file do, then its name, then its folder's; else the preset's count."""
    web, satellite = (ViTConfig(**vit.PRESETS[f"dinov3_large{name}"]) for name in ("", "_sat"))
    timm = {"pretrained_cfg": {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}}
    cases = [
        ("timm vit", "x.safetensors", timm, satellite),
        ("timm vit", "vit_large_patch16_dinov3.lvd1689m/x.safetensors", timm, satellite),
        ("timm vit", "vit_large_patch16_dinov3.sat493m/x.safetensors", {}, satellite),
        ("hf vit", "hf://facebook/dinov3-vitl16-pretrain-sat493m@main", {}, satellite),
        ("meta vit", "sat493m/dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth", {}, web),
        ("meta vit", "/data/sat493m/old/x.pth", {}, web),
        ("meta vit", "lvd1689m_or_sat493m.pth", {}, web),
    ]
    for source, path, beside, config in cases:
        given(published(source, "large"), beside)
        found = sources.load(path)
        told = bool(beside) or "pretrain" in path or "/vit" in f"/{path}"
        assert found.config == config, path
        assert (found.source.get("statistics") == folder.ASSUMED) is not told, path
        assert bool(loading.assumptions(path, found)) is not told, path
