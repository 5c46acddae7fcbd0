"""Writes dinov3_names.json: names and shapes of every published DINOv3 model, as those who publish them build it.

    python dinov3_names.py dinov3.hub.backbones

with Meta's repository (or a copy of it, under its own module name) in the path, timm and transformers. Models are built
on torch's meta device, without weights. Each tensor is a line by model, [blocks, *shape]: 12 blocks have the tensor
`blocks.{}.attn.qkv.weight` of one shape, and all others are there once, [1, *shape]. An empty list: not in that model.
"""

import importlib
import json
import pathlib
import re
import sys

import timm
import torch
import transformers

BLOCK = re.compile(r"((?:.*\.)?(?:blocks|layers?|stages\.\d))\.(\d+)\.(.*)")
VITS = ("small", "small_plus", "base", "large", "large_sat", "huge_plus", "7b", "7b_sat")
SIZES = ("tiny", "small", "base", "large")
WIDTHS = {"small": 384, "base": 768, "large": 1024, "huge": 1280, "7b": 4096}
DEPTHS = {"large": 24, "huge": 32, "7b": 40}


def of_meta(hub, name: str) -> torch.nn.Module:
    size = name.removesuffix("_sat")
    short = {"small": "vits16", "base": "vitb16", "large": "vitl16", "huge": "vith16", "7b": "vit7b16"}
    build = "dinov3_" + short[size.removesuffix("_plus")] + ("plus" if size.endswith("_plus") else "")
    weights = hub.Weights.SAT493M if name.endswith("_sat") else hub.Weights.LVD1689M
    return getattr(hub, build)(pretrained=False, weights=weights)


def of_timm(name: str, suffix: str = "") -> torch.nn.Module:
    size, data = name.removesuffix("_sat"), "sat493m" if name.endswith("_sat") else "lvd1689m"
    return timm.create_model(f"vit_{size}_patch16_dinov3{suffix}.{data}")


def of_transformers(name: str) -> torch.nn.Module:
    """With the settings of the config.json that is published with each."""
    size = name.removesuffix("_sat").removesuffix("_plus")
    width, gated = WIDTHS[size], "_plus" in name or size == "7b"
    biases = dict(query_bias=False, value_bias=False) if size == "7b" else {}
    config = transformers.DINOv3ViTConfig(
        hidden_size=width, num_hidden_layers=DEPTHS.get(size, 12), use_gated_mlp=gated, num_register_tokens=4,
        num_attention_heads=32 if size == "7b" else width // 64, intermediate_size=(2 if size == "7b" else 4) * width,
        **biases,
    )  # fmt: skip
    return transformers.DINOv3ViTModel(config)


def of_transformers_convnext(hub, size: str) -> torch.nn.Module:
    model = getattr(hub, f"dinov3_convnext_{size}")(pretrained=False)
    depths = [len(stage) for stage in model.stages]
    config = transformers.DINOv3ConvNextConfig(depths=depths, hidden_sizes=model.embed_dims)
    return transformers.DINOv3ConvNextModel(config)


def table(models: dict[str, torch.nn.Module]) -> dict:
    rows = {}
    for place, model in enumerate(models.values()):
        for name, tensor in model.state_dict().items():
            blocks, match = 1, BLOCK.fullmatch(name)
            if match:
                name, blocks = f"{match[1]}.{{}}.{match[3]}", int(match[2]) + 1
            row = rows.setdefault(name, [[] for _ in models])
            if blocks > 1 and row[place] and row[place] != [blocks - 1, *tensor.shape]:
                raise ValueError(f"{name} has other shapes in other blocks")
            row[place] = [blocks, *tensor.shape]
    return {"models": list(models), "tensors": rows}


def compact(value) -> str:
    return json.dumps(value, separators=(",", ":"))


def main() -> None:
    hub = importlib.import_module(sys.argv[1])
    with torch.device("meta"):
        found = {
            "meta vit": table({name: of_meta(hub, name) for name in VITS}),
            "timm vit": table({name: of_timm(name) for name in VITS}),
            "timm vit, biases": table({name: of_timm(name, "_qkvb") for name in VITS if "7b" not in name}),
            "hf vit": table({name: of_transformers(name) for name in VITS}),
            "meta convnext": table({s: getattr(hub, f"dinov3_convnext_{s}")(pretrained=False) for s in SIZES}),
            "timm convnext": table({size: timm.create_model(f"convnext_{size}.dinov3_lvd1689m") for size in SIZES}),
            "hf convnext": table({size: of_transformers_convnext(hub, size) for size in SIZES}),
        }
    lines = [f' "made with": "timm {timm.__version__}, transformers {transformers.__version__}"']
    for source, content in found.items():
        rows = [f"{compact(name)}:{compact(shapes)}" for name, shapes in content["tensors"].items()]
        body = ",\n".join(rows)
        lines.append(f' {compact(source)}: {{"models": {compact(content["models"])}, "tensors": {{\n{body}\n }}}}')
    path = pathlib.Path(__file__).with_suffix(".json")
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
