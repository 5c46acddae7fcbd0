"""benchmarks/torch_peer/: the PyTorch model against the reference's numbers, the check, and the whole command."""

import json
import os
import pathlib
import runpy
import subprocess
import sys
import types
from typing import NamedTuple

import golden
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.torch_peer import compare as torch_compare  # noqa: E402
from benchmarks.torch_peer import model as torch_model  # noqa: E402
from benchmarks.torch_peer import worker as torch_worker  # noqa: E402
from ktda_jax.config.model import model_of  # noqa: E402
from ktda_jax.config.settings import Settings  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # these sizes are too small to share among threads
CPU = torch.device("cpu")
SPEC = types.SimpleNamespace(
    loss=types.SimpleNamespace(class_weights=None, avg_non_ignore=False, aux_weight=0.4, alpha=0.5, temperature=1.0),
    optimizer=types.SimpleNamespace(lr=6e-4, b1=0.9, b2=0.999, weight_decay=0.01),
    schedule=types.SimpleNamespace(warmup=3, poly_begin=None, power=0.9, total_steps=8),
)
SMALL = {  # of grass.py:tiny
    "batch_size": 2, "data.crop": (64, 64), "model.student.depths": (1, 1, 1, 1),
    "model.student.channels": (8, 8, 16, 16), "model.teacher.width": 16, "model.teacher.heads": 2,
    "model.head_channels": 8, "model.dropout": 0.0, "model.aux_channels": 8, "loss.alpha": 0.5,
}  # fmt: skip
SIZES = dict(steps=2, warmup=1, forwards=2, forward_batch=1)


def reference(name: str) -> tuple:
    """The golden model in float64, and its batch."""
    model = torch_model.KTDA(golden.config(name, dropout=0.0)).double()
    tensors = torch.load(golden.GOLDENS / f"{name}.pth", weights_only=True)["state_dict"]
    model.load_state_dict(tensors, strict=True)
    for key, values in (("mean", torch_model.MEAN), ("std", torch_model.STD)):  # unrounded
        setattr(model, key, torch.tensor(values, dtype=torch.float64).view(3, 1, 1))
    arrays = golden.arrays(name)
    images = torch.from_numpy(arrays["image_rgb_uint8"]).permute(0, 3, 1, 2)
    labels = torch.from_numpy(arrays["label_uint8"]).long() if "label_uint8" in arrays else None
    return model, images, labels


@pytest.mark.parametrize("name", ["grass_tiny", "grass_tiny_resized"])
def test_logits_and_teacher_equal_the_reference(name):
    model, images, _ = reference(name)
    expected = golden.arrays(name)
    with torch.no_grad():
        logits = model.eval()(images)
        taps = model.teach_backbone(model.normalize(images))
    assert golden.relative(logits, expected["eval/decode_logits"]) < 1e-12
    assert len(taps) == 4
    for k, tap in enumerate(taps):
        assert golden.relative(tap, expected[f"eval/teacher/{k}"]) < 1e-12


@pytest.mark.parametrize("passes", [1, 2])
def test_losses_and_every_gradient_equal_the_reference(passes):
    model, images, labels = reference("grass_tiny")
    expected = golden.arrays("grass_tiny")
    terms = torch_worker.Training(model, SPEC, passes=passes).gradients(images, labels)
    names = dict(decode="decode.loss_ce", aux="aux.loss_ce", distill="distill_loss", loss="total", acc="decode.acc_seg")
    for ours, theirs in names.items():
        limit = 1e-6 if ours == "acc" else 1e-9  # the reference computes the accuracy in float32
        assert abs(float(terms[ours]) / expected[f"train0/{theirs}"] - 1) < limit, ours
    found = {k: p.grad for k, p in model.named_parameters() if p.requires_grad}
    grads = {k.removeprefix("train0/grad/"): v for k, v in expected.items() if k.startswith("train0/grad/")}
    assert found.keys() == grads.keys()
    largest = max(np.linalg.norm(g) for g in grads.values())
    for name, gradient in grads.items():  # attention's key biases have none at all
        allowed = 1e-9 * (np.linalg.norm(gradient) + 1e-6 * largest)
        assert np.linalg.norm(found[name].numpy() - gradient) <= allowed, name


@pytest.mark.parametrize("passes", [1, 2])
def test_eight_steps_follow_the_reference(passes):
    """AdamW's groups, the learning rate and BatchNorm's statistics."""
    model, images, labels = reference("grass_tiny")
    expected = golden.arrays("grass_tiny")
    training = torch_worker.Training(model, SPEC, passes=passes)
    rates, totals = [], []
    for _ in range(8):
        rates.append(training.optimizer.param_groups[0]["lr"])
        totals.append(float(training.step(images, labels)["loss"]))
    np.testing.assert_allclose(rates, expected["traj/lr"], rtol=1e-12)
    np.testing.assert_allclose(totals, expected["traj/total"], rtol=1e-9)
    after = model.state_dict()
    final = {k.removeprefix("traj/final/"): v for k, v in expected.items() if k.startswith("traj/final/")}
    assert len(final) == 8
    for name, value in final.items():
        assert golden.relative(after[name], value) < 1e-9, name


