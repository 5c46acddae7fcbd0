"""benchmarks/evidence/: folds share no scene, choices see no scored tile, resuming, the table's numbers."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import runs
from PIL import Image

from benchmarks.evidence import folds, probe
from benchmarks.evidence import run as evidence
from benchmarks.evidence import table as evidence_table
from ktda_jax.config import checks
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.prediction import segmenter
from ktda_jax.weights import folder
from ktda_jax.weights.folder import Weights

TILES = pathlib.Path(__file__).parents[2] / "shared" / "real_samples" / "l8_biome_256"
MEASURED = dict(
    seconds=9.0, compile_s=2.0, steps=1, parameters=10, frozen=0, inference_gflop=1.0, device="none", date="",
    versions={},
)  # fmt: skip
BIOMES = ("Barren", "Forest", "Urban", "Water")
NAMES = [f"{biome}_{scene:02}_{number}" for biome in BIOMES for scene in range(3) for number in (7, 11)]


def counts(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 900, 4) * (rng.random(4) < 0.6) for name in NAMES}


def check_folds(found, counts, number):
    scenes = {}
    for name, fold in found.items():
        assert scenes.setdefault(folds.scene_of(name), fold) == fold, name  # no scene in two folds
    sizes = np.bincount(list(scenes.values()), minlength=number)
    assert sizes.max() - sizes.min() <= 1
    for biome in {folds.biome_of(name) for name in found}:
        held = [fold for scene, fold in scenes.items() if folds.biome_of(scene) == biome]
        assert len(set(held)) == min(len(held), number), biome
    for fold in range(number):
        assert (sum(counts[n] for n in found if found[n] != fold) > 0).all()


def test_folds_keep_scenes_whole_and_spread_biomes_and_classes():
    for seed in range(5):
        given = counts(seed)
        found = folds.assign(given, 4)
        check_folds(found, given, 4)
        assert found == folds.assign(dict(reversed(given.items())), 4)  # whatever the order
    with pytest.raises(ValueError, match="training part of fold . has no pixel of class 3"):
        folds.assign({n: np.array([5, 5, 5, n == NAMES[0]]) for n in NAMES}, 4)


@pytest.mark.skipif(not TILES.is_dir(), reason="needs ../shared")
def test_the_folds_of_the_real_tiles():
    tiles = folds.find_tiles(TILES)
    given = folds.count_classes(tiles, 4)
    found = folds.assign(given, 4)
    check_folds(found, given, 4)
    assert len(tiles) == 24 and np.bincount(list(found.values())).tolist() == [6, 6, 6, 6]
    shares = np.array([sum(given[n] for n in found if found[n] == f) for f in range(4)]) / sum(given.values())
    assert (shares > 0.02).all()  # every class is scored in every fold


def test_tiles_are_cut_into_squares(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    runs.write_tile(tmp_path / "data", "train", "Barren_00_7", image, image[..., 0] % 4)
    tiles = folds.find_tiles(tmp_path / "data")
    assert folds.size(tiles) == (8, 12)
    folds.write_folder(tmp_path / "cut", tiles, tiles, [], cut=4)
    corners = [(y, x) for y in (0, 4) for x in (0, 4, 8)]
    for kind, whole in (("img_dir", image), ("ann_dir", image[..., 0] % 4)):
        for number, (y, x) in enumerate(corners):
            square = np.asarray(Image.open(tmp_path / "cut" / kind / "train" / f"Barren_00_7-{number}.png"))
            np.testing.assert_array_equal(square, whole[y : y + 4, x : x + 4])
    with pytest.raises(ValueError, match="is 8x12, which squares of 5 pixels do not fill"):
        folds.write_folder(tmp_path / "other", tiles, tiles, [], cut=5)
    folds.write_folder(tmp_path / "whole", tiles, tiles, [], cut=None)
    assert (tmp_path / "whole" / "img_dir" / "train" / "Barren_00_7.png").is_symlink()


def test_fewer_labels_are_nested_and_keep_every_class():
    given = counts()
    quarter, half, whole = (set(folds.fewer(NAMES, given, percent, seed=3)) for percent in (25, 50, 100))
    assert len(quarter) == 6 and len(half) == 12 and quarter < half < whole == set(NAMES)
    assert (sum(given[n] for n in quarter) > 0).all()
    assert quarter == set(folds.fewer(NAMES, given, 25, seed=3)) != set(folds.fewer(NAMES, given, 25, seed=4))
    one_each = {n: np.eye(4, dtype=int)[k % 4] for k, n in enumerate(NAMES)}
    with pytest.raises(ValueError, match="1 tiles, 4 % of 24, cannot hold every class"):
        folds.fewer(NAMES, one_each, 4, seed=0)


def result(name, fold, seed, confusion, percent=100):
    return {**MEASURED, **dict(name=name, fold=fold, seed=seed, percent=percent, confusion=confusion)}


def two_classes(right):
    """A confusion matrix of 100 + 100 pixels, `right` of each right."""
    return [[right, 100 - right], [100 - right, right]]


def test_the_table_is_plain_arithmetic(tmp_path):
    """IoU of both classes: right / (200 - right), so 60 gives 3/7 and 80 gives 2/3."""
    right = {"student": {(0, 0): 50, (0, 1): 60, (1, 0): 70, (1, 1): 80},
             "full": {(0, 0): 60, (0, 1): 70, (1, 0): 90, (1, 1): 90}}  # fmt: skip
    found = [result(name, *key, two_classes(n)) for name, runs_ in right.items() for key, n in runs_.items()]
    student, full = evidence_table.rows(found)
    iou = {n: {k: 100 * r / (200 - r) for k, r in right[n].items()} for n in right}
    values = np.array(list(iou["full"].values()))
    assert full["miou"] == pytest.approx(values.mean()) and full["miou_sd"] == pytest.approx(values.std(ddof=1))
    assert full["aacc"] == pytest.approx(77.5) and full["seconds"] == 7 and full["runs"] == 4
    # Over both folds seed 0 has 150 of 200 right in each class, seed 1 has 160.
    assert full["union"] == pytest.approx((100 * 150 / 250 + 100 * 160 / 240) / 2)
    differences = np.array([iou["full"][k] - iou["student"][k] for k in right["student"]])
    by_fold = differences.reshape(2, 2).mean(1)
    assert student["difference"] is None and full["difference"]["mean"] == pytest.approx(differences.mean())
    assert full["difference"]["se_folds"] == pytest.approx(abs(by_fold[0] - by_fold[1]) / 2)
    assert full["difference"]["se_runs"] == pytest.approx(differences.std(ddof=1) / 2)
    assert evidence_table.paired({(0, 0): 1.0}, {(1, 0): 1.0}) is None
    text = evidence_table.write(found, tmp_path, ("a", "b"), command="c")
    assert f"{differences.mean():+.2f} ± {full['difference']['se_folds']:.2f}" in text
    assert (tmp_path / "figure.png").stat().st_size > 5000 and text in (tmp_path / "table.md").read_text()


def test_the_probe_learns_what_is_linear():
    """A token's class is the sign of a feature; half of a token's pixels may be of another class, or ignored."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 5)).astype(np.float32) * (1, 100, 1, 0, 0.01) + 3
    hot = np.eye(2, dtype=np.float32)[(x[:, 1] > 3).astype(int)]
    table, bias = probe.fit(x, hot, 1e-4)
    assert ((x @ table + bias).argmax(1) == hot.argmax(1)).mean() > 0.98
    label = np.array([[0, 0, 1], [0, 255, 1], [1, 1, 1]], np.uint8)
    shares = probe.class_shares(label, 2, 2)
    assert shares.tolist() == [[[0.75, 0.0], [0.0, 0.5]], [[0.0, 0.5], [0.0, 0.25]]]


