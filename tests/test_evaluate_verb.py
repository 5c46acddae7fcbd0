"""`python -m ktda_jax.evaluate`: scores of any images with labels are those of predict's maps, and of `--mode=eval`."""

import csv
import json
import re

import numpy as np
import pytest
import rasterio
import runs
import scene_files as sf
from PIL import Image

import ktda_jax
from ktda_jax import UserError, evaluate, predict
from ktda_jax.metrics import boundary, by_tile
from ktda_jax.metrics.confusion import count
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.prediction import scored, segmenter
from ktda_jax.tiling import device
from ktda_jax.training import loop, trust
from ktda_jax.training.program import build
from ktda_jax.weights import folder as weights

CLASSES = runs.CLASSES


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Larger than the model's 64 x 64, with ignored pixels."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(3)
    runs.make_tiles(root, train=1, val=3, size=160)
    for path in (root / "ann_dir" / "val").iterdir():
        label = np.array(Image.open(path))
        label[rng.random(label.shape) < 0.1] = 255
        Image.fromarray(label).save(path)
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiles):
    """A random model in a converted folder, whose classes have names."""
    path = tmp_path_factory.mktemp("weights") / "w"
    config = KTDAConfig.from_dict({**runs.config(tiles).model, "num_classes": CLASSES})
    random = runs.random_state(build(runs.settings(tiles)))
    names = tuple("abcde")
    weights.save(path, weights.Weights("ktda", config, {**random.params, **random.batch_stats}, {}, classes=names))
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return ktda_jax.load_pretrained(checkpoint)


@pytest.fixture(scope="module")
def step(model):
    """Compiled once for all tests here."""
    return device.Step(device.of_segmenter(model), (64, 64), 8)


@pytest.fixture
def quick(model, step, monkeypatch):
    monkeypatch.setattr(segmenter, "load_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(device, "Step", lambda model, tile, batch: step)


def folders(root, split="val") -> dict[str, str]:
    return {"images": str(root / "img_dir" / split), "labels": str(root / "ann_dir" / split)}


def test_scores_are_those_of_mode_eval_at_native_scale(tiles, checkpoint, tmp_path, capsys):
    """Of the same checkpoint and tiles, through the command; and what it leaves."""
    config = runs.config(tiles, {"data.eval_scale": "native", "weights.model": str(checkpoint)})
    expected = loop.evaluate_workdir(config, tmp_path / "run")
    capsys.readouterr()
    flags = [f"--{k}={v}" for k, v in folders(tiles).items()]
    output = tmp_path / "out"
    process = runs.start(
        f"--checkpoint={checkpoint}", *flags, f"--output={output}", "--overlay", verb="evaluate", devices=2
    )
    out, err = runs.finish(process)
    assert err == "" and "3 scenes, tiles of 64 x 64 overlapping by 16" in out
    assert re.search(r"3 images, [\d,]+ labelled pixels, at their own scale, in windows of 64 x 64", out)
    assert "in 95 % of draws of 3 images; mIoU of boundaries" in out and "temperature" not in out
    assert "best constant prediction" in out and f"maps and scores in {output}" in out

    saved = json.loads((output / "scores.json").read_text(), parse_constant=pytest.fail)
    confusion = np.array(saved["confusion"])
    assert confusion.sum() == expected.confusion.sum() and (confusion.sum(0) > 1000).sum() >= 2
    assert np.abs(confusion - expected.confusion).sum() / 2 <= 1e-4 * confusion.sum()
    assert saved["summary"]["mIoU"] == pytest.approx(expected.metrics.summary["mIoU"], abs=0.05)
    assert saved["boundary_miou"] == pytest.approx(expected.trust.boundary_mean, abs=0.05)
    assert saved["interval"] == pytest.approx(expected.trust.interval, abs=0.05)
    assert saved["calibration"] == {"temperature": 1, "error": pytest.approx(expected.trust.errors[0], abs=0.05)}
    theirs = json.loads((tmp_path / "run" / "figures" / "val.json").read_text())
    assert saved.keys() == theirs.keys() - {"scale", "step", "fingerprint"}  # of a training
    with open(output / "scores.csv", newline="") as ours, open(tmp_path / "run" / "figures" / "val.csv") as other:
        rows = list(csv.DictReader(ours))
        assert rows[0].keys() == csv.DictReader(other).__next__().keys()
    assert [row["class"] for row in rows] == [*"abcde", "mean"]
    single = by_tile.from_csv((output / "scores_tiles.csv").read_text(), 5)
    assert len(single) == 3 and single.sum(0).tolist() == saved["confusion"]
    maps = {f"t{k}{ending}" for k in range(3) for ending in (".png", "_overlay.png")}
    assert {path.name for path in output.iterdir()} == maps | set(scored.FILES)


@pytest.fixture
def scene(tmp_path):
    """A GeoTIFF of several rows of tiles, a part of it without data, and its label in the same place."""
    values = np.maximum(sf.smooth(300, 200), 1)
    values[40:130, 20:180] = 0
    label = np.random.default_rng(1).integers(0, CLASSES, (20, 20)).repeat(15, 0).repeat(10, 1).astype(np.uint8)
    label[200:220] = 255
    image = sf.write(tmp_path / "scene.tif", values, nodata=0)
    return image, sf.write(tmp_path / "label.tif", label[..., None]), np.where((values > 0).any(-1), label, 255)


def test_a_scene_is_scored_where_it_has_data_and_mapped_as_predict_does_it(quick, checkpoint, scene, tmp_path, capsys):
    image, path, label = scene
    given = dict(probabilities=True, confidence=True)
    predict.run(str(checkpoint), str(image), str(tmp_path / "map.tif"), **given)
    result = evaluate.run(str(checkpoint), str(image), str(path), str(tmp_path / "out"), **given)
    mapped = sf.read(tmp_path / "map.tif")
    assert (mapped == 255).sum() == 90 * 160
    np.testing.assert_array_equal(result.confusion, count(label, mapped, CLASSES))
    assert result.confusion.sum() == (label != 255).sum()
    edges = boundary.boundary_iou(boundary.count(label, mapped, CLASSES))
    np.testing.assert_array_equal(result.trust.boundary, edges[0])
    for ending in ("", "_probabilities", "_confidence"):
        ours, theirs = tmp_path / "out" / f"scene{ending}.tif", tmp_path / f"map{ending}.tif"
        assert ours.read_bytes() == theirs.read_bytes()
    assert np.isnan(result.trust.interval[0]) and "1 image, " in capsys.readouterr().out
    alone = evaluate.run(str(checkpoint), str(image), str(path))  # and without --output nothing is written
    np.testing.assert_array_equal(alone.confusion, result.confusion)
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} >= {"scene.tif", "label.tif"}
    said = capsys.readouterr().out
    assert "maps and scores" not in said and "->" not in said and "calibration error" in said


