"""Three lines of Python: load, predict an array or a file, get labels and probabilities."""

import dataclasses
import json

import golden
import jax
import numpy as np
import pytest
import runs
from PIL import Image

import ktda_jax
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build
from ktda_jax.weights import sources


@pytest.fixture(scope="module")
def model():
    return ktda_jax.load_pretrained(golden.GOLDENS / "grass_tiny.pth", teacher_heads=2)


def image(height=64, width=64, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def test_an_array_and_a_file_give_the_same(model, tmp_path):
    Image.fromarray(image()).save(tmp_path / "tile.tif")
    one, other = model.predict(image()), model.predict(tmp_path / "tile.tif")
    np.testing.assert_array_equal(one.labels, other.labels)
    assert one.labels.shape == (64, 64) and one.labels.dtype == np.uint8
    assert one.probabilities.shape == (64, 64, 5) and one.probabilities.dtype == np.float32
    np.testing.assert_allclose(one.probabilities.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(one.probabilities.argmax(-1), one.labels)


def test_batches_and_sizes_that_are_no_multiple(model):
    batch = np.stack([image(75, 98, seed) for seed in range(2)])
    both = model.predict(batch)
    assert both.labels.shape == (2, 75, 98)
    np.testing.assert_allclose(model.predict(batch[1]).probabilities, both.probabilities[1], atol=1e-5)


@pytest.mark.parametrize(
    "bad, message",
    [
        (np.zeros((64, 64, 3), np.float32), "the image is float32 of shape"),
        (np.zeros((64, 64), np.uint8), "give uint8"),
        (np.zeros((64, 64, 4), np.uint8), "give uint8"),
        (np.zeros((16, 64, 3), np.uint8), "16 x 64 pixels; give 32 to 2048 a side"),
        ("/nowhere.png", "/nowhere.png"),
    ],
)
def test_what_cannot_be_predicted(model, bad, message):
    with pytest.raises(ValueError, match=message):
        model.predict(bad)


def test_a_teacher_alone_predicts_nothing(tmp_path):
    from ktda_jax.prediction import segmenter
    from ktda_jax.weights import folder

    whole = sources.load(str(golden.GOLDENS / "grass_tiny.pth"), teacher_heads=2)
    with pytest.raises(ValueError, match="these weights are a teacher; prediction needs a whole KTDA model"):
        segmenter.Segmenter(folder.Weights("teacher", whole.config.teacher, {}, {}))


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_workdir_gives_its_best_checkpoint(tmp_path, ema):
    """The best by validation, not the last; the average where there is one; and how training read its images."""
    config = runs.config(tmp_path, {"ema": ema, "data.bands": (4, 1, 2, 3), "data.scale": (0, 3000)})
    program = build(Settings.of(config))
    kept = runs.random_state(program)
    if ema:
        kept = dataclasses.replace(kept, ema={k: v + 1 for k, v in kept.params.items()})
    records.write(tmp_path, Settings.of(config))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(3, kept, {}, {"mIoU": 60.0})
        later = jax.tree.map(np.zeros_like, kept)
        checkpoints.save(6, later, {}, {"mIoU": 50.0})
    model = ktda_jax.load_pretrained(tmp_path)
    assert model.source["step"] == 3 and model.data["bands"] == (4, 1, 2, 3) and model.data["scale"] == (0, 3000)
    image = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 4), np.uint8)
    params = kept.ema if ema else kept.params
    expected = flat.merge(program.graphdef, params, kept.batch_stats)(image).logits
    np.testing.assert_allclose(model.logits(image), expected, rtol=1e-4, atol=1e-4)


def test_a_workdir_without_a_training(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="config.json does not describe a training of ours"):
        ktda_jax.load_pretrained(tmp_path)
    records.write(tmp_path, runs.settings(tmp_path))
    with pytest.raises(ValueError, match="no checkpoint in .*checkpoints; train first"):
        ktda_jax.load_pretrained(tmp_path)
    broken = json.loads((tmp_path / "config.json").read_text())
    del broken["model"]
    (tmp_path / "config.json").write_text(json.dumps(broken))
    with pytest.raises(ValueError, match="config.json does not describe a training of ours"):
        ktda_jax.load_pretrained(tmp_path)
