"""`python -m ktda_jax.export`: the file alone, without this project, gives what the model gives."""

import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

import ktda_jax
from ktda_jax import export
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.prediction import segmenter
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build
from ktda_jax.weights import folder

# A size and bands that are not the usual; attention over 20 x 28 tokens, more than one chunk.
SIZE, BANDS = (64, 96), (4, 1, 2, 3)
SETTINGS = {"data.crop": SIZE, "data.bands": BANDS, "data.scale": (0, 3000), "model.fmm.form": "transformer"}
# Numbers found nowhere else. The same for every class, the classifier's bias does not change the labels.
MARKS = {"auxiliary_head/": np.float32(7.7421875e7), "decode_head/conv_seg/bias": np.float32(0.62109375)}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir with a checkpoint of random weights and the marks."""
    path = tmp_path_factory.mktemp("run")
    config = runs.config(path, SETTINGS)
    kept = runs.random_state(build(Settings.of(config)))
    params = dict(kept.params)
    for prefix, mark in MARKS.items():
        marked = {name: np.full_like(value, mark) for name, value in params.items() if name.startswith(prefix)}
        assert marked
        params |= marked
    records.write(path, Settings.of(config))
    with Checkpoints(path / "checkpoints") as checkpoints:
        checkpoints.save(3, dataclasses.replace(kept, params=params), {}, {"mIoU": 60.0})
    return path


@pytest.fixture(scope="module")
def model(workdir):
    return ktda_jax.load_pretrained(workdir)


@pytest.fixture(scope="module")
def stablehlo(workdir):
    return command(workdir, "stablehlo")


@pytest.fixture(scope="module")
def onnx(workdir):
    pytest.importorskip("jax2onnx")
    return command(workdir, "onnx")


def command(workdir, format: str) -> pathlib.Path:
    path = workdir / "exported" / f"grass.{format}"
    flags = (f"--checkpoint={workdir}", f"--format={format}", f"--output={path}")
    out, err = runs.finish(runs.start(*flags, verb="export"))
    assert out.startswith(f"{path}: ") and 'images ["batch", 64, 96, 4]' in out and not err
    return path


def images(count=3) -> np.ndarray:
    """Blocks of one value with a little noise, so that the labels vary."""
    rng = np.random.default_rng(0)
    blocks = np.kron(rng.integers(0, 200, (count, 4, 6, 4)), np.ones((1, 16, 16, 1)))
    return (blocks + rng.integers(0, 56, blocks.shape)).astype(np.uint8)


def check(model, batch, labels, probabilities) -> None:
    """At least 99.9 % of the pixels as the model has them, of which few are near ties."""
    expected = model.predict(batch)
    best = np.sort(expected.probabilities, -1)
    assert (best[..., -1] - best[..., -2] < 1e-5).mean() < 0.001 and len(np.unique(expected.labels)) > 2
    assert labels.dtype == np.uint8 and probabilities.dtype == np.float32
    assert (labels == expected.labels).mean() >= 0.999
    np.testing.assert_allclose(probabilities, expected.probabilities, atol=1e-5)


def description(path: pathlib.Path) -> dict:
    return json.loads(path.with_name(path.name + ".json").read_text())


def check_holds_the_decoder_alone(content: bytes) -> None:
    auxiliary, decoder = (mark.tobytes() in content for mark in MARKS.values())
    assert decoder and not auxiliary


def snippet(format: str) -> str:
    """The program in the description of the command, which is also in the documentation."""
    lines = export.__doc__.splitlines()
    (used,) = (k for k, line in enumerate(lines) if f'("grass.{format}"' in line)
    first = max(k for k in range(used) if lines[k] and lines[k][0] != " ") + 2
    last = min(k for k in range(used, len(lines)) if lines[k] and lines[k][0] != " ") - 1
    program = textwrap.dedent("\n".join(lines[first:last])) + "\n"
    assert f"```python\n{program}```\n" in (runs.REPOSITORY / "docs/howto/export.md").read_text()
    return program


CHECK = """
import sys

