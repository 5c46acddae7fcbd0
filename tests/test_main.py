"""The command itself: killed and resumed bit for bit, quiet, and one line for every kind of bad input."""

import functools
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import rasterio
import runs
from flax import nnx
from PIL import Image

from ktda_jax.config import workdir as records
from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.weights import folder

SETTINGS = {"total_steps": 24, "eval_every": 6, "checkpoint_every": 2, "ema": 0.9}


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture(scope="module")
def command(tiles, tmp_path_factory):
    """command(workdir) starts the same command each time.

    It finds a torch and a tensorflow that leave a mark when imported.
    """
    folder = tmp_path_factory.mktemp("command")
    for name in ("torch", "tensorflow"):
        (folder / f"{name}.py").write_text(f"open({str(folder / f'{name}.imported')!r}, 'w'); raise ImportError")

    def start(workdir, *flags):
        flags = (*runs.arguments(tiles, workdir, SETTINGS), *flags)
        return runs.start(*flags, PYTHONPATH=str(folder))

    start.folder = folder
    return start


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """(workdir, stdout, stderr) of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    return workdir, *runs.finish(command(workdir))


# Resuming ---------------------------------------------------------------------------------------------------------


def being_written(workdir) -> bool:
    """A checkpoint after step 4 is on its way to the disk."""
    names = [path.name for path in workdir.glob("checkpoints/*")]
    return runs.reached(workdir, 5) and any(not name.isdigit() for name in names)


@pytest.mark.slow
def test_killed_while_saving_then_stopped_then_finished_is_the_same_run(whole, command, tiles, tmp_path):
    first = command(tmp_path)
    runs.wait_for(functools.partial(being_written, tmp_path), first)
    first.send_signal(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL and first.stdout.read().count("step/s") < 3

    second = command(tmp_path)
    runs.wait_for(functools.partial(runs.reached, tmp_path, 13), second)
    second.send_signal(signal.SIGTERM)
    out, err = runs.finish(second, 143)
    stopped = int(re.search(r"stopped by a signal at step (\d+); run the same command to go on", out)[1])
    assert re.search(r"resuming at step [246]\b", out) and 13 <= stopped < 24 and err == ""

    out, _ = runs.finish(command(tmp_path))
    assert f"resuming at step {stopped}" in out
    runs.assert_same_run(whole[0], tmp_path, tiles, SETTINGS)
    assert runs.steps(tmp_path, "train/loss") == list(range(1, 25))
    assert runs.steps(tmp_path, "val/mIoU") == [6, 12, 18, 24]
    assert all(path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir())  # no half-written ones left


@pytest.mark.slow
def test_kills_at_random_times_change_nothing(whole, command, tiles, tmp_path):
    """At no particular moment after random steps, and once before the first: a fixed time would be early or late."""
    rng = np.random.default_rng(0)
    for step in (1, *sorted(rng.choice(range(2, 23), 3, replace=False))):
        process = command(tmp_path)
        runs.wait_for(functools.partial(runs.reached, tmp_path, step), process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
    runs.finish(command(tmp_path))
    runs.assert_same_run(whole[0], tmp_path, tiles, SETTINGS)


@pytest.mark.slow
def test_a_kill_changes_nothing_as_users_compile(tiles, tmp_path):
    """The same with XLA's optimisations, and compiling anew after the kill."""
    settings = SETTINGS | {"model.student.depths": (0, 0, 0, 1), "model.fmm.enabled": False, "eval_every": 24}
    whole, killed = (runs.arguments(tiles, tmp_path / name, settings) for name in ("whole", "killed"))
    runs.finish(runs.start(*whole, **runs.AS_USERS_COMPILE))
    process = runs.start(*killed, **runs.AS_USERS_COMPILE)
    runs.wait_for(functools.partial(runs.reached, tmp_path / "killed", 11), process)
    process.kill()
    process.wait()
    out, _ = runs.finish(runs.start(*killed, **runs.AS_USERS_COMPILE))
    assert "resuming at step" in out
    runs.assert_same_run(tmp_path / "whole", tmp_path / "killed", tiles, settings)


