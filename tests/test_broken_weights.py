"""Weights with values that are no numbers, and folders in which a part is missing or too much: one line each."""

import dataclasses
import json
import re

import golden
import numpy as np
import pytest
import runs
import torch
from safetensors.numpy import save_file

import ktda_jax
from ktda_jax import UserError, export
from ktda_jax.config import workdir as records
from ktda_jax.config.settings import Settings
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build
from ktda_jax.weights import folder, loading, sources

CHECKPOINT = golden.GOLDENS / "grass_tiny.pth"
NAME, PATH = "neck.convs.2.conv.weight", "neck/convs/2/kernel"


def tensors() -> dict[str, np.ndarray]:
    loaded = torch.load(CHECKPOINT, weights_only=True)["state_dict"]
    return {name: np.array(tensor.numpy(), order="C") for name, tensor in loaded.items()}


def read(path):
    return loading.read(path, teacher_heads=2, fmm_heads=8)


def spoilt(value: float) -> dict[str, np.ndarray]:
    found = tensors()
    found[NAME].flat[3] = value
    return found


def pickled(place):
    torch.save({"state_dict": {k: torch.from_numpy(v) for k, v in spoilt(np.nan).items()}}, place / "x.pth")
    return place / "x.pth", f"x.pth is not finite in {NAME}"


def half(place):
    found = {k: torch.from_numpy(v) for k, v in spoilt(-np.inf).items()}
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in found.items()}, place / "x.pth")
    return place / "x.pth", f"x.pth is not finite in {NAME}"


def safetensors(place):
    save_file(spoilt(np.inf), place / "x.safetensors")
    return place / "x.safetensors", f"x.safetensors is not finite in {NAME} (1 of 2,304 values)"


def bfloat16(place):
    from safetensors.torch import save_file as save_torch

    found = {k: torch.from_numpy(v) for k, v in spoilt(np.nan).items()}
    save_torch({k: v.bfloat16() if v.is_floating_point() else v for k, v in found.items()}, place / "x.safetensors")
    return place / "x.safetensors", f"x.safetensors is not finite in {NAME}"


def of_hugging_face(place):
    save_file(spoilt(np.nan), place / "model.safetensors")
    (place / "config.json").write_text("{}")
    return place, f"model.safetensors is not finite in {NAME}"


def converted(place):
    """Our folder, by an older version or another hand: its sha256 is that of the tensors."""
    folder.save(place / "w", read(CHECKPOINT))
    found = folder.read(place / "w")
    found.arrays[PATH].flat[3] = np.nan
    save_file(found.arrays, place / "w" / folder.TENSORS)
    description = json.loads((place / "w" / folder.DESCRIPTION).read_text())
    description["sha256"] = folder._sha256(place / "w" / folder.TENSORS)
    (place / "w" / folder.DESCRIPTION).write_text(json.dumps(description))
    return place / "w", f"model.safetensors is not finite in {PATH}"


def workdir(place):
    config = runs.config(place)
    state = runs.random_state(build(Settings.of(config), teacher=False))
    state.params["neck/convs/2/kernel"].flat[3] = np.nan
    records.write(place, Settings.of(config))
    with Checkpoints(place / "checkpoints") as checkpoints:
        checkpoints.save(3, state, {}, {"mIoU": 60.0})
    return place, f"checkpoint {place / 'checkpoints' / '3'} is not finite in {PATH}"


INCOMING = [pickled, half, safetensors, bfloat16, of_hugging_face, converted, workdir]


@pytest.mark.parametrize("make", INCOMING)
def test_what_is_not_finite_does_not_come_in(make, tmp_path):
    """It would map everything to class 0 and say nothing."""
    path, message = make(tmp_path)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        ktda_jax.load_pretrained(path, teacher_heads=2, fmm_heads=8)
    assert "\n" not in str(error.value)