@pytest.fixture
def study(tmp_path):
    """arguments(**more) of a command on twelve tiny tiles, four scenes of three biomes, and a tiny random teacher."""
    rng, data = np.random.default_rng(0), tmp_path / "data"
    for number in range(12):
        label = np.kron(rng.integers(0, 4, (6, 6)), np.ones((8, 8))).astype(np.uint8)
        image = label[..., None] * 50 + rng.integers(0, 40, (48, 48, 3))
        runs.write_tile(data, ("train", "val")[number % 2], f"{BIOMES[number // 4]}_{number % 4:02}_0", image, label)
    sizes = {**runs.TINY, "data.crop": (48, 48), "model.teacher.image_size": (48, 48), "mesh.data": 1}
    del sizes["loss.alpha"]  # which ablations are about
    config = runs.config(data, sizes)
    teacher = Weights("teacher", model_of(Settings.of(config)).teacher, runs.random_teacher(config), {})
    folder.save(tmp_path / "teacher", teacher)
    cache = jax.config.jax_compilation_cache_dir

    def arguments(**more):
        given = {"data": data, "teacher": tmp_path / "teacher", "output": tmp_path / "out", "folds": 3, "seeds": 0}
        return [f"--{k}={v}" for k, v in {**given, **more}.items()] + [f"--set={k}={v}" for k, v in sizes.items()]

    yield arguments
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.fixture
def fake(monkeypatch):
    """Training is replaced; fake.configs are those that were asked for. Larger learning rates look better."""

    class Fake:
        configs, stop_at = [], None

        def __call__(self, config, workdir):
            if len(self.configs) == self.stop_at:
                raise evidence.Stopped
            self.configs.append(config)
            right = 50 + int(1e4 * config.optimizer.lr) + 5 * config.model.fam
            confusion = np.kron(two_classes(right), np.eye(2, dtype=int)).tolist()
            return {**MEASURED, "confusion": confusion}

    instance = Fake()
    instance.configs = []
    monkeypatch.setattr(evidence, "_train", instance)
    return instance