assert not {"ktda_jax", "flax", "orbax", "ml_collections"} & {name.split(".")[0] for name in sys.modules}
np.savez("found.npz", labels=labels, probabilities=run(images)["probabilities"])
"""


def test_stablehlo_runs_where_only_jax_is(stablehlo, model, tmp_path):
    """The documentation's program, on images of ours."""
    batch = images()
    np.save(stablehlo.parent / "images.npy", batch)
    program, count = re.subn(r"np\.zeros\(.*\)", 'np.load("images.npy")', snippet("stablehlo"))
    assert count == 1
    settings = {**os.environ, "XLA_FLAGS": runs.xla_flags(1)}
    subprocess.run([sys.executable, "-c", program + CHECK], cwd=stablehlo.parent, env=settings, check=True)
    found = np.load(stablehlo.parent / "found.npz")
    check(model, batch, found["labels"], found["probabilities"])
    content = stablehlo.read_bytes()
    check_holds_the_decoder_alone(content)
    assert jax.export.deserialize(content).platforms == ("cpu", "cuda", "tpu")


def test_what_lies_beside_it(stablehlo, workdir, model):
    described, content = description(stablehlo), stablehlo.read_bytes()
    assert described["sha256"] == hashlib.sha256(content).hexdigest() and described["bytes"] == len(content)
    assert described["input"] == {
        "name": "images", "dtype": "uint8", "shape": ["batch", 64, 96, 4], "bands": [4, 1, 2, 3], "rgb": [0, 1, 2],
        "scale": [0, 3000], "nodata": None, "trained_on": "grass",
    }  # fmt: skip
    assert described["outputs"]["probabilities"] == {"dtype": "float32", "shape": ["batch", 64, 96, 5]}
    assert described["classes"] == list(model.classes) and described["palette"] == [list(c) for c in model.palette]
    assert described["nodata"] == 255 and described["platforms"] == ["cpu", "cuda", "tpu"]
    source, arrays = described["source"], segmenter.find(workdir).arrays
    assert source["workdir"] == str(workdir) and source["step"] == 3 and len(source["parameters_sha256"]) == 64
    assert source["parameters"] == sum(v.size for k, v in arrays.items() if not k.startswith("auxiliary_head/"))


def test_onnx_in_onnxruntime(onnx, stablehlo, model):
    onnxruntime, batch = pytest.importorskip("onnxruntime"), images()
    session = onnxruntime.InferenceSession(onnx)
    check(model, batch, *session.run(["labels", "probabilities"], {"images": batch}))
    (one,) = session.run(["labels"], {"images": batch[2:]})
    assert one.shape == (1, 64, 96)
    check_holds_the_decoder_alone(onnx.read_bytes())
    described = description(onnx)
    assert described["source"] == description(stablehlo)["source"] and described["versions"]["jax2onnx"]
    assert not list(onnx.parent.glob(".*")) and not list(onnx.parent.glob("*.tmp"))


@pytest.mark.slow  # XLA's CPU compiler takes its time over bfloat16
def test_bfloat16_computes_the_same_and_takes_half_the_space(workdir, stablehlo, tmp_path):
    made = export.run(workdir, tmp_path / "narrow", format="stablehlo", dtype="bfloat16")
    kernels = [v for k, v in segmenter.find(workdir).arrays.items() if not k.startswith("aux") and v.ndim > 1]
    spared = description(stablehlo)["bytes"] - made["bytes"]
    assert spared == pytest.approx(2 * sum(v.size for v in kernels), rel=0.1)
    narrow = segmenter.load_pretrained(workdir, dtype=jnp.bfloat16).predict(images())
    found = jax.jit(jax.export.deserialize((tmp_path / "narrow").read_bytes()).call)(images())
    assert (np.asarray(found["labels"]) == narrow.labels).mean() >= 0.999


