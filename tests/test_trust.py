"""What an evaluation tells beside the score, and the temperature on its way into probabilities, maps and exports."""

import csv
import json
import shutil

import jax
import numpy as np
import pytest
import runs
from PIL import Image

import ktda_jax
from ktda_jax import UserError, export, predict
from ktda_jax.data import gdal
from ktda_jax.metrics import bootstrap, boundary, calibration
from ktda_jax.metrics.confusion import count
from ktda_jax.models.ktda import full_size
from ktda_jax.tiling import blend
from ktda_jax.training import loop, trust
from ktda_jax.training.predicted import Predicted
from ktda_jax.training.trained import read
from ktda_jax.weights import folder as weights

CLASSES = 3


def made(rng, number, temperature=2.0, size=(40, 50)):
    """A tile of a model whose logits are `temperature` times too large."""
    logits = rng.normal(size=(CLASSES, *size)) * 2
    true = np.exp(logits) / np.exp(logits).sum(0)
    label = (rng.random(size) > true.cumsum(0)).sum(0).clip(max=CLASSES - 1).astype(np.uint8)
    label[rng.random(size) < 0.1] = 255
    claimed = np.exp(temperature * logits)
    claimed = (claimed / claimed.sum(0)).astype(np.float32)
    prediction = claimed.argmax(0).astype(np.uint8)
    return Predicted(f"t{number}", number, None, label, prediction, count(label, prediction, CLASSES), claimed)


@pytest.fixture(scope="module")
def sums():
    rng, sums = np.random.default_rng(0), trust.Sums(12, CLASSES)
    tiles = [made(rng, k) for k in range(12)]
    for tile in tiles:
        sums.add(tile)
    return tiles, sums.result()


def test_each_number_is_that_of_its_module(sums):
    tiles, found = sums
    by_tile = bootstrap.counts(np.array([tile.confusion for tile in tiles]))
    assert found.tiles == 12 and found.interval == bootstrap.interval(by_tile)
    edges = sum(boundary.count(tile.label, tile.prediction, CLASSES) for tile in tiles)
    np.testing.assert_array_equal(found.boundary, boundary.boundary_iou(edges)[0])
    labelled = [tile.label != 255 for tile in tiles]
    confidence = np.concatenate([tile.probabilities.max(0)[kept] for tile, kept in zip(tiles, labelled, strict=True)])
    hit = np.concatenate([(tile.prediction == tile.label)[kept] for tile, kept in zip(tiles, labelled, strict=True)])
    whole = calibration.reliability(confidence, hit)  # few enough pixels that all are kept
    np.testing.assert_array_equal(found.before.count, whole.count)
    assert found.errors[0] == pytest.approx(calibration.expected_calibration_error(whole), abs=1e-4)


def test_a_temperature_mends_what_is_too_sure_of_itself_on_tiles_that_it_was_not_fitted_to(sums):
    _, found = sums
    before, after = found.errors
    assert found.temperature == pytest.approx(2, rel=0.05) and before > 8 and after < 1.5


def test_a_temperature_that_makes_it_worse_is_not_kept():
    """Half of the tiles too sure of itself, half not sure enough: what mends one harms the other."""
    rng, sums = np.random.default_rng(0), trust.Sums(8, CLASSES)
    for k in range(8):
        sums.add(made(rng, k, 3.0 if k % 2 else 0.4))
    found = sums.result()
    assert found.errors[1] > found.errors[0] and found.temperature == 1
    assert f"no temperature, since it became {found.errors[1]:.2f} %" in trust.in_words(found)


def test_too_many_pixels_are_thinned_evenly_and_two_halves_are_a_whole(monkeypatch):
    monkeypatch.setattr(trust, "PIXELS", 600)
    rng, sums = np.random.default_rng(0), trust.Sums(6, CLASSES)
    for k in range(6):
        sums.add(made(rng, k))
    found = sums.result()
    assert found.before.count.sum() == found.after.count.sum() == 600


def test_a_single_tile_has_no_other_half_and_nothing_labelled_has_no_score():
    rng, sums = np.random.default_rng(0), trust.Sums(1, CLASSES)
    sums.add(made(rng, 0))
    found = sums.result()
    assert np.isnan(found.errors[1]) and np.isnan(found.interval[0]) and "in 95 %" not in trust.in_words(found)
    assert found.temperature == 1 and "could not be tried on other tiles" in trust.in_words(found)
    blank, sums = made(rng, 0), trust.Sums(1, CLASSES)
    sums.add(blank._replace(label=np.full_like(blank.label, 255), confusion=blank.confusion * 0))
    found = sums.result()
    assert found.temperature == 1 and np.isnan(found.boundary_mean) and found.tiles == 0
    json.dumps(trust.as_json(found), allow_nan=False)


def test_a_model_without_finite_probabilities_is_said():
    tile, sums = made(np.random.default_rng(0), 0), trust.Sums(1, CLASSES)
    with pytest.raises(UserError, match="probabilities of tile t0 are not finite"):
        sums.add(tile._replace(probabilities=tile.probabilities * np.nan))


# Through the real verbs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir with a temperature, beside the same without; its tiles."""
    folder = tmp_path_factory.mktemp("trust")
    root = runs.make_tiles(folder / "data", train=1, val=4, size=64)
    config, program, _ = runs.random_workdir(root, folder / "run", sure=40.0)
    return root, folder / "run", config, loop.evaluate_workdir(config, folder / "run", program=program)