def test_pixels_for_the_calibration_are_spread_over_the_strips_of_a_scene(quick, checkpoint, scene, monkeypatch):
    image, path, label = scene
    monkeypatch.setattr(trust, "PIXELS", 3000)
    kept = []
    add = trust.Sums.add_pixels
    monkeypatch.setattr(trust.Sums, "add_pixels", lambda self, *given: kept.append(given[-1]) or add(self, *given))
    result = evaluate.run(str(checkpoint), str(image), str(path))
    assert len(kept) > 3 and sum(kept) == 3000 and min(kept) > 100
    share = (label != 255).sum() / (sf.read(path) != 255).sum()
    assert 3000 * share - 100 < result.trust.before.count.sum() <= 3000


def test_the_calibration_error_is_of_probabilities_as_they_are_delivered(quick, model, checkpoint, tiles, monkeypatch):
    """That is, with the temperature that the model has; none is fitted."""
    plain = evaluate.run(str(checkpoint), **folders(tiles))
    monkeypatch.setattr(model, "temperature", 3.0)
    warm = evaluate.run(str(checkpoint), **folders(tiles))
    np.testing.assert_array_equal(plain.confusion, warm.confusion)
    assert warm.trust.temperature == 3 and warm.trust.after is None
    assert warm.trust.before.confidence.sum() < plain.trust.before.confidence.sum()
    assert "with the model's temperature 3" in trust.in_words(warm.trust, "images")


@pytest.mark.parametrize("form", ["numbers", "colours", "dict"])
def test_a_label_map_says_what_values_and_colours_mean(quick, checkpoint, tmp_path, form):
    label = np.random.default_rng(0).integers(0, 2, (70, 80))
    image = tmp_path / "a.jpg"
    Image.fromarray(sf.smooth(70, 80)).save(image)
    Image.fromarray((3 * label).astype(np.uint8)).save(tmp_path / "plain.png")
    drawn = 255 * label if form != "colours" else np.array([(0, 0, 0), (255, 0, 0)])[label]
    Image.fromarray(drawn.astype(np.uint8)).save(tmp_path / "drawn.png")
    text = {
        "numbers": "((0, 0), (255, 3))", "colours": "(((0, 0, 0), 0), ((255, 0, 0), 3))", "dict": "{0: 0, 255: 3}",
    }[form]  # fmt: skip
    expected = evaluate.run(str(checkpoint), str(image), str(tmp_path / "plain.png"))
    found = evaluate.run(str(checkpoint), str(image), str(tmp_path / "drawn.png"), label_map=text)
    np.testing.assert_array_equal(found.confusion, expected.confusion)