def test_no_attention_of_one_kind_of_gpu(workdir, tmp_path, monkeypatch):
    """On a machine whose GPU has cuDNN's attention the file must still be one for all platforms."""
    from ktda_jax.models import attention

    monkeypatch.setattr(attention, "_has_cudnn_attention", lambda: True)
    made = export.run(workdir, tmp_path / "new", format="stablehlo", dtype="bfloat16")
    assert made["platforms"] == ["cpu", "cuda", "tpu"] and b"cudnn" not in (tmp_path / "new").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(format="tflite"), "--format is 'tflite'; choose stablehlo, onnx or hub"),
        (dict(dtype="int8"), "--dtype is 'int8'; choose float32 or bfloat16"),
        (dict(format="onnx", dtype="bfloat16"), "--dtype=bfloat16 is for stablehlo"),
        (dict(size=(16, 64)), "--size is 16x64; give 32 to 2048 pixels a side"),
        (dict(output="there"), "there exists; choose another place"),
        (dict(output="half"), "half.json exists; choose another place"),
        (dict(checkpoint="nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_exported(workdir, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ("there", "half.json"):
        pathlib.Path(name).touch()
    with pytest.raises(ValueError, match=message):
        export.run(**{"checkpoint": workdir, "output": "new", "format": "stablehlo", **options})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half.json", "there"]


def test_weights_that_are_no_model_or_too_large_or_of_unknown_size(workdir, tmp_path, monkeypatch):
    found = segmenter.find(workdir)
    folder.save(tmp_path / "teacher", folder.Weights("teacher", found.config.teacher, {"x": np.ones(2)}, {}))
    folder.save(tmp_path / "model", dataclasses.replace(found, arrays=jax.device_get(found.arrays), data=None))
    for checkpoint, message in (
        ("teacher", "teacher holds a teacher; an export needs a whole KTDA model"),
        ("model", "do not say how large their training tiles were; give --size"),
    ):
        with pytest.raises(ValueError, match=message):
            export.run(tmp_path / checkpoint, tmp_path / "new", format="stablehlo")
    monkeypatch.setattr(export, "LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="the weights take 0.00 GB, .*; --dtype=bfloat16 halves them"):
        export.run(workdir, tmp_path / "new", format="stablehlo")


@pytest.mark.parametrize("format, missing", [("onnx", "jax2onnx"), ("stablehlo", "flatbuffers")])
def test_without_the_extra(workdir, tmp_path, monkeypatch, format, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=rf"--format={format} needs {missing}: pip install -e '.\[export\]'"):
        export.run(workdir, tmp_path / "new", format=format)


def test_a_full_disk_is_seen_first_and_leaves_nothing(workdir, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
        patch.setattr(export, "_to_stablehlo", None)  # nothing is computed
        with pytest.raises(ValueError, match="needs 0.00 GB, but .* has only 0.00 GB free"):
            export.run(workdir, tmp_path / "new", format="stablehlo")
    with monkeypatch.context() as patch:
        patch.setattr(export, "_to_stablehlo", None)
        with pytest.raises(OSError, match="File name too long"):  # as any place that cannot be written to
            export.run(workdir, tmp_path / ("x" * 245), format="stablehlo")

    def write_half(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_to_stablehlo", lambda *_: bytes(1000))
    monkeypatch.setattr(pathlib.Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left"):
        export.run(workdir, tmp_path / "new", format="stablehlo")
    assert not list(tmp_path.iterdir())


def test_the_command_says_it_in_one_line(workdir):
    file = workdir / "config.json"
    output = f"{file}/new"
    process = runs.start(f"--checkpoint={workdir}", "--format=stablehlo", f"--output={output}", verb="export")
    assert process.communicate()[1] == f"error: cannot write --output={output}: File exists: {file}\n"
    assert process.returncode == 1


def test_the_program_of_the_readme_for_onnx(onnx, monkeypatch):
    names = {}
    monkeypatch.chdir(onnx.parent)
    exec(snippet("onnx").replace("256, 256, 3", "64, 96, 4"), names)
    assert names["labels"].shape == (2, 64, 96) and names["labels"].dtype == np.uint8
