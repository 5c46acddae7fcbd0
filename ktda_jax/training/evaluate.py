"""Evaluation of a split: one confusion matrix over the whole set, counted on the device or of tiles as mapped."""

import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ktda_jax import sharding
from ktda_jax.data import buckets
from ktda_jax.data.datasets import DatasetInfo
from ktda_jax.figures import plots, sheets
from ktda_jax.figures import trust as figures
from ktda_jax.metrics import by_tile
from ktda_jax.metrics.confusion import Metrics, best_constant, confusion_matrix, count, format_table, summarize
from ktda_jax.models.flat import Arrays, merge
from ktda_jax.models.ktda import full_size
from ktda_jax.training.predicted import Predictor
from ktda_jax.training.trust import Sums, Trust, as_json, in_words

SAMPLES = 6  # tiles kept for the figure
CURVES = 20  # classes whose precision and recall are drawn, at most


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Result over a split; `samples` are dicts of image, label, prediction, name of the first tiles."""

    confusion: np.ndarray  # (C, C) int64, rows are labels
    metrics: Metrics
    samples: list[dict]
    trust: Trust | None = None  # where it was asked for


def make_eval_step(
    graphdef: nnx.GraphDef,
    num_classes: int,
    mesh: Mesh,
    encoder: nnx.GraphDef | None = None,
    compiler_options: dict | None = None,
) -> Callable:
    """(params, batch_stats, batch[, frozen]) -> of each row its confusion matrix (B, C, C), predictions (B, H, W) uint8
    and, with `probabilities=True`, those (B, C, H, W) float32, else None.

    `encoder` is the structure of a frozen one that the model needs, `frozen` its arrays.
    """

    def eval_step(
        params: Arrays, stats: Arrays, batch: dict, frozen: Arrays | None = None, *, probabilities=False
    ) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        needed = {} if encoder is None else {"teacher": merge(encoder, frozen, {})}
        logits = merge(graphdef, params, stats)(batch["image"], **needed).logits
        logits = full_size(logits, batch["label"].shape[1:3])
        predictions = jnp.argmax(logits, axis=-1).astype(jnp.uint8)
        rows = (x[:, None] for x in (batch["label"], predictions, batch["mask"]))
        confusions = jax.vmap(lambda label, found, mask: confusion_matrix(label, found, num_classes, mask))(*rows)
        values = jnp.transpose(jax.nn.softmax(logits, -1), (0, 3, 1, 2)) if probabilities else None
        return confusions, predictions, values

    out, options = sharding.batch_sharding(mesh), dict(compiler_options=compiler_options)
    return jax.jit(sharding.on_mesh(mesh, eval_step), out_shardings=out, static_argnames="probabilities", **options)


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
        confusions, predictions, _ = eval_step(params, stats, sharding.to_global(mesh, arrays), *needed)
        if len(samples) < SAMPLES:
            local = sharding.local_rows(predictions)
            for row in np.flatnonzero(batch["mask"])[: SAMPLES - len(samples)]:
                sample = {k: batch[k][row] for k in ("image", "label", "name")}
                samples.append(sample | {"prediction": local[row]})
        # Fetched one batch late, so that the device works while the host decodes.
        if pending is not None:
            total += sharding.local_rows(pending).sum(0, dtype=np.int64)
        pending = confusions
    if pending is not None:
        total += sharding.local_rows(pending).sum(0, dtype=np.int64)
    total = sharding.sum_of_processes(total)
    return Evaluation(total, summarize(total), samples)


def evaluate_tiles(
    predictor: Predictor, tiles: Iterable[dict], params: Arrays, stats: Arrays, frozen: Arrays | None = None,
    *, trust=False,
) -> Evaluation:  # fmt: skip
    """The same tile by tile, each on one process, whose `samples` are its own; with `trust`, what `Sums` tells.

    tiles: data.pipeline's `EvalTiles` or `EvalBatches`.
    """
    classes = predictor.model.classes
    total, samples = np.zeros((classes, classes), np.int64), []
    sums = Sums(tiles.count, classes) if trust else None
    for found in predictor(tiles, params, stats, frozen, probabilities=trust):
        total += found.confusion
        if len(samples) < SAMPLES:
            samples.append({k: getattr(found, k) for k in ("image", "label", "prediction", "name")})
        if sums is not None:
            sums.add(found)
    total = sharding.sum_of_processes(total)
    return Evaluation(total, summarize(total), samples, None if sums is None else sums.result())


def table(result: Evaluation, classes: tuple[str, ...], tiles: str = "tiles") -> str:
    """For the terminal; `tiles`: what they are called."""
    scores = format_table(result.metrics, classes)
    more = "" if result.trust is None else f"\n{in_words(result.trust, tiles)}"
    return f"{scores}\nbest constant prediction: mIoU {best_constant(result.confusion):.2f}{more}"


def write_report(
    result: Evaluation, workdir: pathlib.Path, name: str, info: DatasetInfo, rgb: tuple[int, int, int] = (0, 1, 2),
    about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Writes `figures/<name>_{confusion,samples}.png`, `figures/<name>.json` and, as a table, `figures/<name>.csv`;
    and where trust was asked for, `<name>_{reliability,precision_recall}.png`.

    `rgb`: the bands of the images that are shown. `about`: what the .json says besides.
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
    if result.trust is not None:
        figures.save_reliability(
            folder / f"{name}_reliability.png", result.trust.before, result.trust.after,
            names=("as predicted", "each half by the other's"),
        )  # fmt: skip
        if len(info.classes) <= CURVES:
            curves = result.trust.precision, result.trust.recall, result.trust.average_precision / 100
            figures.save_precision_recall(folder / f"{name}_precision_recall.png", *curves, info.classes, info.palette)
    write_scores(result, folder, name, info.classes, about)


def write_scores(
    result: Evaluation, folder: pathlib.Path, name: str, classes: tuple[str, ...],
    about: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """`<name>.json`, as a table `<name>.csv`, and with trust `<name>_tiles.csv`: the confusion matrix of each tile.

    `about`: what the first says besides.
    """
    per_class = {k: [None if np.isnan(x) else x for x in v] for k, v in result.metrics.per_class.items()}
    values = {
        **(about or {}),
        "summary": {k: None if np.isnan(v) else v for k, v in result.metrics.summary.items()},
        "per_class": per_class,
        "classes": list(classes),
        "confusion": result.confusion.tolist(),
    }
    if result.trust is not None:
        values |= as_json(result.trust)
        if result.trust.confusions is not None:
            _write(folder / f"{name}_tiles.csv", by_tile.to_csv(result.trust.confusions))
    _write(folder / f"{name}.json", json.dumps(values, indent=1) + "\n")
    _write(folder / f"{name}.csv", as_csv(result, classes))


def _write(path: pathlib.Path, text: str) -> None:
    with buckets.aside(path) as temporary:
        temporary.write_text(text)


def as_csv(result: Evaluation, classes: tuple[str, ...]) -> str:
    """A row per class and one of the means, in percent; empty where a score has no pixels to stand on."""
    trust, columns, means = result.trust, dict(result.metrics.per_class), {}
    means = {k: result.metrics.summary[f"m{k}"] for k in columns}
    columns["pixels"], means["pixels"] = result.confusion.sum(1), result.confusion.sum()
    if trust is not None:
        columns |= {"IoU_low": trust.intervals[:, 0], "IoU_high": trust.intervals[:, 1]}
        means |= dict(zip(("IoU_low", "IoU_high"), trust.interval, strict=True))
        columns |= {"boundary_IoU": trust.boundary, "average_precision": trust.average_precision}
        means |= {"boundary_IoU": trust.boundary_mean, "average_precision": np.nan}
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(("class", *columns))
    for name, row in (*zip(classes, zip(*columns.values(), strict=True), strict=True), ("mean", means.values())):
        writer.writerow((name, *("" if np.isnan(v) else round(float(v), 4) for v in row)))
    return file.getvalue()


def _tile_score(sample: dict, num_classes: int) -> float:
    return summarize(count(sample["label"], sample["prediction"], num_classes)).summary["mIoU"]


def _same_size(sample: dict) -> dict:
    """The image at the label's size: evaluation resizes it to the crop."""
    height, width = sample["label"].shape
    rows = np.arange(height) * sample["image"].shape[0] // height
    columns = np.arange(width) * sample["image"].shape[1] // width
    return sample | {"image": sample["image"][rows][:, columns]}
