"""Validation at native scale is the score of the maps that `predict` writes, on any mesh and over processes."""

import collections
import json
import shutil
import types

import jax
import numpy as np
import pytest
import runs
from flax import nnx
from PIL import Image
from test_evaluate import Pooled

from ktda_jax import UserError, predict, report, sharding
from ktda_jax.config.settings import Settings
from ktda_jax.data.pipeline import EvalBatches, EvalTiles, eval_batches
from ktda_jax.data.sources import FolderSource
from ktda_jax.metrics.confusion import count
from ktda_jax.models import flat
from ktda_jax.training import evaluate, loop, scoring
from ktda_jax.training.inputs import eval_source, to_evaluate
from ktda_jax.training.predicted import Model, Predictor, how

NATIVE = {"data.eval_scale": "native"}
CROP = (32, 32)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Tiles larger and smaller than the crop, with ignored pixels."""
    rng, root = np.random.default_rng(2), tmp_path_factory.mktemp("tiles")
    for number, size in enumerate([(70, 90), (32, 32), (100, 33), (20, 50), (64, 64)]):
        label = rng.integers(0, runs.CLASSES, size)
        label[rng.random(size) < 0.2] = 255
        runs.write_tile(root, "val", f"t{number}", rng.integers(0, 256, (*size, 3)), label)
    return FolderSource(root, "val", num_classes=runs.CLASSES)


def predictor(data=1, fsdp=1):
    graphdef, params, stats = flat.split(Pooled(nnx.Rngs(0)))
    mesh = sharding.make_mesh(data, fsdp)
    step = evaluate.make_eval_step(graphdef, runs.CLASSES, mesh)
    made = Predictor(Model(graphdef, None, runs.CLASSES, 3), mesh, CROP, 8, step)
    return made, jax.device_put(params, sharding.tree_shardings(mesh, params)), stats


def test_meshes_and_shares_of_processes_give_the_same_maps(source):
    model, params, stats = predictor()
    one = list(model(EvalTiles(source), params, stats, probabilities=True))
    assert [found.name for found in one] == [f"t{k}" for k in range(5)]
    for found in one:
        assert found.prediction.shape == found.label.shape == found.probabilities.shape[1:]
        np.testing.assert_allclose(found.probabilities.sum(0), 1, atol=1e-5)
        np.testing.assert_array_equal(found.probabilities.argmax(0), found.prediction)
    model, params, stats = predictor(2, 4)
    shares = [EvalTiles(source, process_index=k, process_count=2) for k in range(2)]
    parts = [found for share in shares for found in model(share, params, stats)]
    assert [found.index for found in parts] == [0, 2, 4, 1, 3]
    for found in parts:
        np.testing.assert_array_equal(found.prediction, one[found.index].prediction)
    assert list(EvalTiles(source, process_index=5, process_count=6)) == []  # more processes than tiles


def test_squeezed_predictions_are_those_that_the_device_counts(source):
    model, params, stats = predictor(8)
    batches = eval_batches(source, crop=CROP, batch_size=8)
    counted = evaluate.evaluate(model.eval_step, params, stats, batches, model.mesh, num_classes=runs.CLASSES)
    found = list(model(batches, params, stats, probabilities=True))
    np.testing.assert_array_equal(sum(tile.confusion for tile in found), counted.confusion)
    for tile in found:
        np.testing.assert_array_equal(tile.confusion, count(tile.label, tile.prediction, runs.CLASSES))
    assert all((tile.probabilities.argmax(0) == tile.prediction).mean() > 0.999 for tile in found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of tiles of 160 px with a crop of 64, evaluated at native scale: tiles, workdir, config, result."""
    folder = tmp_path_factory.mktemp("native")
    root = runs.make_tiles(folder / "data", train=1, val=3, size=160)
    config, program, state = runs.random_workdir(root, folder / "run", NATIVE)
    result = loop.evaluate_workdir(config, folder / "run", program=program)
    # What training would have written of it on the way.
    inputs = collections.namedtuple("Inputs", "val_batches")(eval_source(Settings.of(config).data, "val", 2)[0])
    told = []
    writer = types.SimpleNamespace(write=lambda step, scores: told.append(scores), message=lambda text: None)
    scoring.validate(6, Settings.of(config), program, inputs, state, {}, writer)
    return root, folder / "run", config, result, told[0]


def test_val_miou_is_that_of_the_maps_that_predict_writes(trained, tmp_path):
    root, workdir, _, result, told = trained
    predict.run(str(workdir), str(root / "img_dir" / "val"), str(tmp_path / "maps"))
    confusion = np.zeros((runs.CLASSES, runs.CLASSES), np.int64)
    for path in sorted((root / "ann_dir" / "val").iterdir()):
        label, mapped = (np.asarray(Image.open(p)) for p in (path, tmp_path / "maps" / path.name))
        confusion += count(label, mapped, runs.CLASSES)
    different = np.abs(confusion - result.confusion).sum() / 2
    assert (result.confusion.sum(0) > 1000).sum() >= 2
    assert different <= 1e-4 * confusion.sum()  # compiled for another batch, so rounded otherwise
    assert told["val/mIoU"] == result.metrics.summary["mIoU"]


def test_eval_and_report_say_how_they_scored_and_either_way_can_be_asked_for(trained, capsys):
    root, workdir, config, result, _ = trained
    again = loop.evaluate_workdir(config, workdir)
    np.testing.assert_array_equal(again.confusion, result.confusion)
    assert "tiles at their own scale, in windows of 64 x 64 that overlap by 16" in capsys.readouterr().out
    squeezed = loop.evaluate_workdir(runs.config(root), workdir)
    assert "tiles squeezed to 64 x 64" in capsys.readouterr().out
    assert squeezed.confusion.sum() == result.confusion.sum() and (squeezed.confusion != result.confusion).any()
    report.run([str(workdir)], tiles=2)
    page = (workdir / "report.html").read_text()
    assert "at their own scale, in windows of 64 x 64" in page and "mIoU in 95 % of draws of the tiles" in page
    assert page.count('class="figure"') == 2


def test_published_configs_squeeze_and_what_users_write_does_not():
    for name, scale in (("grass", "crop"), ("cloud", "crop"), ("custom", "native"), ("few_labels", "native")):
        made = runs.runpy.run_path(str(runs.REPOSITORY / "configs" / f"{name}.py"))["get_config"]("")
        assert made.data.eval_scale == scale, name


def test_which_way_a_split_is_read(source, tmp_path):
    root = runs.make_tiles(tmp_path / "data", train=1, val=1)
    for scale, kind in (("native", EvalTiles), ("crop", EvalBatches)):
        data = runs.settings(root, {"data.eval_scale": scale}).data
        assert isinstance(to_evaluate(data, source, 2), kind) and "64 x 64" in how(data)
    with pytest.raises(UserError, match=r"config.data.eval_scale is 'whole'; choose 'native' or 'crop'"):
        loop.train_and_evaluate(runs.config(root, {"data.eval_scale": "whole"}), tmp_path / "run")


def test_two_processes_score_as_one(trained, tmp_path):
    """Real ones, of which each maps its own tiles: the same confusion matrix, and figures of the first."""
    root, workdir, _, result, _ = trained
    settings = NATIVE | {"mesh.data": -1, "mesh.fsdp": 2}
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    processes = runs.start_two(*runs.arguments(root, copy, settings), "--mode=eval")
    for process in processes:
        runs.finish(process)
    saved = json.loads((copy / "figures" / "val.json").read_text())
    found = np.array(saved["confusion"])
    assert np.abs(found - result.confusion).sum() / 2 <= 1e-4 * found.sum()
