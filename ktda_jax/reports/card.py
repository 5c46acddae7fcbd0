"""A model card, README.md of a model on Hugging Face's hub: what it maps, on what it was trained, and how well.

The front matter is as `huggingface_hub.ModelCardData` checks and writes it. What the weights' source does not tell, the
card says it does not know.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.data import buckets
from ktda_jax.data.datasets import DATASETS
from ktda_jax.models import flat
from ktda_jax.reports import citations
from ktda_jax.training.trust import FILE as CALIBRATION
from ktda_jax.weights.files import HUB
from ktda_jax.weights.folder import Weights

LIBRARY = "ktda_jax"
PUBLISHED = {name: "XavierJiezou/ktda-datasets" for name in ("grass", "l8_biome")}  # of our data sets, on the hub
ROLES = {"train": "trained on", "val": "chose the checkpoint", "test": "held back for the score"}


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of one split, as figures/SPLIT.json has them, in percent."""

    split: str
    scale: str | None  # in words; None where it was not recorded
    chosen: bool  # whether this split chose the checkpoint
    values: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Training:
    """What a workdir tells of the training beside its weights."""

    settings: Settings
    run: dict[str, Any]  # run.json
    scores: list[Scores]
    calibration: dict[str, Any]  # calibration.json, of this checkpoint; empty without


def training(workdir: pathlib.PurePath, step: int) -> Training:
    """Of the checkpoint of a step: scores of other ones are left out."""
    settings = records.read(workdir)
    calibration = _json(workdir / CALIBRATION)
    calibration = calibration if calibration.get("step") == step else {}
    finals = {}
    for line in _text(workdir / "metrics.jsonl").splitlines():
        if '"split"' in line:
            row = json.loads(line)
            finals[row["split"]] = row
    scores = []
    for split, row in sorted(finals.items()):
        values = _json(workdir / "figures" / f"{split}.json")
        known = values.get("step", row["step"] if _same(row, values) else None)  # older ones do not say their step
        if values.get("per_class") and known == step:
            scores.append(Scores(split, values.get("scale"), split == settings.data.validation, values))
    return Training(settings, _json(workdir / records.RUN), scores, calibration)


def _same(row: dict, values: dict) -> bool:
    return row.get("final/mIoU") == values.get("summary", {}).get("mIoU")


def _text(path: pathlib.PurePath) -> str:
    try:
        return buckets.read_text(path)
    except buckets.Unreachable:
        raise
    except OSError:
        return ""


def _json(path: pathlib.PurePath) -> dict:
    try:
        found = json.loads(_text(path))
    except ValueError:  # none, or cut short
        return {}
    return found if isinstance(found, dict) else {}


def render(found: Weights, name: str, trained: Training | None, licence: str | None) -> str:
    """README.md of the model `found`, called `name`. licence: as the hub names them; None: yet to be filled in."""
    sections = {
        "Use": _use(found), "Classes": _classes(found), "Images": _images(found), "Data": _data(found, trained),
        "Scores": _scores(found, trained), "Probabilities": _probabilities(found, trained),
        "Training": _training(found, trained), "Licence": _licence(licence), "Citation": _citation(found, trained),
    }  # fmt: skip
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    count = flat.count(found.arrays)
    intro = (
        f"Semantic segmentation of remote sensing images into {found.config.num_classes} classes by KTDA "
        f"([arXiv:2412.06664](https://arxiv.org/abs/2412.06664)) in JAX: {count / 1e6:.1f} M values."
    )
    return f"---\n{_front_matter(found, name, trained, licence).to_yaml()}\n---\n\n# {name}\n\n{intro}\n\n{body}\n"