def table(out: str) -> str:
    """The part of the output that reports scores, less the folder's name."""
    return out[out.index("val split") : out.index("figures in")]


def test_finished_runs_report_again_and_train_nothing(whole, command):
    workdir, out, _ = whole
    before = (workdir / "metrics.jsonl").read_text()
    saved = {path: path.stat().st_mtime_ns for path in (workdir / "checkpoints").rglob("*") if path.is_file()}
    again, _ = runs.finish(command(workdir))
    assert table(again) == table(out) and "resuming at step 24" in again
    evaluated, _ = runs.finish(command(workdir, "--mode=eval", "--config.data.test_split=train"))
    assert table(evaluated.replace("train split", "val split")) != table(out)
    assert (workdir / "figures" / "train_confusion.png").exists()
    rows = runs.rows(workdir)
    assert [row["split"] for row in rows if "split" in row] == ["val", "train"]
    kept = (line for line in (workdir / "metrics.jsonl").read_text().splitlines() if '"split": "train"' not in line)
    assert "\n".join(kept) + "\n" == before
    assert {path: path.stat().st_mtime_ns for path in saved} == saved


def test_a_normal_run_is_quiet(whole):
    _, out, err = whole
    assert err == ""
    assert not [line for line in out.splitlines() if re.match(r"[WIE]\d{4} |.*Warning", line)]


def test_neither_torch_nor_tensorflow_is_imported(command, whole):
    """tensorboardX, for one, imports torch wherever it finds it."""
    assert not list(command.folder.glob("*.imported"))
    environment = {**os.environ, "PYTHONPATH": str(command.folder)}
    subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True)
    assert [path.stem for path in command.folder.glob("*.imported")] == ["torch"]  # the mark works


def test_the_best_checkpoint_is_the_one_reported(whole):
    workdir, out, _ = whole
    scores = {row["step"]: row["val/mIoU"] for row in runs.rows(workdir) if "val/mIoU" in row}
    (final,) = [row for row in runs.rows(workdir) if "final/mIoU" in row and row["split"] == "val"]
    assert final["final/mIoU"] == pytest.approx(max(scores.values()), abs=1e-9) == pytest.approx(scores[final["step"]])
    assert {int(path.name) for path in (workdir / "checkpoints").iterdir()} == {final["step"], 22, 24}
    assert f"val split, step {final['step']}:" in out


# Bad input --------------------------------------------------------------------------------------------------------


