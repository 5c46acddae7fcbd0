"""Weights of other projects under our paths: `load` for any source, `to_upstream` for the way back."""

import dataclasses
import pathlib
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from ktda_jax import UserError
from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXt
from ktda_jax.models.flat import check_finite
from ktda_jax.models.ktda import KTDA
from ktda_jax.models.vit import ViT
from ktda_jax.weights import architecture, convnext, files, mmseg, vit
from ktda_jax.weights.architecture import under
from ktda_jax.weights.folder import ASSUMED, Weights, describe, described

SOURCES = ("auto", "ktda", "hf", "meta", "timm", "mmpretrain")


def load(
    path: str,
    source: str = "auto",
    *,
    teacher_heads: int | None = None,
    fmm_heads: int | None = None,
) -> Weights:
    """Reads and converts `path`, a file, a Hugging Face folder or hf://ORG/NAME; UserError says what is wrong.

    What `to_upstream` has written says what no tensor tells, whatever heads are given here.
    """
    if source not in SOURCES:
        raise UserError(f"--source is {source!r}; known: {', '.join(SOURCES)}")
    found, origin = files.locate(path)
    tensors, beside, read = files.read(found)
    if "architecture" in (description := _mapping(beside.pop(files.OURS, None))):
        return _described(path, description, tensors, origin | _digests(read))
    kind, layout, tensors = _recognise(files.strip_prefixes(tensors), found)
    if source not in ("auto", layout.split()[0]) and (source, layout) != ("timm", "meta"):
        raise UserError(f"{path} is in the layout {layout}, not {source}; leave --source out to have it recognised")
    new, assumed = [], None
    try:
        if kind == "ktda":
            arrays, unknown = mmseg.from_upstream(tensors)
            config = architecture.ktda(arrays, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
            assumed = architecture.assumed(arrays, config, teacher_heads, fmm_heads)
        elif kind == "teacher":
            arrays, unknown = vit.from_source(tensors, layout)
            dinov3, kernel = "dinov3" in layout, arrays.get("patch_embed/kernel")
            images, said = _images(beside, (path, str(found.absolute())) if dinov3 else ())
            if images and kernel is not None and {len(x) for x in images.values()} != {*kernel.shape[2:3]}:
                images, said = None, ASSUMED  # of other bands
            config = architecture.vit(
                arrays,
                rope=dinov3,
                heads=teacher_heads,
                beside={"num_attention_heads": vit.heads(tensors)} | beside,
                images=images,
            )
            origin |= {"statistics": said} if said else {}
            if dinov3 and images is None and config.bands == 3:
                assumed = {"image statistics": "of web images (of satellites: keep the published name)"}
        else:
            arrays, unknown, new = convnext.from_source(tensors, layout)
            config = architecture.convnext(arrays, beside=beside)
        _check(kind, config, arrays, unknown)
    except (ValueError, IndexError) as error:
        raise UserError(f"{path} ({kind}, {layout} names): {error}") from error
    origin |= {"layout": layout} | _digests(read)
    if new:
        origin["initialised"] = new
    if assumed:
        origin["assumed"] = assumed
    return Weights(kind, config, arrays, origin, assumed=assumed)


def _images(beside: Mapping, paths: tuple[str, ...]) -> tuple[dict | None, str | None]:
    """Mean and standard deviation of a teacher's images, and how they are known, where it is not by its settings."""
    if told := architecture.statistics(beside):
        return told, None
    names = [name for path in paths for name in reversed(pathlib.PurePath(path).parts[-2:])]
    if named := architecture.statistics_by_name(*names):
        return named[0], f"by the name {named[1]}"
    return None, ASSUMED


def _digests(read: list[pathlib.Path]) -> dict:
    return {"sha256": {file.name: files.sha256(file) for file in read}}


def _mapping(value) -> Mapping:
    return value if isinstance(value, Mapping) else {}


def _described(path: str, description: Mapping, tensors: dict, origin: dict) -> Weights:
    """A .pth of our own, whose `meta` holds what our folder's model.json does."""
    try:
        found = described(description, {})
        arrays, unknown = mmseg.from_upstream(tensors, found.config.teacher.grid)
        _check(found.kind, found.config, arrays, unknown)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path} is not as its description says: {str(error).splitlines()[0]}") from error
    return dataclasses.replace(found, arrays=arrays, source=origin | {"layout": "ktda", "written_from": found.source})