def _front_matter(found: Weights, name: str, trained: Training | None, licence: str | None) -> ModelCardData:
    data, page = (found.data or {}).get("name"), PUBLISHED.get(_base(found))
    results = [
        EvalResult(
            task_type="image-segmentation", dataset_type=page or data, dataset_name=data,
            dataset_split=scores.split, metric_type=kind, metric_name=f"{metric} (%)", metric_value=round(value, 4),
        )
        for scores in (trained.scores if trained else ())
        for metric, kind in {"mIoU": "mean_iou", "aAcc": "accuracy"}.items()
        if (value := scores.values["summary"].get(metric)) is not None
    ]  # fmt: skip
    networks = ["convnext"] if found.config.encoder != "teacher" else []
    return ModelCardData(
        license=licence or "unknown",
        pipeline_tag="image-segmentation",
        library_name=LIBRARY,
        tags=["semantic-segmentation", "remote-sensing", "jax", "flax", "ktda", *networks],
        datasets=page and [page],
        metrics=["mean_iou", "accuracy"] if results else None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def _base(found: Weights) -> str | None:
    """l8_biome of l8_biome/scenes; None for a set that only bears the name of one of ours: its classes are others."""
    name = (found.data or {}).get("name", "").split("/")[0]
    return name if name in DATASETS and DATASETS[name].classes == found.classes else None


def _use(found: Weights) -> str:
    bands = found.config.student.bands
    image = '"tile.tif"' if bands == 3 else "image"
    given = "" if bands == 3 else f"  # image: uint8 (H, W, {bands}), stretched as below"
    return (
        "```python\nimport ktda_jax\n\n"
        'model = ktda_jax.load_pretrained("hf://ORG/NAME")  # where this folder was uploaded to, or the folder itself\n'
        f"result = model.predict({image}){given}\n```\n\n"
        f"`result.labels` are (H, W), `result.probabilities` (H, W, {found.config.num_classes}). Scenes of any size "
        "become maps in their place by `python -m ktda_jax.predict --checkpoint=hf://ORG/NAME --input=scene.tif "
        "--output=map.tif`."
    )


def _classes(found: Weights) -> str:
    if found.classes is None:
        return f"{found.config.num_classes}, numbered from 0. The weights came without names and colours."
    colours = found.palette or (None,) * len(found.classes)
    rows = [
        (str(number), name, "not known" if colour is None else f"`#{bytes(colour).hex()}` {tuple(colour)}")
        for number, (name, colour) in enumerate(zip(found.classes, colours, strict=True))
    ]
    return f"{_table(('number', 'class', 'colour (red, green, blue)'), rows)}\n\n255 in a map: no data."


def _images(found: Weights) -> str:
    bands, data = found.config.student.bands, found.data
    if data is None:
        return f"{bands} bands of 8 bits. How the training read its images is not known: neither bands nor stretch."
    crop = " x ".join(map(str, data["crop"]))
    lines = [
        f"Bands: {', '.join(map(str, data['bands']))} of the file, counted from 1"
        if data["bands"]
        else "Bands: red, green, blue",
        f"Stretch: {_stretch(data['scale'])}",
        "Without data: " + ("what the file says" if data["nodata"] is None else f"{data['nodata']:g}"),
        f"Trained on crops of {crop} px (height x width)",
    ]
    if bands != 3 or found.config.rgb != (0, 1, 2):
        lines.insert(1, f"Red, green, blue among them: positions {', '.join(map(str, found.config.rgb))}, from 0")
    return "\n".join(f"- {line}" for line in lines)


def _stretch(scale) -> str:
    if scale is None:
        return "none, 8-bit values as they are stored"
    pairs = scale if isinstance(scale[0], Sequence) else (scale,)
    return "; ".join(f"{low:g} to {high:g}" for low, high in pairs) + " become 0 to 255" + (
        ", band by band" if len(pairs) > 1 else ""
    )  # fmt: skip


def _data(found: Weights, trained: Training | None) -> str:
    name = (found.data or {}).get("name")
    if name is None:
        return "Not known: the weights came without a record of what they were trained on."
    lines, known = [f"`{name}`"], DATASETS.get(_base(found))
    if known is not None:
        lines[0] += f": {known.description}"
        lines += [f"Licence of the data: {known.license}"] if known.license else []
    if trained is None:
        return "\n\n".join([*lines, "Its splits are not known: the weights came without their training's record."])
    data, run = trained.settings.data, trained.run
    prints, tiles, rows = run.get("data", {}), run.get("tiles", {}), []
    splits = {"train": data.train_split, "val": data.validation, "test": data.test_split}
    for role, digest in prints.items():
        count = f"{tiles[role]:,}" if role in tiles else "not recorded"
        rows.append((splits.get(role) or role, ROLES.get(role, ""), count, f"`{digest}`"))
    if rows:
        lines.append(_table(("split", "role", "tiles", "fingerprint"), rows))
    return "\n\n".join(lines)


def _scores(found: Weights, trained: Training | None) -> str:
    if trained is None:
        return "Not known: the weights came without their training's record."
    if not trained.scores:
        return "None: this checkpoint was not evaluated (`python -m ktda_jax.main --mode=eval` does that)."
    return "\n\n".join(_of_split(scores) for scores in trained.scores)


def _of_split(scores: Scores) -> str:
    values, means = scores.values, scores.values["summary"]
    columns = values["per_class"]
    intervals = values.get("intervals") or [None] * len(values["classes"])
    pixels = [sum(row) for row in values["confusion"]]
    rows = [
        (name, *(_percent(columns[metric][k]) for metric in columns), _interval(intervals[k]), f"{pixels[k]:,}")
        for k, name in enumerate(values["classes"])
    ]
    mean = "mean", *(_percent(means.get(f"m{metric}")) for metric in columns), _interval(values.get("interval"))
    heads = ("class", *columns, "IoU, 95 % of draws", "pixels")
    scale = f"Tiles {scores.scale}." if scores.scale else "At which scale was not recorded."
    chosen = " This split chose the checkpoint, which flatters it." if scores.chosen else ""
    lines = [
        f"### `{scores.split}`: mIoU {_percent(means.get('mIoU'))} %, pixel accuracy {_percent(means.get('aAcc'))} %",
        f"In percent. {scale}{chosen}",
        _table(heads, [*rows, (*mean, f"{sum(pixels):,}")]),
    ]
    if values.get("interval"):
        lines.append("The bounds are those of 95 % of draws of the tiles with replacement (bootstrap).")
    if values.get("boundary_miou") is not None:
        lines.append(f"mIoU of boundaries: {_percent(values['boundary_miou'])} %.")
    return "\n\n".join(lines)


def _probabilities(found: Weights, trained: Training | None) -> str:
    if found.temperature == 1 and trained is None:
        return "Whether they can be believed is not known: no temperature came with the weights."
    calibration = trained.calibration if trained else {}
    told = ""
    if (error := calibration.get("error")) is not None:
        told = f" On `{calibration.get('split')}` the calibration error is {error:.2f} % without a temperature"
        after = calibration.get("error_with_temperature")
        told += "." if after is None else f", and {after:.2f} % with one (each half of the tiles by the other's)."
    if found.temperature == 1:
        return f"As the network gives them; no temperature was fitted, or it made them no better.{told}"
    return f"Logits are divided by the temperature {found.temperature:.4g}, which the weights bring with them.{told}"


def _training(found: Weights, trained: Training | None) -> str:
    if trained is None:
        assumed = ", ".join(f"{name} {value}" for name, value in (found.source.get("assumed") or {}).items())
        line = f"Not known. The weights' origin: {_origin(found.source)}."
        return line + (f" They do not say all of their model; assumed as published: {assumed}." if assumed else "")
    settings, run = trained.settings, trained.run
    weights, versions = settings.weights, run.get("versions", {})
    given = [
        f"{part} from `{told(path)}`" if path else f"{part} from random weights"
        for part, path, used in (
            ("student", weights.student, not settings.encodes and weights.model is None),
            ("whole model", weights.model, weights.model is not None),
        )
        if used
    ]
    given += [_teacher(settings)] if settings.encodes or settings.distill else []
    lines = [
        f"Step {found.source.get('step')} of {settings.total_steps:,}, the best by `{settings.data.validation}`; "
        f"batches of {settings.batch_size}, AdamW, learning rate {settings.optimizer.lr:g}, seed {settings.seed}",
        f"Weights: {', '.join(given)}",
    ]
    if versions:
        lines.append("Versions: " + ", ".join(f"{package} {version}" for package, version in sorted(versions.items())))
    return "\n".join(f"- {line}" for line in lines)


def _teacher(settings: Settings) -> str:
    if settings.model.teacher.foreign is not None:
        return f"teacher {settings.model.teacher.foreign}, by its features (cite its authors, too)"
    if settings.weights.teacher is not None:
        return f"teacher from `{told(settings.weights.teacher)}`"
    stored = settings.teacher.mode == "precomputed"
    return "teacher by precomputed features, whose record names it" if stored else "teacher from random weights"


def told(path: str) -> str:
    """A source as others may read it: of a path on this machine its last part."""
    return path if path.startswith(HUB) else path.rstrip("/").split("/")[-1]


def _origin(source: dict[str, Any]) -> str:
    where = source.get("workdir") or source.get("path") or source.get("hub")
    step = f", step {source['step']}" if "step" in source else ""
    digests = source.get("sha256")
    sums = [f"sha256 `{digest}`" for digest in digests.values()] if isinstance(digests, dict) else []
    return ", ".join([f"`{told(str(where))}`{step}" if where else "not recorded", *sums])


def _licence(licence: str | None) -> str:
    if licence is not None:
        return f"`{licence}`, of the weights."
    return (
        "**To be filled in** by whoever publishes these weights, here and as `license:` at the top of this file "
        "(`--license=...` of `ktda_jax.export` does both). The data and the pretrained weights have terms of their own."
    )


def _citation(found: Weights, trained: Training | None) -> str:
    taught = trained is None or trained.settings.distill or trained.settings.encodes
    entries = "\n\n".join(citations.of_model(found.config, taught=taught))
    return f"```bibtex\n{entries}\n```"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("<", "&lt;") for cell in line) + " |" for line in lines
    )


def _percent(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.2f}"


def _interval(bounds: Sequence[float | None] | None) -> str:
    return "–" if not bounds or None in bounds else f"{bounds[0]:.2f} to {bounds[1]:.2f}"
