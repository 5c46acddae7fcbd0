"""Whole-set scores equal a plain count over the tiles, whatever the batches, label sizes and meshes."""

import json
from typing import NamedTuple

import cv2
import jax
import numpy as np
import pytest
import runs
from flax import nnx

import ktda_jax
from ktda_jax import sharding
from ktda_jax.data import pipeline
from ktda_jax.data.datasets import IGNORE, dataset_info
from ktda_jax.data.sources import FolderSource
from ktda_jax.metrics.confusion import summarize
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.training import evaluate, loop
from ktda_jax.training.program import build
from ktda_jax.weights import folder

CROP = (32, 48)


class Logits(NamedTuple):
    logits: jax.Array


class Pooled(nnx.Module):
    """A linear classifier of the mean colour of 4 x 4 pixels: logits at a quarter of the resolution."""

    def __init__(self, rngs):
        self.head = nnx.Linear(3, runs.CLASSES, rngs=rngs)

    def __call__(self, images):
        batch, height, width, _ = images.shape
        blocks = images.reshape(batch, height // 4, 4, width // 4, 4, 3).astype(np.float32)
        return Logits(self.head(blocks.mean((2, 4)) / 255))


@pytest.fixture
def source(tmp_path):
    """Eleven tiles with labels of three sizes and some ignored pixels."""
    rng = np.random.default_rng(1)
    for number, size in enumerate([(32, 48)] * 5 + [(40, 64)] * 3 + [(50, 50)] * 3):
        label = rng.integers(0, runs.CLASSES, size)
        label[rng.random(size) < 0.2] = IGNORE
        runs.write_tile(tmp_path, "val", f"t{number:02}", rng.integers(0, 256, (*size, 3)), label)
    return FolderSource(tmp_path, "val", num_classes=runs.CLASSES)


def run(source, *, batch_size, data=1, fsdp=1, **processes):
    mesh = sharding.make_mesh(data, fsdp)
    graphdef, params, stats = flat.split(Pooled(nnx.Rngs(0)))
    step = evaluate.make_eval_step(graphdef, runs.CLASSES, mesh)
    batches = pipeline.eval_batches(source, crop=CROP, batch_size=batch_size, num_threads=1, **processes)
    params = jax.device_put(params, sharding.tree_shardings(mesh, params))
    return evaluate.evaluate(step, params, stats, batches, mesh, num_classes=runs.CLASSES)


def plain_count(source) -> np.ndarray:
    """Tile by tile in numpy and OpenCV, which resizes bilinearly with the same half-pixel centres."""
    _, params, _ = flat.split(Pooled(nnx.Rngs(0)))
    kernel, bias = (np.asarray(params[f"head/{k}"]) for k in ("kernel", "bias"))
    confusion = np.zeros((runs.CLASSES, runs.CLASSES), np.int64)
    for tile in source:
        image = cv2.resize(tile["image"], CROP[::-1]).astype(np.float32)
        blocks = image.reshape(CROP[0] // 4, 4, CROP[1] // 4, 4, 3).mean((1, 3)) / 255
        height, width = tile["label"].shape
        prediction = cv2.resize(blocks @ kernel + bias, (width, height)).argmax(-1)
        for true, predicted in zip(tile["label"].ravel(), prediction.ravel(), strict=True):
            if true != IGNORE:
                confusion[true, predicted] += 1
    return confusion


def test_padded_batches_count_every_pixel_once(source):
    result = run(source, batch_size=4)
    labels = np.concatenate([tile["label"].ravel() for tile in source])
    expected = np.bincount(labels, minlength=256)[: runs.CLASSES]
    np.testing.assert_array_equal(result.confusion.sum(1), expected)  # 11 tiles in three batches of 4, 2 padded
    plain = plain_count(source)
    # Rounding may flip a pixel on the border of two classes.
    assert np.abs(result.confusion - plain).sum() <= 2e-3 * plain.sum()
    assert result.metrics.summary["mIoU"] == pytest.approx(summarize(plain).summary["mIoU"], abs=0.05)


@pytest.mark.parametrize("data, fsdp", [(8, 1), (2, 4)])
def test_a_sharded_evaluation_is_that_of_one_device(source, data, fsdp):
    one, many = run(source, batch_size=8), run(source, batch_size=8, data=data, fsdp=fsdp)
    np.testing.assert_array_equal(one.confusion, many.confusion)
    for a, b in zip(one.samples, many.samples, strict=True):
        assert a["name"] == b["name"]
        np.testing.assert_array_equal(a["prediction"], b["prediction"])


def test_samples_are_the_first_tiles_with_their_own_predictions(source):
    result = run(source, batch_size=4)
    assert [s["name"] for s in result.samples] == [f"t{k:02}" for k in range(5)] + ["t05"]
    for sample in result.samples:
        assert sample["prediction"].shape == sample["label"].shape
    single = run(source, batch_size=1)
    for a, b in zip(result.samples, single.samples, strict=True):
        np.testing.assert_array_equal(a["prediction"], b["prediction"])


def test_the_report_holds_the_table_the_figures_and_strict_json(source, tmp_path):
    workdir, info = tmp_path / "run", dataset_info("grass")
    (workdir / "figures").mkdir(parents=True)
    result = run(source, batch_size=4)
    evaluate.write_report(result, workdir, "val", info)
    table = evaluate.table(result, info.classes)
    assert all(name in table for name in info.classes) and "best constant prediction" in table
    names = {p.name for p in (workdir / "figures").iterdir()}
    assert names == {"val_confusion.png", "val_samples.png", "val.json", "val.csv"}
    saved = json.loads((workdir / "figures" / "val.json").read_text(), parse_constant=pytest.fail)
    assert saved["confusion"] == result.confusion.tolist()
    assert saved["summary"]["mIoU"] == result.metrics.summary["mIoU"]


def test_weights_from_elsewhere_are_evaluated_as_they_are(tmp_path):
    """--mode=eval with config.weights.model, against a confusion matrix of load_pretrained's predictions."""
    root = runs.make_tiles(tmp_path / "data", train=1, val=5, size=64)  # the crop's size: nothing is resized
    first = build(runs.settings(root))
    state_ = runs.random_state(first)
    config = KTDAConfig.from_dict({**runs.config(root).model, "num_classes": runs.CLASSES})
    folder.save(tmp_path / "w", folder.Weights("ktda", config, {**state_.params, **state_.batch_stats}, {}))
    result = loop.evaluate_workdir(runs.config(root, {"weights.model": str(tmp_path / "w")}), tmp_path / "run")
    model, confusion = ktda_jax.load_pretrained(tmp_path / "w"), np.zeros((runs.CLASSES, runs.CLASSES), np.int64)
    for tile in FolderSource(root, "val", num_classes=runs.CLASSES):
        np.add.at(confusion, (tile["label"], model.predict(tile["image"]).labels), 1)
    np.testing.assert_array_equal(result.confusion, confusion)
    assert "final/mIoU" in runs.rows(tmp_path / "run")[-1]