def test_it_goes_on_where_it_was_stopped(study, fake, tmp_path, capsys):
    command = study(names="student,full", labels="50,100")
    fake.stop_at = 4
    with pytest.raises(SystemExit, match="error: stopped; the same command goes on"):
        evidence.main(command)
    fake.stop_at = None
    evidence.main(command)
    assert len(fake.configs) == 2 * 2 * 3  # none twice
    assert all(c.eval_every == c.total_steps for c in fake.configs)  # the scored tiles select nothing
    table = (tmp_path / "out" / "table.md").read_text()
    evidence.main(command)
    assert len(fake.configs) == 12 and (tmp_path / "out" / "table.md").read_text() == table
    evidence.main([*command, "--set=optimizer.b2=0.9"])  # another setting is another run
    assert len(fake.configs) == 24


def test_hyper_parameters_are_chosen_without_the_scored_tiles(study, fake, tmp_path):
    candidates = {"full": [{"optimizer.lr": lr, "loss.alpha": 0.7} for lr in (1e-4, 2e-3, 1e-3)]}
    evidence.main([*study(names="full", candidates=json.dumps(candidates)), "--choose"])
    assigned = json.loads((tmp_path / "out" / "folds.json").read_text())
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/choice/full/*/result.json")]
    assert len(records) == len(fake.configs) == 9
    for path in (tmp_path / "out").glob("runs/choice/full/*/result.json"):
        record, scored = json.loads(path.read_text()), int(path.parent.name[4])
        assert {assigned[n] for n in (*record["train"], *record["val"])} == {0, 1, 2} - {scored}
        assert not set(record["train"]) & set(record["val"])
    choice = json.loads((tmp_path / "out" / "choice.json").read_text())["chosen"]["full"]
    assert [choice[f]["overrides"] for f in "012"] == [candidates["full"][1]] * 3
    fake.configs.clear()
    evidence.main(study(names="full,mse"))
    assert [c.loss.alpha for c in fake.configs] == [0.7] * 3 + [0.0] * 3  # mse, which has no choice, as configured
    with pytest.raises(SystemExit, match="choice.json was made for other folds; take another --output"):
        evidence.main(study(names="full", folds=4))
    with pytest.raises(SystemExit, match="choice.json was made for other set; take another --output"):
        evidence.main([*study(names="full"), "--set=optimizer.b2=0.9"])


