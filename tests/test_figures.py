"""Figures exist whole, have the size their content needs, and show the classes in their own colours."""

import json

import numpy as np
import pytest
from PIL import Image

from ktda_jax.figures import plots, sheets
from ktda_jax.training.reported import TIMES

CLASSES = ("Clear", "Cloud Shadow", "Thin Cloud", "Cloud")
PALETTE = ((79, 253, 199), (221, 53, 223), (251, 255, 41), (77, 2, 115))
LONG = tuple(f"class number {i} with quite a long name" for i in range(20))


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def count(picture, color):
    return int((picture == np.array(color, np.uint8)).all(-1).sum())


def confusion(classes, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.random((classes, classes)) * 10 ** rng.integers(1, 10, (classes, classes))).astype(np.int64)


def tiles(number, size, classes, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (number, size, size, 3)).astype(np.uint8)
    labels = rng.integers(0, classes, (number, 4, 4)).astype(np.uint8)
    return images, labels.repeat(size // 4, 1).repeat(size // 4, 2)


@pytest.mark.parametrize("classes", [CLASSES, LONG])
def test_confusion(tmp_path, classes):
    path = tmp_path / "figures" / "confusion.png"
    matrix = confusion(len(classes))
    matrix[1] = 0  # a class without labelled pixels
    plots.save_confusion(path, matrix, classes)
    height, width, _ = pixels(path).shape
    assert min(height, width) > len(classes) * 0.6 * plots.DPI and max(height, width) < 4000
    assert [p.name for p in path.parent.iterdir()] == ["confusion.png"]  # no temporary left
    with pytest.raises(ValueError, match="3 class names"):
        plots.save_confusion(path, matrix, classes[:3])


def test_confusion_shades_rows_by_their_own_total(tmp_path):
    plots.save_confusion(tmp_path / "a.png", np.array([[10**9, 0], [0, 5]]), ("a", "b"))
    plots.save_confusion(tmp_path / "b.png", np.array([[10, 0], [0, 10]]), ("a", "b"))
    full = (8, 48, 107)  # the darkest blue: 100 percent, however few pixels that is
    dark = [count(pixels(tmp_path / name), full) for name in ("a.png", "b.png")]
    assert dark[0] == pytest.approx(dark[1], rel=0.05) and dark[0] > plots.DPI**2


@pytest.mark.parametrize("size", [64, 512])
def test_triptychs_show_the_palette_as_it_is(tmp_path, size):
    images, labels = tiles(3, size, 3)  # class 3 occurs in predictions only
    predictions = np.where(labels == 0, 3, labels).astype(np.int32)
    labels[0, : size // 4] = 255
    path = tmp_path / "sheet.png"
    sheets.save_triptychs(path, images, labels, predictions, CLASSES, PALETTE)
    picture = pixels(path)
    area = (2.3 * plots.DPI) ** 2  # of one panel, in pixels
    for index, color in enumerate(PALETTE):
        share = (labels == index).mean() + (predictions == index).mean()
        assert count(picture, color) == pytest.approx(3 * share * area, rel=0.1), CLASSES[index]
    for grey in sheets.STRIPES:
        assert count(picture, grey) > 0.3 * area / 4  # a quarter of a tile, in the label and the error panel
    assert picture.shape[1] > 4 * 2.3 * plots.DPI and picture.shape[0] > 3 * 2.3 * plots.DPI


def test_triptychs_with_many_long_names_and_missing_scores(tmp_path):
    images, labels = tiles(2, 64, 20)
    palette = [tuple(color) for color in np.random.default_rng(1).integers(0, 256, (20, 3)).tolist()]
    names, scores = ["/data/val/" + "long_tile_name_" * 9 + "7.tif", "b.tif"], [51.2, float("nan")]
    few, many = tmp_path / "few.png", tmp_path / "many.png"
    sheets.save_triptychs(many, images, labels, labels, LONG, palette, names=names, scores=scores)
    sheets.save_triptychs(few, images, labels % 4, labels % 4, CLASSES, PALETTE, names=names, scores=scores)
    assert pixels(many).shape[0] > pixels(few).shape[0] + 0.2 * 8 * plots.DPI  # the legend got its room
    assert pixels(many).shape[1] == pixels(few).shape[1]


def test_triptychs_refuse_what_does_not_belong_together(tmp_path):
    images, labels = tiles(2, 8, 4)
    with pytest.raises(ValueError, match="1 labels"):
        sheets.save_triptychs(tmp_path / "a.png", images, labels[:1], labels, CLASSES, PALETTE)
    with pytest.raises(ValueError, match="3 palette"):
        sheets.save_triptychs(tmp_path / "a.png", images, labels, labels, CLASSES, PALETTE[:3])
    assert not list(tmp_path.iterdir())


def test_paint():
    ids = np.array([[0, 3], [255, 1]], np.uint8)
    painted = sheets.paint(ids, PALETTE)
    assert painted.dtype == np.uint8
    assert tuple(painted[0, 0]) == PALETTE[0] and tuple(painted[0, 1]) == PALETTE[3]
    assert tuple(painted[1, 0]) in sheets.STRIPES


def test_paint_errors_ignores_255():
    image = np.full((2, 2, 3), 100, np.uint8)
    out = sheets.paint_errors(image, np.array([[0, 1], [255, 2]], np.uint8), np.array([[0, 2], [1, 2]]))
    right, wrong, ignored = out[0, 0], out[0, 1], out[1, 0]
    assert right[0] == right[1] == right[2] and (out[1, 1] == right).all()
    assert int(wrong[0]) > 2 * int(wrong[1])
    assert tuple(ignored) in sheets.STRIPES


@pytest.mark.parametrize("steps", [2, 400])
def test_curves(tmp_path, steps):
    source = tmp_path / "metrics.jsonl"
    rows = [
        {"step": step, "train/loss": 3 / step, "train/decode": 2 / step, "train/lr": 1e-4}
        for step in range(1, steps + 1)
    ]
    rows += [{"step": steps, "val/mIoU": 40.0, "val/mAcc": None}]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 9, "tra')
    plots.save_curves(tmp_path / "curves.png", source)
    with_scores = pixels(tmp_path / "curves.png")
    plots.save_curves(tmp_path / "curves.png", _only(source, "train/loss"))
    assert pixels(tmp_path / "curves.png").shape[0] < with_scores.shape[0] - plots.DPI  # fewer panels


def test_curves_of_nothing(tmp_path):
    source = tmp_path / "metrics.jsonl"
    pace = json.dumps({"step": 2, **dict.fromkeys(TIMES, 0.5)})  # how fast it was is no loss
    source.write_text('{"step": 1, "train/loss": null}\n' + pace)
    with pytest.raises(ValueError, match="no loss, lr or mIoU"):
        plots.save_curves(tmp_path / "curves.png", source)


def test_curves_leave_out_what_is_no_number(tmp_path):
    rows = [
        '{"step": 2, "a": 1, "b": NaN}',
        '{"step": 1, "a": 3.5, "c": null}',
        '{"a": 9}',
        "[1]",
        "7",
        '{"step": "3", "a": 9}',
    ]
    rows += ['{"step": Infinity, "a": 9}', f'{{"step": 4, "a": 1{"0" * 400}, "b": true}}', '{"step": 5, "a": 9']
    (tmp_path / "metrics.jsonl").write_text("\n".join(rows))
    ((name, (steps, values)),) = plots.read_curves(tmp_path / "metrics.jsonl").items()
    assert (name, steps.tolist(), values.tolist()) == ("a", [1, 2], [3.5, 1])


def _only(source, key):
    rows = [json.loads(line) for line in source.read_text().splitlines()[:-1]]
    kept = [{"step": row["step"], key: row[key]} for row in rows if key in row]
    source.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return source
