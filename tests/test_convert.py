"""Whole KTDA checkpoints through the command line: golden logits, the way back bit for bit, and what is refused."""

import dataclasses
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys

import golden
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import ktda_jax
from ktda_jax import UserError
from ktda_jax.weights import folder, loading, sources

REPOSITORY = pathlib.Path(__file__).parents[1]
CHECKPOINT = golden.GOLDENS / "grass_tiny.pth"


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "ktda_jax.convert", *arguments],
        cwd=REPOSITORY, env={**os.environ, "JAX_PLATFORMS": "cpu", **environment}, capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    """The golden checkpoint converted by the command."""
    folder = tmp_path_factory.mktemp("converted") / "grass"
    done = command(
        "--source=ktda", f"--input={CHECKPOINT}", f"--output={folder}", "--teacher_heads=2", "--dataset=grass"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ktda, ") and str(folder) in done.stdout
    return folder


@pytest.mark.parametrize("name", ["grass_tiny", "grass_tiny_resized"])
def test_golden_logits(name, tmp_path):
    out = tmp_path / "w"
    folder.save(out, sources.load(str(golden.GOLDENS / f"{name}.pth"), "ktda", teacher_heads=2))
    model = ktda_jax.load_pretrained(out)
    arrays = golden.arrays(name)
    expected = np.moveaxis(arrays["eval/decode_logits"], 1, -1)
    assert golden.relative(model.logits(arrays["image_rgb_uint8"]), expected) < 1e-4
    predicted = model.predict(arrays["image_rgb_uint8"])
    assert (predicted.labels == arrays["eval/pred"]).mean() >= 0.9999
    full = np.moveaxis(arrays["eval/full_logits"], 1, -1)
    softmax = np.exp(full - full.max(-1, keepdims=True))
    np.testing.assert_allclose(predicted.probabilities, softmax / softmax.sum(-1, keepdims=True), atol=1e-4)


def test_the_description(whole):
    description = json.loads((whole / "model.json").read_text())
    assert description["kind"] == "ktda" and description["classes"][0] == "low"
    assert description["architecture"]["student"]["depths"] == [1, 1, 2, 1]
    assert description["architecture"]["teacher"]["heads"] == 2
    from ktda_jax.weights.files import sha256

    assert description["sha256"] == sha256(whole / "model.safetensors")
    assert description["source"]["sha256"] == {"grass_tiny.pth": sha256(CHECKPOINT)}


def test_round_trip_is_bit_exact(whole, tmp_path):
    done = command("--to=upstream", f"--input={whole}", f"--output={tmp_path / 'back.pth'}")
    assert done.returncode == 0, done.stderr
    given = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == given.keys()
    for name, tensor in given.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    assert [p.name for p in tmp_path.iterdir()] == ["back.pth"]


class HistoryBuffer:
    """What mmengine keeps beside the weights; its package is not there when a user converts."""

    def __init__(self):
        self.values = np.array([1.0, 2.0])
        self.last = np.float64(3.0)

    def mean(self): ...

    def __getstate__(self):  # as mmengine's does, which pickles as builtins.getattr
        return {**self.__dict__, "_statistics_methods": {"mean": self.mean}}


def test_checkpoints_as_mmengine_writes_them(tmp_path, monkeypatch):
    """Prefixes of data parallelism, SyncBN's counters, and a training record with a class of mmengine's in it."""
    import types

    tensors = {f"module.{k}": v for k, v in torch.load(CHECKPOINT, weights_only=True)["state_dict"].items()}
    module = types.ModuleType("mmengine.logging.history_buffer")
    monkeypatch.setattr(HistoryBuffer, "__module__", module.__name__)
    for name in ("mmengine", "mmengine.logging"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.HistoryBuffer = HistoryBuffer
    record = {"meta": {"epoch": 1}, "message_hub": {"log_scalars": {"loss": HistoryBuffer()}}, "state_dict": tensors}
    torch.save(record, tmp_path / "iter_10.pth")
    monkeypatch.delitem(sys.modules, module.__name__)
    found = sources.load(str(tmp_path / "iter_10.pth"), teacher_heads=2)
    expected = sources.load(str(CHECKPOINT), teacher_heads=2)
    assert found.config == expected.config and found.arrays.keys() == expected.arrays.keys()


def test_harmless_variants(tmp_path):
    """Parameters instead of tensors, buffers of mmseg's preprocessor, and float16."""
    tensors = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    changed = {k: torch.nn.Parameter(v.half()) if v.is_floating_point() and v.ndim else v for k, v in tensors.items()}
    torch.save({**changed, "data_preprocessor.mean": torch.ones(3)}, tmp_path / "x.pth")
    found, expected = (
        sources.load(str(tmp_path / "x.pth"), teacher_heads=2),
        sources.load(str(CHECKPOINT), teacher_heads=2),
    )
    assert found.config == expected.config and found.arrays.keys() == expected.arrays.keys()
    assert found.arrays["neck/convs/0/kernel"].dtype == np.float32
    np.testing.assert_allclose(found.arrays["neck/convs/0/kernel"], expected.arrays["neck/convs/0/kernel"], atol=1e-3)


def test_without_its_teacher_a_model_predicts_and_goes_back(tmp_path):
    tensors = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    tensors = {k: v for k, v in tensors.items() if not k.startswith("teach_backbone.")}
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    folder.save(tmp_path / "w", sources.load(str(tmp_path / "x.pth")))
    found = loading.read(tmp_path / "w")
    assert not any(path.startswith("teacher/") for path in found.arrays)
    labels = ktda_jax.load_pretrained(tmp_path / "w").predict(golden.arrays("grass_tiny")["image_rgb_uint8"]).labels
    assert (labels == golden.arrays("grass_tiny")["eval/pred"]).mean() >= 0.9999
    sources.to_upstream(found, tmp_path / "new" / "back.pth")
    back = torch.load(tmp_path / "new" / "back.pth", weights_only=True)["state_dict"]
    assert back.keys() == tensors.keys() and all(torch.equal(back[k], v) for k, v in tensors.items())


def test_the_backbone_of_another_decoder_serves_as_student(tmp_path):
    tensors = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    tensors = {k: v for k, v in tensors.items() if k.startswith(("backbone.", "decode_head."))}  # UPerNet
    torch.save({"state_dict": tensors}, tmp_path / "x.pth")
    found = sources.load(str(tmp_path / "x.pth"))
    assert found.kind == "student" and "initialised" not in found.source
    assert found.config == sources.load(str(CHECKPOINT), teacher_heads=2).config.student


def test_torch_is_not_needed_for_safetensors(tmp_path):
    tensors = {k: v.numpy() for k, v in torch.load(CHECKPOINT, weights_only=True)["state_dict"].items()}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "m.safetensors")
    code = (
        "import sys; sys.modules['torch'] = None; from ktda_jax.weights import sources;"
        f"print(sources.load({str(tmp_path / 'm.safetensors')!r}, teacher_heads=2).kind)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.strip() == "ktda", done.stderr
    done = subprocess.run(
        [sys.executable, "-c", code.replace(str(tmp_path / "m.safetensors"), str(CHECKPOINT))],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert "needs torch: pip install 'ktda-jax[convert]'" in done.stderr


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/ktda_jax_was_here",)


def truncated(folder):
    (folder / "x.pth").write_bytes(CHECKPOINT.read_bytes()[:100_000])
    return folder / "x.pth", "cannot read .*x.pth.*is it whole"


def truncated_safetensors(folder):
    save_file({"a": np.ones(1000, np.float32)}, folder / "x.safetensors")
    content = (folder / "x.safetensors").read_bytes()
    (folder / "x.safetensors").write_bytes(content[:-100])
    return folder / "x.safetensors", "cannot read .*x.safetensors.*is it whole"


def code(folder):
    torch.save({"state_dict": {"a": Evil()}}, folder / "x.pth")
    return folder / "x.pth", "is not a plain checkpoint, and is not run"


def bare_pickle(folder):
    (folder / "x.pth").write_bytes(pickle.dumps(Evil()))
    return folder / "x.pth", "is not a plain checkpoint, and is not run|cannot read"


def changed(folder, change):
    checkpoint = torch.load(CHECKPOINT, weights_only=True)
    change(checkpoint["state_dict"])
    torch.save(checkpoint, folder / "x.pth")
    return folder / "x.pth"


def another_model(folder):
    torch.save({"layer4.0.conv1.weight": torch.ones(2)}, folder / "x.pth")
    return folder / "x.pth", "is none of the known layouts .*its 1 tensors begin with layer4.0.conv1.weight"


def many_faults(folder):
    def change(tensors):
        del tensors["neck.convs.2.conv.bias"]
        tensors["fam.convert.1.weight"] = torch.ones(16, 17, 1, 1)
        tensors["decode_head.extra.weight"] = torch.ones(3)

    path = changed(folder, change)
    return path, (
        r"missing neck/convs/2/bias; unexpected decode_head.extra.weight; shapes differ: fam/convert/1/kernel "
        r"\(17, 16\) instead of \(16, 16\)"
    )


def no_head(folder):
    return changed(folder, lambda t: t.pop("decode_head.conv_seg.weight")), "no tensor for decode_head/conv_seg/kernel"


def odd_positions(folder):
    def change(tensors):
        tensors["teach_backbone.pos_embed"] = torch.ones(1, 8, 16)

    return changed(folder, change), "a position embedding of 8 tokens is no square grid"


def no_positions(folder):
    return changed(folder, lambda t: t.pop("teach_backbone.pos_embed")), "no tensor for pos_embed"


def numbers_for_names(folder):
    torch.save({0: torch.ones(2)}, folder / "x.pth")
    return folder / "x.pth", "holds no tensors by name"


def nothing(folder):
    return folder / "x.pth", "no file or folder .*x.pth"


def a_text_file(folder):
    (folder / "x.pth").write_text("hello")
    return folder / "x.pth", "x.pth"


FAULTS = [
    truncated, truncated_safetensors, code, bare_pickle, another_model, many_faults, no_head, odd_positions,
    no_positions, numbers_for_names, nothing, a_text_file,
]  # fmt: skip


@pytest.mark.parametrize("make", FAULTS)
def test_what_cannot_be_converted_is_said_in_one_line(make, tmp_path):
    pathlib.Path("/tmp/ktda_jax_was_here").unlink(missing_ok=True)
    path, message = make(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        sources.load(str(path), teacher_heads=2)
    assert "\n" not in str(error.value) and path.name in str(error.value)
    assert not pathlib.Path("/tmp/ktda_jax_was_here").exists()


REFUSED = [
    (["--input=x.pth"], "give --output"),
    ([f"--input={CHECKPOINT}", "--output=OUT", "--source=jax"], "--source is 'jax'; known: auto, ktda"),
    ([f"--input={CHECKPOINT}", "--output=OUT", "--source=timm"], "is in the layout ktda, not timm"),
    ([f"--input={CHECKPOINT}", "--output=OUT"], "width 16: give --teacher_heads"),
    ([f"--input={CHECKPOINT}", "--output=OUT", "--teacher_heads=3"], "a divisor of it \\(got 3\\)"),
    ([f"--input={CHECKPOINT}", "--output=OUT", "--teacher_heads=-2"], "a divisor of it \\(got -2\\)"),
    (["--input=~nosuchuser/x", "--output=OUT"], "~nosuchuser/x: "),
    (
        [f"--input={CHECKPOINT}", "--output=OUT", "--teacher_heads=2", "--dataset=l8_biome"],
        "l8_biome has 4 classes",
    ),
    ([f"--input={CHECKPOINT}", "--output=OUT", "--teacher_heads=2", "--dataset=moss"], "unknown data set 'moss'"),
    ([f"--input={CHECKPOINT}", f"--output={REPOSITORY}"], "exists; choose another place"),
]
# All in one process: most of a command's time is the import of JAX.
COMMANDS = """
import json, sys
from absl.testing import flagsaver
from ktda_jax import cli, convert
said = []
for arguments in json.load(sys.stdin):
    with flagsaver.flagsaver():
        try:
            cli.in_one_line(convert.main, convert.parse(["convert", *arguments]))
            said.append("nothing")
        except SystemExit as error:
            said.append(error.code)
print(json.dumps(said))
"""


def test_the_command_says_what_is_wrong_and_leaves_nothing(tmp_path):
    arguments = [[a.replace("OUT", str(tmp_path / "out")) for a in given] for given, _ in REFUSED]
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS], input=json.dumps(arguments), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for said, (given, message) in zip(json.loads(done.stdout), REFUSED, strict=True):
        assert said.startswith("error: ") and "\n" not in said and re.search(message, said), (given, said)
    assert not list(tmp_path.iterdir())


def test_only_whole_models_go_back(tmp_path):
    found = sources.load(str(CHECKPOINT), teacher_heads=2)
    teacher = folder.Weights("teacher", found.config.teacher, {}, {})
    with pytest.raises(UserError, match="--to=upstream writes whole KTDA models; this is a teacher"):
        sources.to_upstream(teacher, tmp_path / "x.pth")
    student = dataclasses.replace(found.config.student, first_norms=False)
    other = dataclasses.replace(found, config=dataclasses.replace(found.config, student=student))
    with pytest.raises(UserError, match="the published code has a LayerNorm behind each stage of the student"):
        sources.to_upstream(other, tmp_path / "x.pth")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_base_size_checkpoint(tmp_path):
    """346 M random values under the published names, in under 60 s and 6 GB; then it predicts."""
    rows = json.loads((golden.GOLDENS / "parameters_base.json").read_text())
    tensors = {row["name"]: 0.02 * torch.randn(row["shape"]) for row in rows}
    for row in rows:
        if row["name"].endswith(".bn.weight"):
            stem = row["name"].removesuffix("weight")
            tensors[stem + "running_mean"], tensors[stem + "running_var"] = (
                torch.zeros(row["shape"]),
                torch.ones(row["shape"]),
            )
            tensors[stem + "num_batches_tracked"] = torch.tensor(23_000)
    teacher = {"cls_token": (1, 1, 768), "pos_embed": (1, 362, 768), "patch_embed.projection.weight": (768, 3, 14, 14),
               "patch_embed.projection.bias": (768,), "ln1.weight": (768,), "ln1.bias": (768,)}  # fmt: skip
    for layer in range(12):
        shapes = {"attn.gamma1.weight": (768,), "ffn.gamma2.weight": (768,)}
        sizes = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "ffn.layers.0.0": (3072, 768)}
        for name, shape in {**sizes, "ffn.layers.1": (768, 3072), "ln1": (768,), "ln2": (768,)}.items():
            shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
        teacher |= {f"layers.{layer}.{name}": shape for name, shape in shapes.items()}
    tensors |= {f"teach_backbone.{name}": 0.02 * torch.randn(shape) for name, shape in teacher.items()}
    torch.save({"state_dict": tensors}, tmp_path / "base.pth")
    code = (
        "import sys, runpy, resource, time; start = time.time()\n"
        "sys.argv = ['convert', *sys.argv[1:]]\n"
        "try: runpy.run_module('ktda_jax.convert', run_name='__main__')\n"
        "finally: print(time.time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, f"--input={tmp_path / 'base.pth'}", f"--output={tmp_path / 'base'}"],
        cwd=REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert "345.9 M values" in done.stdout, done.stderr
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    assert seconds < 60 and peak < 6e9
    prediction = ktda_jax.load_pretrained(tmp_path / "base").predict(np.zeros((256, 256, 3), np.uint8))
    assert prediction.probabilities.shape == (256, 256, 5) and np.isfinite(prediction.probabilities).all()


def cached_repository(root: pathlib.Path, file: pathlib.Path, revision: str) -> None:
    """Hugging Face's cache as a download leaves it."""
    folder = root / "models--someone--ktda"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    snapshot = folder / "snapshots" / revision
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(file.read_bytes())


def test_hub_ids_come_from_the_cache_when_offline(tmp_path):
    tensors = {k: v.numpy() for k, v in torch.load(CHECKPOINT, weights_only=True)["state_dict"].items()}
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, tmp_path / "m.safetensors")
    revision = "0123456789abcdef0123456789abcdef01234567"
    cached_repository(tmp_path / "hub", tmp_path / "m.safetensors", revision)
    offline = dict(HF_HUB_OFFLINE="1", HF_HUB_CACHE=str(tmp_path / "hub"))
    names = ("hf://someone/ktda", f"hf://someone/ktda@{revision}", f"hf://someone/ktda/model.safetensors@{revision}")
    for name in names:
        out = tmp_path / str(len(name))
        done = command(f"--input={name}", f"--output={out}", "--teacher_heads=2", **offline)
        assert done.returncode == 0, done.stderr
        source = json.loads((out / "model.json").read_text())["source"]
        assert source["path"] == name and source["revision"] == revision
    done = command("--input=hf://someone/else", f"--output={tmp_path / 'none'}", **offline)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
    assert "hf://someone/else is not in the Hugging Face cache and cannot be downloaded" in done.stderr