def test_decay_is_upstreams():
    """Of every parameter of the base model, by name."""
    published = json.loads((golden.GOLDENS / "parameters_base.json").read_text())
    config = model_of(Settings.of(runpy.run_path(str(ROOT / "configs" / "grass.py"))["get_config"]()))
    with torch.device("meta"):
        model = torch_model.KTDA(config)
        training = torch_worker.Training(model, SPEC, passes=1)
    found = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    assert found == {row["name"]: tuple(row["shape"]) for row in published if row["trainable"]}
    decaying = {id(p) for group in training.optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert {n for n, p in model.named_parameters() if id(p) in decaying} == {
        row["name"] for row in published if row["trainable"] and row["weight_decay"]
    }


def test_the_cloud_schedule_is_ours():
    from ktda_jax.training import optim

    options = types.SimpleNamespace(warmup=2000, poly_begin=1000, power=0.9, total_steps=80_000)
    schedule = optim.warmup_poly(1.0, 80_000, warmup=2000, poly_begin=1000)
    steps = [0, 1, 999, 1000, 1500, 1999, 2000, 40_000, 79_999]
    found = [torch_worker.learning_rate(step, options) for step in steps]
    np.testing.assert_allclose(found, [float(schedule(step)) for step in steps], rtol=1e-5)


def test_drop_path_and_compilation():
    """Whole samples go, the rest grows; and the loss is one graph, student twice, for torch.compile."""
    drop = torch_model.DropPath(0.5)
    x = drop(torch.ones(400, 3, 2, 2))
    assert sorted(x.unique().tolist()) == [0.0, 2.0] and abs(x.mean() - 1) < 0.2
    assert (x.flatten(1).std(1) == 0).all()
    assert (drop.eval()(x) == x).all()

    model, images, labels = reference("grass_tiny")
    training = torch_worker.Training(model, SPEC, passes=2)
    plain = training.gradients(images, labels)["loss"]
    training.terms = torch.compile(training.terms, backend="eager", fullgraph=True)
    assert abs(training.gradients(images, labels)["loss"] / plain - 1) < 1e-12


class Run(NamedTuple):
    """The whole command: what it printed, its report, and the folder with the weights and the batch."""

    lines: list[str]
    report: dict
    folder: pathlib.Path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    """On a tiny model, where neither grain nor tensorflow_datasets nor OpenCV can be imported."""
    place = tmp_path_factory.mktemp("peer")
    for module in ("grain", "tensorflow_datasets", "cv2"):
        (place / f"{module}.py").write_text(f"raise ImportError('{module} is not here')\n")
    flags = [f"--config.{k}={v}" for k, v in SMALL.items()] + [f"--{k}={v}" for k, v in SIZES.items()]
    flags += ["--variants=once,tf32", f"--output={place / 'result.json'}", f"--folder={place / 'sides'}"]
    single = {"XLA_FLAGS": "", "OMP_NUM_THREADS": "1"}  # one device; and sizes too small to share among threads
    environment = os.environ | {"PYTHONPATH": f"{place}{os.pathsep}{ROOT}"} | single
    command = [sys.executable, "benchmarks/torch_peer/run.py", "--config=configs/grass.py:tiny", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return Run(done.stdout.splitlines(), json.loads((place / "result.json").read_text()), place / "sides")


@pytest.mark.slow
def test_the_table(run):
    (start,) = (k for k, line in enumerate(run.lines) if line.lstrip().startswith("train step s"))
    assert run.lines[start + 1].startswith("ours (float32)")
    assert run.lines[start + 1].split()[-4:] == ["1.00", "x"] * 2
    assert run.lines[start + 2].startswith("once (default)")
    assert run.lines[start + 3] == "tf32: left out: CPUs have no TF32"


def test_a_busy_machine_is_told():
    def row(low, high):
        train = {"median_s": low, "spread_s": [low, high], "images_per_s": 1.0, "peak_bytes": 1}
        return {"precision": "float32", "train": train, "inference": {"median_s": 1.0, "images_per_s": 1.0}}

    report = {"rows": {"ours": row(1.0, 1.1), "once": row(3.0, 6.0)}, "left_out": {}}
    assert torch_compare.table(report).splitlines()[3:] == [
        "once: steps took 3 to 6 s; the machine was busy, quote nothing from this"
    ]


@pytest.mark.slow
def test_the_report(run):
    report = run.report
    assert report["command"].startswith("python benchmarks/torch_peer/run.py --config=configs/grass.py:tiny")
    assert {"date", "machine", "device", "config", "crop"} <= report.keys()
    assert {"jax", "flax", "optax", "torch", "python"} <= report["versions"].keys()
    assert max(report["check"]["relative"][k] for k in torch_compare.TERMS) <= torch_compare.TOLERANCE
    assert report["rows"].keys() == {"ours", "once"}
    for row in report["rows"].values():
        assert row["train"]["n"] == row["inference"]["n"] == 2
        low, high = row["train"]["spread_s"]
        assert 0 < low <= row["train"]["median_s"] <= high
        assert row["train"]["images_per_s"] == pytest.approx(2 / row["train"]["median_s"])
        assert row["inference"]["images_per_s"] == pytest.approx(1 / row["inference"]["median_s"])
        assert row["train"]["peak_bytes"] > 1e8


@pytest.mark.slow
def test_both_compute_the_same_loss(run):
    ours = run.report["check"]["ours"]
    theirs = torch_worker.check(torch_worker.read_spec(run.folder), run.folder, CPU)["terms"]
    assert torch_compare.agree(ours, theirs).keys() == {"decode", "aux", "distill", "grad_norm"}
    assert theirs == pytest.approx(run.report["check"]["torch"], rel=1e-4)
    assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-5) and theirs["acc"] == pytest.approx(ours["acc"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, term",
    [("backbone.stages.2.0.pointwise_conv2.weight", "decode"), ("fmm.adapters.0.0.attn.qkv.weight", "decode"),
     ("auxiliary_head.convs.0.conv.weight", "aux"), ("teach_backbone.patch_embed.projection.weight", "distill")],
)  # fmt: skip
def test_a_changed_weight_is_refused(run, tmp_path, name, term):
    folder, ours = run.folder, run.report["check"]["ours"]
    for file in ("spec.json", "batch.npz"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    with np.load(folder / "weights.npz") as file:
        tensors = dict(file)
    tensors[name] = np.roll(tensors[name], 1)
    np.savez(tmp_path / "weights.npz", **tensors)
    theirs = torch_worker.check(torch_worker.read_spec(tmp_path), tmp_path, CPU)["terms"]
    with pytest.raises(SystemExit, match=f"{term} by more than 0.0001.*nothing timed"):
        torch_compare.agree(ours, theirs)


@pytest.mark.slow
def test_nothing_is_timed_unless_they_agree(run):
    ours, asked = run.report["check"]["ours"], []

    def child(name, folder):
        asked.append(name)
        report = {"platform": "cpu", "device": "cpu", "versions": {}}
        return report | {"terms": {**ours, "decode": ours["decode"] * (1.001 if name == "torch_check" else 1)}}

    config = types.SimpleNamespace(data=types.SimpleNamespace(name="grass"))
    with pytest.raises(SystemExit, match="decode"):
        torch_compare.compare(config, run.folder, None, save=None, child=child)
    assert asked == ["check", "torch_check"]


def fake_child(terms: dict, failing: str = "", torch_on: str = "cpu"):
    """Stands for the children: their reports without their work."""

    def child(name, folder):
        if name == failing:
            raise torch_compare.ChildError(f"{name} ended with status 1: no compiler")
        where = torch_on if name == "torch_check" else "cpu"
        time = {"median_s": 1.0}
        return {"platform": where, "device": where, "versions": {}, "terms": terms, "train": time}

    return child


@pytest.mark.slow
def test_a_variant_that_fails_is_named_and_the_others_go_on(run):
    config, saved = types.SimpleNamespace(data=types.SimpleNamespace(name="grass")), []
    child = fake_child(run.report["check"]["ours"], failing="compiled")
    wanted = ["published", "compiled", "once"]
    report = torch_compare.compare(config, run.folder, wanted, lambda r: saved.append(len(r["rows"])), child=child)
    assert list(report["rows"]) == ["ours", "published", "once"]
    assert report["left_out"] == {"compiled": "compiled ended with status 1: no compiler"}
    assert saved == [1, 2, 2, 3]  # after each, so that a run that is cut off leaves what it has
    with pytest.raises(torch_compare.ChildError, match="ours ended"):
        child = fake_child(run.report["check"]["ours"], failing="ours")
        torch_compare.compare(config, run.folder, wanted, print, child=child)


@pytest.mark.slow
def test_different_devices_are_not_compared(run):
    config = types.SimpleNamespace(data=types.SimpleNamespace(name="grass"))
    child = fake_child(run.report["check"]["ours"], torch_on="gpu")
    with pytest.raises(SystemExit, match="JAX runs on cpu and torch on gpu"):
        torch_compare.compare(config, run.folder, None, print, child=child)


def test_variants():
    assert torch_compare.chosen_variants(None, "cpu") == (["published", "once"], {})
    assert torch_compare.chosen_variants(None, "gpu")[0] == list(torch_worker.VARIANTS)
    assert torch_compare.chosen_variants(["tf32", "once"], "cpu") == (["once"], {"tf32": "left out: CPUs have no TF32"})
    with pytest.raises(SystemExit, match="quick; known: published"):
        torch_compare.chosen_variants(["quick"], "gpu")


def test_only_the_published_model_is_compared():
    config = runpy.run_path(str(ROOT / "configs" / "grass.py"))["get_config"]("tiny")
    config.update_from_flattened_dict({"ema": 0.9, "model.aux_channels": 0, "model.teacher.preset": "small_reg"})
    with pytest.raises(torch_compare.UserError, match="ema=0.9.*registers 4.*no auxiliary head"):
        torch_compare.check_published(config)