def test_masks_that_need_a_map_are_doubted(quick, checkpoint, tmp_path, capsys):
    Image.fromarray(sf.smooth(70, 80)).save(tmp_path / "a.jpg")
    Image.fromarray(np.where(sf.smooth(70, 80)[..., 0] > 99, 255, 0).astype(np.uint8)).save(tmp_path / "a.png")
    evaluate.run(str(checkpoint), str(tmp_path / "*.jpg"), str(tmp_path))
    assert "warning: every labelled pixel of all labels is 'a', so that a map of 'a'" in capsys.readouterr().out


@pytest.fixture
def pairs(tmp_path):
    """Two GeoTIFFs and their labels."""
    for name in "ab":
        for kind in ("images", "labels"):
            (tmp_path / kind).mkdir(exist_ok=True)
        sf.write(tmp_path / "images" / f"{name}.tif", sf.smooth(70, 80))
        sf.write(tmp_path / "labels" / f"{name}.tif", sf.smooth(70, 80, bands=1) % CLASSES)
    return tmp_path


def _moved(root):
    moved = rasterio.Affine(30.0, 0.0, sf.UTM.c + 45, 0.0, -30.0, sf.UTM.f)
    sf.write(root / "labels" / "b.tif", sf.smooth(70, 80, bands=1) % CLASSES, transform=moved)


WRONG = [  # what is done to the pairs, what is said
    (lambda d: (d / "labels" / "b.tif").unlink(), r"^1 of 2 images in .*images have no label in .*labels: b.tif; add"),
    (lambda d: [(d / "labels" / f"{k}.tif").rename(d / "labels" / f"{k}_m.tif") for k in "ab"], "NAME_m: rename these"),
    (lambda d: Image.fromarray(sf.smooth(70, 80)).save(d / "images" / "b.png"), r"two images named b: .*--images='DIR"),
    (
        lambda d: sf.write(d / "labels" / "b.tif", sf.smooth(70, 81, bands=1)),
        r"^image and label differ in size in 1 of 2 pairs: .*b.tif is 70 x 80, .*b.tif 70 x 81; cut both",
    ),
    (_moved, r"^image and label lie in different places in 1 of 2 pairs: .*b.tif \(1.5 pixels beside the image\); "),
    (
        lambda d: sf.write(d / "labels" / "b.tif", sf.smooth(70, 80, bands=1) % 5, crs="EPSG:32632"),
        r"places in 1 of 2 pairs: .*labels.b.tif \(EPSG:32632, image EPSG:32633\); warp the labels to the grid",
    ),
    (lambda d: (d / "images" / "b.tif").write_bytes(b"II*\0"), r"^cannot read .*images.b.tif"),
    (lambda d: (d / "labels" / "b.tif").write_bytes(b"II*\0"), r"^cannot read .*labels.b.tif"),
    (
        lambda d: [sf.write(d / "labels" / f"{k}.tif", sf.smooth(70, 80)) for k in "ab"],
        r"^2 of 2 images have labels that cannot be used: .*b.tif: has 3 bands.*or map its colours by --label_map$",
    ),
    (
        lambda d: [sf.write(d / "labels" / f"{k}.tif", np.full((70, 80, 1), 255, np.uint8)) for k in "ab"],
        "every pixel of every label is 255",
    ),
]  # fmt: skip


