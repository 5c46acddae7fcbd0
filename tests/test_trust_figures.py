"""Reliability diagrams and precision-recall curves exist whole and have the size that their content needs."""

import numpy as np
import pytest
from PIL import Image

from ktda_jax.figures import plots, trust
from ktda_jax.metrics import calibration, curves

PALETTE = ((79, 253, 199), (221, 53, 223), (251, 255, 41), (77, 2, 115))
BLUE = tuple(int(trust.BLUE[k : k + 2], 16) for k in (1, 3, 5))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def count(picture, color):
    return int((picture == np.array(color, np.uint8)).all(-1).sum())


def reliability(power, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.25, 1, 5000).astype(np.float32)
    return calibration.reliability(confidence, rng.random(5000) < confidence**power)


def recalls(classes, absent=None):
    rng = np.random.default_rng(0)
    label = rng.integers(0, classes, 4000)
    p = rng.random((classes, 4000)) ** np.where(label == np.arange(classes)[:, None], 0.3, 3)
    label[label == absent] = 255
    return curves.precision_recall(curves.histograms(label, p.astype(np.float32)))


def test_reliability(tmp_path):
    one, two = tmp_path / "figures" / "one.png", tmp_path / "figures" / "two.png"
    trust.save_reliability(one, reliability(3))
    trust.save_reliability(two, reliability(3), reliability(1), temperature=1.5)
    first, second = pixels(one), pixels(two)
    assert first.shape[0] == second.shape[0] and second.shape[1] > first.shape[1] + 3 * plots.DPI
    assert count(second, BLUE) > 2.2 * count(first, BLUE)  # more pixels are right in the second diagram
    assert sorted(path.name for path in one.parent.iterdir()) == ["one.png", "two.png"]  # no temporary left


def test_reliability_of_nothing(tmp_path, recwarn):
    trust.save_reliability(tmp_path / "a.png", calibration.nothing(), calibration.nothing(), temperature=1)
    assert pixels(tmp_path / "a.png").shape[1] > 8 * plots.DPI
    assert not recwarn.list


def test_precision_recall_has_a_curve_per_class_in_its_colour(tmp_path):
    path = tmp_path / "a.png"
    trust.save_precision_recall(path, *recalls(4), ("a", "b", "c", "d"), PALETTE)
    shown = [count(pixels(path), color) for color in PALETTE]
    assert min(shown) > 500
    trust.save_precision_recall(path, *recalls(4, absent=2), ("a", "b", "c", "d"), PALETTE)
    assert count(pixels(path), PALETTE[2]) < 0.5 * shown[2]  # its legend alone


def test_precision_recall_with_many_long_names(tmp_path):
    names = [f"class number {index} with quite a long name" for index in range(20)]
    palette = np.random.default_rng(1).integers(0, 256, (20, 3)).tolist()
    trust.save_precision_recall(tmp_path / "a.png", *recalls(20), names, palette)
    trust.save_precision_recall(tmp_path / "b.png", *recalls(20), "abcdefghijklmnopqrst", palette)
    wide, narrow = pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png")
    assert wide.shape[1] > narrow.shape[1] + plots.DPI and max(wide.shape) < 2000


def test_precision_recall_of_nothing_and_of_unequal_parts(tmp_path, recwarn):
    empty = curves.precision_recall(np.zeros((4, 2, 256), np.int64))
    trust.save_precision_recall(tmp_path / "a.png", *empty, "abcd", PALETTE)
    assert not recwarn.list
    with pytest.raises(ValueError, match="3 classes"):
        trust.save_precision_recall(tmp_path / "b.png", *empty, "abc", PALETTE)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
