"""Evaluation of a split: one compiled step per label size, one confusion matrix over the whole set."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ktda_jax import sharding
from ktda_jax.data.datasets import DatasetInfo
from ktda_jax.figures import plots, sheets
from ktda_jax.metrics.confusion import Metrics, best_constant, confusion_matrix, count, format_table, summarize
from ktda_jax.models.flat import Arrays, merge
from ktda_jax.models.ktda import full_size

SAMPLES = 6  # tiles kept for the figure


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result over a split; `samples` are dicts of image, label, prediction, name of the first tiles."""

    confusion: np.ndarray  # (C, C) int64, rows are labels
    metrics: Metrics
    samples: list[dict]


def make_eval_step(
    graphdef: nnx.GraphDef,
    num_classes: int,
    mesh: Mesh,
    encoder: nnx.GraphDef | None = None,
    compiler_options: dict | None = None,
) -> Callable:
    """(params, batch_stats, batch[, frozen]) -> confusion matrix (C, C) of the batch and predictions (B, H, W) uint8.

    `encoder` is the structure of a frozen one that the model needs, `frozen` its arrays.
    """

    def eval_step(
        params: Arrays, stats: Arrays, batch: dict, frozen: Arrays | None = None
    ) -> tuple[jax.Array, jax.Array]:
        needed = {} if encoder is None else {"teacher": merge(encoder, frozen, {})}
        logits = merge(graphdef, params, stats)(batch["image"], **needed).logits
        predictions = jnp.argmax(full_size(logits, batch["label"].shape[1:3]), axis=-1).astype(jnp.uint8)
        return confusion_matrix(batch["label"], predictions, num_classes, batch["mask"]), predictions

    out = (sharding.replicated(mesh), sharding.batch_sharding(mesh))
    return jax.jit(eval_step, out_shardings=out, compiler_options=compiler_options)


def evaluate(
    eval_step: Callable,
    params: Arrays,
    stats: Arrays,
    batches: Iterable[dict],
    mesh: Mesh,
    *,
    num_classes: int,
    frozen: Arrays | None = None,
) -> Evaluation:
    """Runs over this process's share of `batches`; the confusion matrix is that of all processes.

    `frozen`: the arrays of an encoder that is not in the train state.
    """
    total = np.zeros((num_classes, num_classes), np.int64)
    samples, pending = [], None
    needed = () if frozen is None else (frozen,)
    for batch in batches:
        arrays = {k: batch[k] for k in ("image", "label", "mask")}
        confusion, predictions = eval_step(params, stats, sharding.to_global(mesh, arrays), *needed)
        if len(samples) < SAMPLES:
            local = sharding.local_rows(predictions)
            for row in np.flatnonzero(batch["mask"])[: SAMPLES - len(samples)]:
                sample = {k: batch[k][row] for k in ("image", "label", "name")}
                samples.append(sample | {"prediction": local[row]})
        # Fetched one batch late, so that the device works while the host decodes.
        if pending is not None:
            total += np.asarray(pending, np.int64)
        pending = confusion
    if pending is not None:
        total += np.asarray(pending, np.int64)
    return Evaluation(total, summarize(total), samples)


def table(result: Evaluation, classes: tuple[str, ...]) -> str:
    scores = format_table(result.metrics, classes)
    return f"{scores}\nbest constant prediction: mIoU {best_constant(result.confusion):.2f}"


def write_report(
    result: Evaluation, workdir: pathlib.Path, name: str, info: DatasetInfo, rgb: tuple[int, int, int] = (0, 1, 2)
) -> None:
    """Writes `figures/<name>_{confusion,samples}.png` and `figures/<name>.json`.

    `rgb`: the bands of the images that are shown.
    """
    folder = workdir / "figures"
    plots.save_confusion(folder / f"{name}_confusion.png", result.confusion, info.classes)
    samples = [_same_size(s | {"image": s["image"][..., list(rgb)]}) for s in result.samples]
    sheets.save_triptychs(
        folder / f"{name}_samples.png",
        *([s[key] for s in samples] for key in ("image", "label", "prediction")),
        info.classes,
        info.palette,
        names=[s["name"] for s in samples],
        scores=[_tile_score(s, len(info.classes)) for s in samples],
    )
    per_class = {k: [None if np.isnan(x) else x for x in v] for k, v in result.metrics.per_class.items()}
    values = {
        "summary": {k: None if np.isnan(v) else v for k, v in result.metrics.summary.items()},
        "per_class": per_class,
        "classes": list(info.classes),
        "confusion": result.confusion.tolist(),
    }
    temporary = folder / f".{name}.json.tmp"
    temporary.write_text(json.dumps(values, indent=1) + "\n")
    os.replace(temporary, folder / f"{name}.json")


def _tile_score(sample: dict, num_classes: int) -> float:
    return summarize(count(sample["label"], sample["prediction"], num_classes)).summary["mIoU"]


def _same_size(sample: dict) -> dict:
    """The image at the label's size: evaluation resizes it to the crop."""
    height, width = sample["label"].shape
    rows = np.arange(height) * sample["image"].shape[0] // height
    columns = np.arange(width) * sample["image"].shape[1] // width
    return sample | {"image": sample["image"][rows][:, columns]}