def test_an_evaluation_leaves_numbers_tables_and_figures(trained, capsys):
    _, workdir, config, result = trained
    again = loop.evaluate_workdir(config, workdir)
    out = capsys.readouterr().out
    assert "mIoU of boundaries" in out and "in 95 % of draws of 4 tiles" in out and "with temperature" in out
    np.testing.assert_array_equal(again.confusion, result.confusion)
    names = {path.name for path in (workdir / "figures").iterdir()}
    assert {"val_reliability.png", "val_precision_recall.png", "val.csv", "val.json"} <= names
    saved = json.loads((workdir / "figures" / "val.json").read_text(), parse_constant=pytest.fail)
    assert saved["interval"] == list(result.trust.interval)
    assert saved["calibration"]["temperature"] == result.trust.temperature
    with open(workdir / "figures" / "val.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    final = runs.rows(workdir)[-1]
    assert final["final/boundary_mIoU"] == result.trust.boundary_mean and final["final/temperature"] > 0
    assert [row["class"] for row in rows] == ["low", "middle-low", "middle", "middle-high", "high", "mean"]
    assert float(rows[-1]["IoU"]) == pytest.approx(result.metrics.summary["mIoU"], abs=1e-4)
    assert int(float(rows[-1]["pixels"])) == result.confusion.sum()


def test_the_temperature_is_of_one_checkpoint_and_goes_with_the_weights(trained, tmp_path):
    _, workdir, _, result = trained
    saved = json.loads((workdir / trust.FILE).read_text())
    assert saved["step"] == 6 and saved["temperature"] == result.trust.temperature != 1
    assert trust.read_temperature(workdir, 6) == saved["temperature"] and trust.read_temperature(workdir, 3) == 1
    weights.save(tmp_path / "w", read(workdir))  # as convert does
    model = ktda_jax.load_pretrained(tmp_path / "w")
    assert model.temperature == ktda_jax.load_pretrained(workdir).temperature == saved["temperature"]
    (tmp_path / trust.FILE).write_text('{"step": 2, "temperature": -1}')
    with pytest.raises(UserError, match="calibration.json: temperature -1.0; remove it"):
        trust.read_temperature(tmp_path, 2)


def test_it_is_of_the_tiles_that_chose_the_checkpoint_and_of_no_others(trained, tmp_path, capsys):
    """Those that it was trained on would flatter; a test split's scores do not wait for validation tiles."""
    root, workdir, _, _ = trained
    before = (workdir / trust.FILE).read_text()
    loop.evaluate_workdir(runs.config(root, {"data.val_split": "train"}), workdir)
    assert "no temperature was fitted: the tiles of train are not those by which" in capsys.readouterr().out
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / trust.FILE).unlink()
    loop.evaluate_workdir(runs.config(root, {"data.test_split": "train"}), tmp_path / "run")
    assert json.loads((tmp_path / "run" / trust.FILE).read_text()) == json.loads(before)
    (tmp_path / "run" / trust.FILE).unlink()
    shutil.copytree(root, tmp_path / "data", ignore=shutil.ignore_patterns("val"))
    loop.evaluate_workdir(runs.config(tmp_path / "data", {"data.test_split": "train"}), tmp_path / "run")
    out = capsys.readouterr().out
    assert "train split, step 6" in out and "no temperature was fitted: no such directory" in out
    assert (workdir / trust.FILE).read_text() == before


def test_probabilities_everywhere_are_divided_by_it_and_maps_are_as_they_were(trained, tmp_path):
    root, workdir, *_ = trained
    tile = root / "img_dir" / "val" / "t0.png"
    model = ktda_jax.load_pretrained(workdir)
    found, logits = model.predict(tile), np.asarray(model.logits(np.asarray(Image.open(tile))[None]))
    expected = jax.nn.softmax(full_size(logits, (64, 64)) / model.temperature, -1)[0]
    np.testing.assert_allclose(found.probabilities, expected, atol=1e-6)
    predict.run(str(workdir), str(tile), str(tmp_path / "map.tif"), probabilities=True, confidence=True)
    rasterio = gdal.rasterio_for(tile)
    with rasterio.open(tmp_path / "map_probabilities.tif") as file:
        stored = np.moveaxis(file.read(), 0, -1) / blend.CERTAIN
        assert float(file.tags()["TEMPERATURE"]) == pytest.approx(model.temperature, rel=1e-3)
    np.testing.assert_allclose(stored, found.probabilities, atol=0.003)
    with rasterio.open(tmp_path / "map_confidence.tif") as file:
        np.testing.assert_allclose(file.read(1) / blend.CERTAIN, found.probabilities.max(-1), atol=0.003)
    (workdir / trust.FILE).rename(workdir / "aside")
    try:
        plain = ktda_jax.load_pretrained(workdir).predict(tile)
        predict.run(str(workdir), str(tile), str(tmp_path / "plain.tif"))
    finally:
        (workdir / "aside").rename(workdir / trust.FILE)
    assert np.abs(plain.probabilities - found.probabilities).max() > 0.01
    with rasterio.open(tmp_path / "map.tif") as file, rasterio.open(tmp_path / "plain.tif") as other:
        np.testing.assert_array_equal(file.read(), other.read())


def test_an_export_has_it_inside(trained, tmp_path):
    root, workdir, *_ = trained
    model = ktda_jax.load_pretrained(workdir)
    told = export.run(str(workdir), tmp_path / "m.stablehlo", format="stablehlo")
    run = jax.jit(jax.export.deserialize((tmp_path / "m.stablehlo").read_bytes()).call)
    image = np.asarray(Image.open(root / "img_dir" / "val" / "t1.png"))
    np.testing.assert_allclose(run(image[None])["probabilities"][0], model.predict(image).probabilities, atol=1e-5)
    assert told["temperature"] == model.temperature
