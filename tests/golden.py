"""The reference implementation's numbers (tests/goldens/) and models that hold its weights."""

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT, ViTConfig
from ktda_jax.weights import mmseg
from ktda_jax.weights.architecture import under

GOLDENS = pathlib.Path(__file__).parent / "goldens"


@functools.cache
def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


@functools.cache
def checkpoint(name: str) -> dict[str, np.ndarray]:
    import torch

    tensors = torch.load(GOLDENS / f"{name}.pth", weights_only=True)["state_dict"]
    return {k: v.double().numpy() for k, v in tensors.items()}


def config(name: str, **overrides) -> KTDAConfig:
    spec = json.loads((GOLDENS / f"{name}.json").read_text())["spec"]
    return KTDAConfig(
        num_classes=spec["ncls"],
        student=ConvNeXtConfig(depths=tuple(spec["depths"]), channels=tuple(spec["channels"])),
        teacher=ViTConfig(
            width=spec["tdim"], depth=spec["tlayers"], heads=spec["theads"], image_size=(spec["img"],) * 2
        ),
        fmm=FMMConfig(blocks=spec["fmm_blocks"]),
        head_channels=spec["head_ch"],
        aux_channels=spec["aux_ch"],
        **overrides,
    )


def ours(tensors, expected) -> dict[str, np.ndarray]:
    """Upstream tensors under our paths and in our layout: those that `expected` names."""
    found, unknown = mmseg.from_upstream(tensors)
    assert not unknown
    return {k: v for k, v in found.items() if k in expected}


def models(name: str, dtype=jnp.float32, **overrides) -> tuple[KTDA, ViT]:
    """Student-side model and teacher with the golden weights."""
    configuration = config(name, **overrides)
    common = dict(dtype=dtype, param_dtype=dtype)
    tensors = checkpoint(name)

    graphdef, params, stats = flat.abstract(lambda: KTDA(configuration, **common, rngs=nnx.Rngs(0)))
    found = ours(tensors, {**params, **stats})
    flat.check_shapes(found, {**params, **stats}, name)
    model = flat.merge(graphdef, *({k: jnp.asarray(found[k], dtype) for k in part} for part in (params, stats)))

    graphdef, params, _ = flat.abstract(lambda: ViT(configuration.teacher, **common, rngs=nnx.Rngs(0)))
    found = under(mmseg.from_upstream(tensors)[0], "teacher/")
    flat.check_shapes(found, params, name)
    return model, flat.merge(graphdef, {k: jnp.asarray(found[k], dtype) for k in params}, {})


def relative(a, b) -> float:
    """||a - b|| / ||b||."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
