"""Meadow: repeatable, balanced, and a task that a constant fails and colour with texture solves."""

import cv2
import numpy as np
import pytest

from data_builders.meadow.generate import IGNORE, NUM_CLASSES, generate_tile
from data_builders.meadow.meadow_dataset_builder import Builder
from ktda_jax.data.datasets import dataset_info
from ktda_jax.data.tfds_source import TfdsSource


@pytest.fixture(scope="module")
def tiles():
    """{split: (images (N, 128, 128, 3), labels (N, 128, 128))}"""
    return {
        split: tuple(
            np.stack(arrays) for arrays in zip(*(generate_tile(0, i, split=split) for i in range(count)), strict=True)
        )
        for split, count in Builder.TILES.items()
    }


def test_deterministic_and_keyed():
    image, label = generate_tile(3, 17)
    again = generate_tile(3, 17)
    assert image.shape == (128, 128, 3) and label.shape == (128, 128)
    assert image.dtype == label.dtype == np.uint8
    np.testing.assert_array_equal(image, again[0])
    np.testing.assert_array_equal(label, again[1])
    for other in (generate_tile(4, 17), generate_tile(3, 18), generate_tile(3, 17, split="val")):
        assert (other[1] != label).mean() > 0.2 and (other[0] != image).mean() > 0.5
    assert generate_tile(0, 0, 64)[0].shape == (64, 64, 3)
    with pytest.raises(ValueError, match="size=31"):
        generate_tile(0, 0, 31)


def test_classes_are_balanced(tiles):
    assert dataset_info("meadow").num_classes == NUM_CLASSES
    for _, labels in tiles.values():
        assert set(np.unique(labels)) <= {*range(NUM_CLASSES), IGNORE}
        shares = np.bincount(labels[labels != IGNORE], minlength=NUM_CLASSES) / labels.size
        assert shares.min() > 0.1 and shares.max() < 0.35, shares
        assert 0 < (labels == IGNORE).mean() < 0.02


def mean_iou(predictions, labels):
    known = labels != IGNORE
    pairs = labels[known].astype(np.int64) * NUM_CLASSES + predictions[known]
    confusion = np.bincount(pairs, minlength=NUM_CLASSES**2).reshape(NUM_CLASSES, NUM_CLASSES)
    hits = np.diag(confusion)
    return (hits / (confusion.sum(0) + confusion.sum(1) - hits)).mean()


def features(images):
    """Mean colour and local contrast around each pixel: (N, H, W, 6)."""
    found = []
    for image in images.astype(np.float32):
        mean = cv2.blur(image, (9, 9))
        spread = np.sqrt(np.maximum(cv2.blur(image**2, (9, 9)) - mean**2, 0))
        found.append(np.concatenate([mean, spread], -1))
    return np.stack(found)


def test_colour_and_texture_beat_any_constant(tiles):
    (images, labels), (val_images, val_labels) = tiles["train"], tiles["val"]
    constant = max(mean_iou(np.full(val_labels.shape, k), val_labels) for k in range(NUM_CLASSES))
    assert constant < 0.08

    x = features(images)
    scale = x.std((0, 1, 2))
    centroids = np.stack([x[labels == k].mean(0) for k in range(NUM_CLASSES)])
    distance = (((features(val_images)[..., None, :] - centroids) / scale) ** 2).sum(-1)
    learned = mean_iou(distance.argmin(-1), val_labels)
    print(f"best constant {constant:.3f}, nearest centroid {learned:.3f}")
    assert learned > 3 * constant


def test_builder(tmp_path, monkeypatch):
    monkeypatch.setattr(Builder, "TILES", {"train": 3, "val": 2})
    builder = Builder(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    info = dataset_info("meadow")
    assert builder.name == "meadow"
    assert builder.info.features["label"].names == list(info.classes)
    assert builder.info.supervised_keys == ("image", "label")
    assert [tuple(colour) for colour in builder.info.metadata["palette"]] == list(info.palette)
    for split, count in Builder.TILES.items():
        source = TfdsSource("meadow", split, data_dir=tmp_path, num_classes=5)
        assert len(source) == count
        for index, tile in enumerate(source):
            image, label = generate_tile(0, index, split=split)
            np.testing.assert_array_equal(tile["image"], image)
            np.testing.assert_array_equal(tile["label"], label)