def test_nor_does_it_go_out(tmp_path, monkeypatch):
    found = read(CHECKPOINT)
    found = dataclasses.replace(found, arrays={k: np.array(v) for k, v in found.arrays.items()})
    found.arrays[PATH].flat[3] = np.nan
    with pytest.raises(UserError, match=f"what .*w would hold is not finite in {PATH}"):
        folder.save(tmp_path / "w", found)
    with pytest.raises(UserError, match=f"what .*w.pth would hold is not finite in {PATH}"):
        sources.to_upstream(found, tmp_path / "w.pth")
    found.arrays[PATH].flat[3] = 3.4e38  # finite, but not in bfloat16
    monkeypatch.setattr(export.segmenter, "find", lambda path, **heads: found)
    options = dict(format="stablehlo", dtype="bfloat16", size=(64, 64))
    with pytest.raises(UserError, match=f"somewhere in bfloat16 is not finite in {PATH}"):
        export.run("somewhere", tmp_path / "x", **options)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def shards(tmp_path):
    """A folder as Hugging Face splits large models."""
    names, found = sorted(tensors()), tensors()
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, some in parts.items():
        save_file({name: found[name] for name in some}, tmp_path / file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path


def test_what_macos_leaves_beside_weights_is_none(shards, tmp_path):
    expected = read(CHECKPOINT)
    for name in ("._model-00001-of-00002.safetensors", "._model.safetensors.index.json", ".DS_Store"):
        (shards / name).write_bytes(b"\x00\x05\x16\x07")
    one = tmp_path / "one"
    one.mkdir()
    save_file(tensors(), one / "model.safetensors")
    (one / "._model.safetensors").write_bytes(b"\x00\x05\x16\x07")
    for place in (shards, one):
        found = read(place)
        assert found.config == expected.config and found.arrays.keys() == expected.arrays.keys()
    assert sorted(read(shards).source["sha256"]) == sorted(p.name for p in shards.glob("model-*"))


def test_an_index_without_shards_is_left_of_another_form(shards):
    for file in shards.glob("model-*"):
        file.unlink()
    save_file(tensors(), shards / "model.safetensors")
    assert read(shards).kind == "ktda"


def no_shard(place):
    (place / "model-00002-of-00002.safetensors").unlink()
    return "lacks model-00002-of-00002.safetensors, which its model.safetensors.index.json lists; is it whole?"


def no_shards(place):
    for file in place.glob("model-*"):
        file.unlink()
    return "lacks model-00001-of-00002.safetensors and 1 more, which its model.safetensors.index.json lists"


def no_tensor(place):
    found = tensors()
    some = sorted(found)[1::2]
    save_file({name: found[name] for name in some[1:]}, place / "model-00002-of-00002.safetensors")
    return f"model-00002-of-00002.safetensors lacks {some[0]}, which the folder's index says is there"


def no_json(place):
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a')
    return "model.safetensors.index.json is no index of weight files (Unterminated string"


def no_index(place):
    (place / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../a.safetensors"}}')
    return "model.safetensors.index.json is no index of weight files (no files in this folder by tensor)"


def cut(place):
    file = place / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return f"cannot read {file}: "


def empty(place):
    (place / "model-00002-of-00002.safetensors").write_bytes(b"")
    return f"cannot read {place / 'model-00002-of-00002.safetensors'}: "


@pytest.mark.parametrize("spoil", [no_shard, no_shards, no_tensor, no_json, no_index, cut, empty])
def test_a_split_model_that_is_not_whole_is_one_line(spoil, shards):
    message = spoil(shards)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read(shards)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "described, message",
    [
        ({"layer_norm_eps": 1e-12}, "layer_norm_eps 1e-12 is not what DINOv2"),
        ({"hidden_act": "relu"}, "hidden_act 'relu' is not what DINOv2"),
    ],
)
def test_a_described_transformer_of_another_kind_is_refused(tmp_path, described, message):
    """No tensor tells; the published ones are computed with 1e-6 and GELU."""
    import transformers
    from safetensors.torch import save_file as save_torch

    settings = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=1, image_size=28)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**settings))
    save_torch(model.state_dict(), tmp_path / "model.safetensors")
    for values in ({}, described):
        (tmp_path / "config.json").write_text(json.dumps({**model.config.to_dict(), **values}))
        if values:
            with pytest.raises(UserError, match=message):
                read(tmp_path)
        else:
            assert read(tmp_path).config.heads == 2