def test_tiles_are_cut_for_trainings_whatever_probes_did_before(study, fake, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence.Study, "_probe", lambda *_: {**MEASURED, "confusion": two_classes(50)})
    command = [*study(names="probe,student"), "--set=data.crop=(24, 24)"]
    evidence.main(command)
    shapes = {Image.open(p).size for c in fake.configs for p in pathlib.Path(c.data.root).glob("*/*/*.png")}
    assert shapes == {(24, 24)} and len(fake.configs) == 3
    for image in (tmp_path / "data" / "img_dir").glob("*/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(image))).save(image)
    evidence.main(command)  # other pixels are other runs, on tiles that are cut anew
    assert len(fake.configs) == 6 and not {c.data.root for c in fake.configs[3:]} & {
        c.data.root for c in fake.configs[:3]
    }


def test_a_result_belongs_to_its_teacher(study, fake, tmp_path):
    command = study(names="student,full")
    evidence.main(command)
    (tmp_path / "teacher" / "note.txt").write_text("other weights")
    evidence.main(command)
    assert [c.distill for c in fake.configs] == [False] * 3 + [True] * 6  # the student has no teacher


@pytest.mark.slow
def test_tiny_configurations_end_to_end(study, tmp_path):
    """KTDA distilled from precomputed features, a frozen encoder, and the probe; on real trainings of six steps."""
    command = [
        sys.executable,
        "benchmarks/evidence/run.py",
        *study(names="scaled,dinov2,probe", folds=2),
        "--keep_checkpoints",
    ]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": runs.xla_flags(1),
        "PYTHONPATH": str(runs.REPOSITORY),
    }
    done = subprocess.run(command, cwd=runs.REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/*/*/result.json")]
    assert len(found) == 6
    for record in found:
        assert np.sum(record["confusion"]) == 6 * 48 * 48  # all pixels of the fold's six tiles
    by_name = {r["name"]: r for r in found}
    assert by_name["dinov2"]["frozen"] > 0 == by_name["scaled"]["frozen"]
    assert by_name["dinov2"]["inference_gflop"] > by_name["dinov2"]["frozen"] / 1e9
    assert len(list((tmp_path / "out").glob("features/*/*.json"))) == 2  # of either training part
    # The frozen encoder comes along where a training is used: it predicts what was scored.
    workdir = next((tmp_path / "out").glob("runs/dinov2_100/fold0*"))
    model, tiles = segmenter.load_pretrained(workdir), folds.find_tiles(tmp_path / "data")
    confusion = np.zeros((4, 4), int)
    record = json.loads((workdir / "result.json").read_text())
    for name in record["val"]:
        labels = model.predict(tiles[name][0]).labels
        np.add.at(confusion, (np.asarray(Image.open(tiles[name][1])), labels), 1)
    assert confusion.tolist() == record["confusion"]
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match="its frozen encoder cannot be read: .*teacher"):
        segmenter.load_pretrained(workdir)
    table = (tmp_path / "out" / "table.md").read_text()
    assert all(f"| 100 % | {name} | 2 |" in table for name in by_name)


def test_every_ablation_is_a_valid_config():
    for name in evidence.ABLATIONS["ABLATIONS"]:
        for argument in (name, f"{name},small"):
            config = evidence.ABLATIONS["get_config"](argument)
            checks.resolve(config)
            model_of(Settings.of(config))
    with pytest.raises(ValueError, match="ablation 'fll' is unknown; known: student, fam"):
        evidence.ABLATIONS["get_config"]("fll")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(names="student,fll"), "error: --names=fll is unknown; known: student"),
        (dict(teacher="nowhere"), "error: no --teacher=nowhere"),
        (dict(names="full,mse", set="loss.alpha=0.7"), "error: --set=loss.alpha is what the ablation mse is about"),
        (dict(set="model.x=1"), "error: --set or --candidates: "),
        (dict(folds=20), "error: 12 scenes are too few for 20 folds"),
        (dict(data="nowhere"), "error: no tiles in nowhere"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(study, fake, given, message):
    with pytest.raises(SystemExit) as error:
        evidence.main(study(**given))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