@pytest.mark.parametrize("harm, message", WRONG)
def test_what_does_not_fit_is_said_before_the_model_is_loaded(pairs, tmp_path, monkeypatch, harm, message):
    monkeypatch.setattr(segmenter, "load_pretrained", None)
    harm(pairs)
    with pytest.raises(UserError, match=message) as caught:
        evaluate.run("nowhere", str(pairs / "images"), str(pairs / "labels"), str(tmp_path / "out"))
    assert "\n" not in str(caught.value) and "config.data" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(images="nothing"), "there is no file --images="),
        (dict(labels="nothing"), "there is no file or folder --labels="),
        (dict(labels="labels/a.tif"), "labels/a.tif is one file for 2 images; give the folder"),
        (dict(label_map="0,1"), r"--label_map maps|--label_map is \(0, 1\); give \(\(stored value, class\)"),
        (dict(label_map="water"), "--label_map=water is no map; give"),
        (dict(label_map="((0, 300),)"), "--label_map turns 0 into 300; give a class from 0 to 254"),
        (dict(label_map="((0, 0), (1, 1))"), "values that --label_map does not name: 2, 3, 4"),
        (dict(output="labels"), "labels/a.tif would be written over the input .*labels/a.tif"),
        (dict(output="map.tif"), "is one file for 2 inputs; give a folder"),
        (dict(overlay=True, output=None), "need an --output"),
    ],
)
def test_flags_that_will_not_do(pairs, monkeypatch, flags, message):
    monkeypatch.setattr(segmenter, "load_pretrained", None)
    given = {"images": "images", "labels": "labels", "output": "out"} | flags
    paths = {k: str(pairs / v) for k, v in given.items() if k in ("images", "labels", "output") and v}
    with pytest.raises(UserError, match=message):
        evaluate.run("nowhere", **{k: v for k, v in given.items() if k not in paths} | paths)


def test_values_that_are_no_class_of_the_model(quick, checkpoint, pairs):
    for name in "ab":
        sf.write(pairs / "labels" / f"{name}.tif", sf.smooth(70, 80, bands=1) % CLASSES + 1)
    with pytest.raises(UserError) as caught:
        evaluate.run(str(checkpoint), str(pairs / "images"), str(pairs / "labels"))
    text = str(caught.value)
    assert text.startswith("label values outside 0..4 that are not 255 in 2 of 2 labels: ") and "a.tif (5)" in text
    assert "the model knows a, b, c, d, e; map the values to these by --label_map | values 1: " in text
    assert text.endswith('if so, set --label_map="((1, 0), (2, 1), (3, 2), (4, 3), (5, 4))"')
    with pytest.raises(UserError, match="--label_map turns 1 into 7; give a class from 0 to 4, or 255"):
        evaluate.run(
            str(checkpoint), str(pairs / "images"), str(pairs / "labels"),
            label_map="((1, 7), (2, 1), (3, 2), (4, 3), (5, 4))",
        )  # fmt: skip


def test_an_image_that_ends_early_is_named_and_no_scores_are_left(quick, checkpoint, pairs, capsys):
    values = sf.smooth(1400, 80, seed=3)
    path = sf.write(pairs / "images" / "b.tif", values, blockysize=16)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    sf.write(pairs / "labels" / "b.tif", values[..., :1] % CLASSES)
    sf.write(pairs / "labels" / "c.tif", values[..., :1] % CLASSES)
    with pytest.raises(UserError, match=r"^cannot read .*b\.tif"):
        evaluate.run(str(checkpoint), str(pairs / "images"), str(pairs / "labels"), str(pairs / "out"))
    assert "warning: 1 labels in " in capsys.readouterr().out
    assert not (pairs / "out" / "scores.json").exists() and not (pairs / "out" / "b.tif").exists()


def test_an_image_called_as_a_file_of_the_scores(pairs, monkeypatch):
    for kind, bands in (("images", 3), ("labels", 1)):
        Image.fromarray(sf.smooth(70, 80, bands=bands).squeeze() % CLASSES).save(pairs / kind / "confusion.png")
    with pytest.raises(UserError, match="the map of .*confusion.png would be called confusion.png"):
        evaluate.run("nowhere", str(pairs / "images"), str(pairs / "labels"), str(pairs / "out"))


def test_nothing_to_score_where_there_are_data(quick, checkpoint, pairs):
    values = sf.smooth(70, 80)
    values[:35] = 0
    sf.write(pairs / "images" / "a.tif", values, nodata=0)
    label = np.full((70, 80, 1), 255, np.uint8)
    label[:35] = 1
    sf.write(pairs / "labels" / "a.tif", label)
    with pytest.raises(UserError, match="no labelled pixel lies where its image has data"):
        evaluate.run(str(checkpoint), str(pairs / "images" / "a.tif"), str(pairs / "labels" / "a.tif"))


def test_edges_in_blocks_of_rows_are_those_of_the_whole():
    label, found = (sf.smooth(300, 120, bands=1, seed=k)[..., 0] // 60 for k in (0, 1))
    label[50:70, 20:90] = 255
    whole = boundary.count(label, found, CLASSES)
    for block in (1, 120 * 7, 120 * 299, 1 << 20):
        np.testing.assert_array_equal(scored.edge_counts(label, found, CLASSES, block), whole)