def _recognise(tensors: dict, path: pathlib.Path) -> tuple[str, str, dict]:
    """What the names say: (kind, layout, tensors without the prefix of a backbone in a larger model)."""
    if "backbone.downsample_layers.0.0.weight" in tensors and any(k.startswith("fam.") for k in tensors):
        return "ktda", "ktda", tensors
    for prefix in ("", "backbone.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.", "convnext.", "convnextv2."):
        for kind, signatures in (("teacher", vit.SIGNATURES), ("student", convnext.SIGNATURES)):
            for layout, name in signatures.items():
                if prefix + name in tensors:
                    # What lies outside the backbone is a head of classification; one inside stays for the table.
                    inside = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                    return kind, layout, inside
    some = ", ".join(sorted(tensors)[:3])
    raise UserError(
        f"{path} is none of the known layouts (KTDA; DINOv2, DINOv3 and ConvNeXt of Hugging Face, Meta, timm and "
        f"mmpretrain): its {len(tensors)} tensors begin with {some}"
    )


def expected(kind: str, config) -> tuple[dict, dict]:
    """Shapes of a model's parameters and batch statistics; a KTDA's with the teacher's under 'teacher/'."""
    build = {"ktda": KTDA, "teacher": ViT, "student": ConvNeXt}[kind]
    _, params, stats = flat.abstract(lambda: build(config, param_dtype=jnp.float32, rngs=nnx.Rngs(0)))
    if kind == "ktda":
        _, teacher, _ = flat.abstract(lambda: ViT(config.teacher, rngs=nnx.Rngs(0)))
        params = {**params, **{f"teacher/{k}": v for k, v in teacher.items()}}
    return params, stats


def _check(kind: str, config, arrays: dict[str, np.ndarray], unknown: list[str]) -> None:
    """All missing, unexpected and mis-shaped tensors at once."""
    params, stats = expected(kind, config)
    found = {k: v for k, v in arrays.items() if not k.endswith("num_batches_tracked")}
    if kind == "ktda" and not under(arrays, "teacher/"):
        params = {k: v for k, v in params.items() if not k.startswith("teacher/")}
    flat.check_shapes({**found, **{name: np.zeros(()) for name in unknown}}, {**params, **stats}, "it")


def to_upstream(weights: Weights, path: pathlib.Path) -> None:
    """Writes a `.pth` that the published PyTorch code loads; aside first, then renamed."""
    if weights.kind != "ktda":
        raise UserError(f"--to=upstream writes whole KTDA models; this is a {weights.kind}")
    if not weights.config.decoder:
        raise UserError("--to=upstream writes whole KTDA models; this one was distilled without labels: no decoder")
    if weights.config.align_grid:
        raise UserError("--to=upstream: the published code has no FAM on the teacher's grid (config.model.align_grid)")
    if not weights.config.student.first_norms:
        raise UserError(
            "--to=upstream: the published code has a LayerNorm behind each stage of the student, and this one has the "
            "last alone (config.model.student.first_norms)"
        )
    check_finite(weights.arrays, f"what {path} would hold")
    torch = files.import_torch(f"writing {path}")
    try:
        tensors = mmseg.to_upstream(weights.arrays)
    except (ValueError, KeyError) as error:
        raise UserError(f"these weights cannot be named as upstream names them: {error}") from error
    # A copy, since torch cannot hold reversed strides and saves the whole storage behind a view.
    content = {k: torch.from_numpy(np.array(v, order="C")) for k, v in tensors.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save({"meta": {files.OURS: describe(weights)}, "state_dict": content}, temporary)
        temporary.replace(path)
    except RuntimeError as error:
        raise UserError(f"cannot write {path}: {str(error).splitlines()[0]}") from error
    finally:
        temporary.unlink(missing_ok=True)