def run_forked(arguments, devices, report):
    """What `python -m ktda_jax.main` does, in a fork of a process that has imported the libraries already."""
    os.environ["XLA_FLAGS"] = runs.xla_flags(devices)
    os.environ["JAX_PLATFORMS"] = "cpu"
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(report / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    compiled = []

    def listen(event, duration, fun_name="", **_):
        if "backend_compile" in event:
            compiled.append(fun_name)
            (report / "compiled").write_text(json.dumps(compiled))

    jax.monitoring.register_event_duration_secs_listener(listen)
    sys.argv = ["ktda_jax.main", *map(str, arguments)]
    runpy.run_module("ktda_jax.main", run_name="__main__")


@pytest.fixture
def refusal(tiles, tmp_path):
    """refusal(flags..., settings) -> the line on stderr of a command that must fail, before it compiles anything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ktda_jax.training.loop", "ktda_jax.figures.plots"])

    def run(*flags, devices=1, workdir=None, root=None, compiles=False, **settings):
        settings = {name.replace("__", "."): value for name, value in settings.items()}
        arguments = runs.arguments(root or tiles, workdir or tmp_path / "run", SETTINGS | settings)
        process = context.Process(target=run_forked, args=([*arguments, *flags], devices, tmp_path))
        process.start()
        process.join(120)
        lines = (tmp_path / "err").read_text().splitlines()
        assert process.exitcode == 1, lines
        assert len(lines) == 1 and lines[0].startswith("error: "), lines
        compiled = json.loads(runs.read(tmp_path / "compiled", "[]"))
        assert compiles == any("train_step" in name or "eval_step" in name for name in compiled), compiled
        return lines[0]

    return run


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--config.nosuch=1", "config.nosuch is not a setting"),
        ("--config.data.croop=3", 'config.data.croop is not a setting. Did you mean "crop"'),
        ("--config.batch_size=four", "flag --config.batch_size=four: invalid literal for int()"),
        ("--nosuch=1", "Unknown command line flag 'nosuch'"),
        ("--config=configs/grass.py:tyni", "config argument 'tyni' is unknown; known: tiny, upstream"),
        ("--config=configs/gras.py", "No such file or directory: 'configs/gras.py'"),
        *(
            (f"--profile={text}", f"--profile={text}: give START:STOP, steps from 1 to config.total_steps=24")
            for text in ("0:1", "3:2", "24:25", "3", "a:b")
        ),
        ("--mode=test", "--mode=test: value should be one of <train|eval>"),
        ("--coordinator=localhost:1", "needs --num_processes and --process_id"),
        ("configs/grass.py", "unexpected argument 'configs/grass.py'; settings are given as --config.KEY=VALUE"),
    ],
)
def test_mistyped_commands(refusal, flag, message):
    assert message in refusal(flag)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data__root": "/nowhere"}, "/nowhere/img_dir/train"),
        ({"data__root": None}, "config.data.root is not set"),
        ({"data__val_split": "vla"}, "img_dir/vla"),
        ({"data__crop": (128, 128)}, "6 of 6 images are smaller than the crop of 128 x 128"),
        ({"data__on_corrupt": "ignore"}, "on_corrupt is 'ignore'"),
        ({"model__grid": (3, 3)}, "config.model.grid is (3, 3), but the teacher sees a 64x64 crop as 5x5 patches"),
        ({"model__teacher__heads": 3}, "config.model.teacher.heads is 3, which does not divide 16"),
        ({"model__fmm__form": "conv"}, "model.fmm.form is 'conv'"),
        ({"batch_size": 3, "devices": 2}, "config.batch_size is 3, which 2 devices do not divide"),
        ({"mesh__fsdp": 3, "devices": 2}, "config.mesh (data=-1, fsdp=3) does not fit 2 devices"),
        ({"loss__kl_axis": "height"}, "config.loss.kl_axis is 'height'; choose one of width, channel, position"),
        ({"weights__student": "/nowhere"}, "config.weights.student: no file or folder /nowhere"),
        ({"weights__teacher": "/nowhere"}, "config.weights.teacher: no file or folder /nowhere"),
        ({"total_steps": 0}, "config.total_steps is 0"),
    ],
)
def test_settings_that_cannot_work(refusal, settings, message):
    assert message in refusal(**settings)


def truncate(root):
    path = root / "img_dir" / "train" / "t1.png"
    path.write_bytes(path.read_bytes()[:200])


def rename(root):
    for path in (root / "ann_dir" / "train").iterdir():
        path.rename(path.with_name(f"label_{path.name}"))


def write_odd(root, *, label_size=72, value=0):
    image, label = np.zeros((72, 72, 3)), np.full((label_size, 72), value)
    runs.write_tile(root, "train", "odd", image, label)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (truncate, "1 of 6 tiles cannot be read"),
        (rename, "no image in"),
        (
            functools.partial(write_odd, value=5),
            "label values outside 0..4 that are not 255 in 1 of 7 tiles: img_dir/train/odd.png",
        ),
        (functools.partial(write_odd, label_size=64), "ann_dir/train/odd.png (image 72 x 72, label 64 x 72)"),
        (lambda root: shutil.rmtree(root / "ann_dir"), "ann_dir/train"),
    ],
)
def test_data_that_cannot_be_used(refusal, tmp_path, spoil, message):
    root = runs.make_tiles(tmp_path / "tiles")
    spoil(root)
    assert message in refusal(root=root)
    assert not (tmp_path / "run").exists()  # nothing is begun that would have to be cleared away


def test_weights_of_another_shape(refusal, tmp_path):
    other = ConvNeXtConfig(depths=(1, 1, 1, 1), channels=(8, 8, 16, 32))
    folder.save(tmp_path / "w", folder.Weights("student", other, {"norms/0/scale": np.ones(8, np.float32)}, {}))
    line = refusal(weights__student=tmp_path / "w")
    assert (
        "the student in" in line and "has depths (1, 1, 1, 1) (config: (0, 0, 1, 1)), channels (8, 8, 16, 32)" in line
    )


@pytest.mark.slow
def test_multi_band_tiles_with_drawn_masks(tmp_path):
    """configs/custom.py on four bands of 16 bits and masks in colours, the student started from weights for RGB."""
    rng, colours = np.random.default_rng(0), np.array([(0, 0, 0), (255, 0, 0), (9, 9, 9)], np.uint8)
    for split in ("train", "val"):
        for name in "ab":
            ids = np.kron(rng.integers(0, 3, (4, 4)), np.ones((16, 16), int))
            for kind in ("img_dir", "ann_dir"):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
            Image.fromarray(colours[ids]).save(tmp_path / "ann_dir" / split / f"{name}.png")
            pixels = (ids * 1000 + rng.integers(0, 400, (4, 64, 64))).astype(np.uint16)
            pixels[:, :8] = 7777  # no data
            options = dict(driver="GTiff", height=64, width=64, count=4, dtype=np.uint16, nodata=7777)
            with rasterio.open(tmp_path / "img_dir" / split / f"{name}.tif", "w", **options) as file:
                file.write(pixels)
    student = KTDAConfig.from_dict({**runs.config(tmp_path).model, "num_classes": 2}).student
    _, shapes, _ = flat.abstract(lambda: ConvNeXt(student, rngs=nnx.Rngs(0)))
    folder.save(tmp_path / "rgb", folder.Weights("student", student, runs._random(shapes), {}))
    settings = {
        "data.root": tmp_path, **runs.TINY, "total_steps": 4, "eval_every": 4, "weights.student": tmp_path / "rgb",
        "data.bands": (1, 2, 3, 4), "data.rgb": (3, 2, 1), "data.scale": (0, 2500),
        "data.label_map": (((0, 0, 0), 0), ((255, 0, 0), 1), ((9, 9, 9), 255)),
    }  # fmt: skip
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    custom = f"--config={runs.REPOSITORY / 'configs' / 'custom.py'}:tiny"
    out, err = runs.finish(runs.start(custom, f"--workdir={tmp_path / 'run'}", *flags))
    assert "background" in out and (tmp_path / "run/figures/val_samples.png").exists()
    assert np.isfinite(runs.rows(tmp_path / "run")[0]["train/distill"])
    report = json.loads((tmp_path / "run/figures/val.json").read_text())
    labels = np.concatenate([np.array(Image.open(p)) for p in (tmp_path / "ann_dir/val").iterdir()])
    counted = [sum((labels[r + 8 : r + 64] == c).all(-1).sum() for r in (0, 64)) for c in colours[:2]]
    assert np.sum(report["confusion"], 1).tolist() == counted
    shape = json.loads((tmp_path / "run/config.json").read_text())["data"]["bands"]
    assert shape == [1, 2, 3, 4]
    assert "Traceback" not in err


def test_another_workdir(refusal, whole):
    line = refusal("--config.seed=7", workdir=whole[0])
    assert line.endswith("(saved 42, now 7); use another --workdir, or the saved settings") and "seed" in line


def test_evaluation_needs_a_checkpoint_of_this_model(refusal, whole, tmp_path):
    assert "no checkpoints in" in refusal("--mode=eval")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "no checkpoint in" in refusal("--mode=eval")
    line = refusal("--mode=eval", workdir=whole[0], model__head_channels=24)
    assert "was begun with another config: model.head_channels (saved 16, now 24)" in line


def test_a_loss_that_is_not_finite_names_term_and_step(refusal, tmp_path):
    # Settings that compile fastest; the first step's huge update spoils the second one's losses.
    line = refusal(
        compiles=True, total_steps=4, optimizer__lr=1e30, schedule__warmup=0, distill=False, ema=None,
        model__student__depths=(0, 0, 0, 0), model__aux_channels=0,
    )  # fmt: skip
    assert re.search(r"not finite at step 2: .*decode is nan.*; no checkpoint was written yet\. Lower config", line)
    records.compare(tmp_path / "run", runs.settings("elsewhere"))  # the workdir may be used again
