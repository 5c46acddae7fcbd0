"""Our weights folder: a round trip, what a config takes from it, and a message for each way it can be wrong."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXt, ConvNeXtConfig
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import MEAN, ViT, ViTConfig
from ktda_jax.weights import folder, loading
from ktda_jax.weights.folder import Weights

TEACHER = ViTConfig(width=16, depth=4, heads=2, image_size=(56, 56))
STUDENT = ConvNeXtConfig(depths=(1, 1, 1, 1), channels=(8, 8, 16, 16))
WHOLE = KTDAConfig(num_classes=5, student=STUDENT, teacher=TEACHER, head_channels=8, aux_channels=8)


def expected(kind: str, config):
    build = {"teacher": ViT, "student": ConvNeXt, "ktda": KTDA}[kind]
    _, params, stats = flat.abstract(lambda: build(config, rngs=nnx.Rngs(0)))
    return {**params, **stats}


def made(kind: str, config) -> Weights:
    rng = np.random.default_rng(0)
    shapes = expected(kind, config)
    if kind == "ktda":
        shapes |= {f"teacher/{k}": v for k, v in expected("teacher", config.teacher).items()}
    return Weights(kind, config, {k: rng.normal(size=v.shape).astype(np.float32) for k, v in shapes.items()}, {})


def test_what_is_saved_is_read(tmp_path):
    whole = dataclasses.replace(made("ktda", WHOLE), classes=tuple("abcde"), palette=((1, 2, 3),) * 5)
    folder.save(tmp_path / "w", whole)
    found = loading.read(tmp_path / "w")
    assert (found.kind, found.config, found.classes, found.palette) == ("ktda", WHOLE, whole.classes, whole.palette)
    assert found.arrays.keys() == whole.arrays.keys()
    for path, value in whole.arrays.items():
        np.testing.assert_array_equal(found.arrays[path], value)
    assert [p.name for p in tmp_path.iterdir()] == ["w"]  # nothing left aside


@pytest.mark.parametrize("kind", ["student", "ktda"])
@pytest.mark.parametrize("bands, rgb", [(5, (4, 2, 0)), (3, (2, 1, 0)), (1, (0, 0, 0))])
def test_weights_for_rgb_serve_other_bands(tmp_path, kind, bands, rgb):
    """An image whose bands are all the same gives what it gave as RGB; the colours' kernels are where they belong."""
    rgb_config = STUDENT if kind == "student" else WHOLE
    folder.save(tmp_path / "w", made(kind, rgb_config))
    student = dataclasses.replace(STUDENT, bands=bands)
    config = student if kind == "student" else dataclasses.replace(WHOLE, student=student, rgb=rgb)
    what, stem = ("student", "") if kind == "student" else ("model", "student/")
    arrays = loading.load(str(tmp_path / "w"), expected(kind, config), what, config, rgb=rgb)
    kernel, original = (a[stem + "downsample/0/conv/kernel"] for a in (arrays, loading.read(tmp_path / "w").arrays))
    grey = np.random.default_rng(0).normal(size=(1, 8, 8, 1)).astype(np.float32)

    def convolve(kernel):
        image = np.repeat(grey, kernel.shape[2], -1)
        return jax.lax.conv_general_dilated(image, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    np.testing.assert_allclose(convolve(kernel), convolve(original), rtol=1e-5, atol=1e-5)
    if bands > 1:
        np.testing.assert_allclose(kernel[:, :, list(rgb)], original * (3 / bands), rtol=1e-6)
    assert kernel.dtype == np.float32 and kernel.shape[2] == bands


def test_a_whole_models_student_comes_in_its_own_order_of_bands(tmp_path):
    folder.save(tmp_path / "w", made("ktda", dataclasses.replace(WHOLE, rgb=(2, 1, 0))))
    stem, wanted = "downsample/0/conv/kernel", expected("student", STUDENT)
    original = loading.read(tmp_path / "w").arrays[f"student/{stem}"]
    same, usual = (
        loading.load(str(tmp_path / "w"), wanted, "student", STUDENT, rgb=rgb)[stem] for rgb in ((2, 1, 0), (0, 1, 2))
    )
    np.testing.assert_array_equal(same, original)
    np.testing.assert_array_equal(usual, original[:, :, ::-1])


def test_other_bands_are_named_by_their_setting(tmp_path):
    """What was trained on four bands does not serve another four."""
    four = dataclasses.replace(WHOLE, student=dataclasses.replace(STUDENT, bands=4), rgb=(2, 1, 0))
    folder.save(tmp_path / "w", made("ktda", four))
    other = dataclasses.replace(four, rgb=(0, 1, 2))
    with pytest.raises(ValueError, match=r"has positions of config.data.rgb \(2, 1, 0\) \(config: \(0, 1, 2\)\)"):
        loading.load(str(tmp_path / "w"), expected("ktda", other), "model", other, rgb=other.rgb)
    with pytest.raises(ValueError, match=r"has number of config.data.bands 4 \(config: 3\)"):
        loading.load(str(tmp_path / "w"), expected("student", STUDENT), "student", STUDENT)


def test_transposed_views_are_saved_by_value(tmp_path):
    """safetensors writes the buffer as it lies in memory, which for a transposed view is another array."""
    student = made("student", STUDENT)
    view = np.ascontiguousarray(student.arrays["stages/0/0/pointwise_conv1/kernel"].T).T
    student.arrays["stages/0/0/pointwise_conv1/kernel"] = view
    folder.save(tmp_path / "w", student)
    np.testing.assert_array_equal(loading.read(tmp_path / "w").arrays["stages/0/0/pointwise_conv1/kernel"], view)


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(folder.json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        folder.save(tmp_path / "w", made("student", STUDENT))
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    folder.save(tmp_path / "w", made("student", STUDENT))
    with pytest.raises(ValueError, match="w exists; choose another place"):
        folder.save(tmp_path / "w", made("student", STUDENT))


def test_a_whole_model_serves_as_student_teacher_and_model(tmp_path):
    whole = made("ktda", WHOLE)
    folder.save(tmp_path / "w", whole)
    for what, config in (("student", STUDENT), ("teacher", TEACHER)):
        shapes = expected(what, config)
        loaded = loading.load(str(tmp_path / "w"), shapes, what, config)
        assert loaded.keys() == shapes.keys()
        for path, value in loaded.items():
            np.testing.assert_array_equal(value, whole.arrays[f"{what}/{path}"])
    assert (
        loading.load(str(tmp_path / "w"), expected("ktda", WHOLE), "model", WHOLE).keys()
        == expected("ktda", WHOLE).keys()
    )


def test_a_model_goes_on_under_another_teacher(tmp_path):
    folder.save(tmp_path / "w", made("ktda", WHOLE))
    config = dataclasses.replace(WHOLE, teacher=dataclasses.replace(TEACHER, depth=8, heads=4, registers=4))
    assert loading.load(str(tmp_path / "w"), expected("ktda", config), "model", config)
    config = dataclasses.replace(WHOLE, teacher=dataclasses.replace(TEACHER, width=32))
    with pytest.raises(ValueError, match=r"has config.model.teacher.width 16 \(config: 32\); set these"):
        loading.load(str(tmp_path / "w"), expected("ktda", config), "model", config)


def test_classifiers_of_other_classes(tmp_path):
    """19 classes into 5: refused, with the setting that leaves the classifiers out."""
    folder.save(tmp_path / "w", made("ktda", dataclasses.replace(WHOLE, num_classes=19)))
    shapes = expected("ktda", WHOLE)
    with pytest.raises(ValueError, match=r"num_classes 19 \(config: 5\); set --config.weights.new_classifier=True"):
        loading.load(str(tmp_path / "w"), shapes, "model", WHOLE)
    rest = {k: v for k, v in shapes.items() if "/conv_seg/" not in k}
    assert len(rest) == len(shapes) - 4
    assert loading.load(str(tmp_path / "w"), rest, "model", WHOLE, new_classifier=True).keys() == rest.keys()


def test_the_model_decides_the_dtype(tmp_path):
    folder.save(tmp_path / "w", made("student", STUDENT))
    shapes = {k: jax.ShapeDtypeStruct(v.shape, jnp.float16) for k, v in expected("student", STUDENT).items()}
    assert {v.dtype for v in loading.load(str(tmp_path / "w"), shapes, "student", STUDENT).values()} == {np.dtype("f2")}


def test_positions_are_resized_to_the_configured_grid(tmp_path):
    teacher = made("teacher", TEACHER)
    folder.save(tmp_path / "w", teacher)
    config = dataclasses.replace(TEACHER, image_size=(28, 70))
    found = loading.load(str(tmp_path / "w"), expected("teacher", config), "teacher", config)["pos_embed"]
    assert found.shape == (1, 2, 5, 16)
    import torch

    given = torch.tensor(teacher.arrays["pos_embed"]).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(given, size=(2, 5), mode="bicubic", align_corners=False)
    np.testing.assert_allclose(found, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(width=32), r"config.weights.teacher: the teacher in .*w has width 16 \(config: 32\)"),
        (dict(heads=4), r"has heads 2 \(config: 4\); set config.model.teacher to agree"),
        (dict(mean=(1.0, 2.0, 3.0)), rf"has mean \({MEAN[0]}, .*\) \(config: \(1.0, 2.0, 3.0\)\)"),
    ],
)
def test_a_teacher_of_another_kind_is_refused(tmp_path, change, message):
    """Heads and image statistics change no shape, so nothing else would notice."""
    folder.save(tmp_path / "w", made("teacher", TEACHER))
    config = dataclasses.replace(TEACHER, **change)
    with pytest.raises(ValueError, match=message) as error:
        loading.load(str(tmp_path / "w"), expected("teacher", config), "teacher", config)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("described", [True, False])
def test_heads_of_published_files_are_not_taken_from_the_config(tmp_path, described):
    """A config with 3 heads would give other features from the same tensors, and no shape says so."""
    import transformers
    from safetensors.torch import save_file

    settings = dict(hidden_size=384, num_hidden_layers=4, num_attention_heads=6, mlp_ratio=1, image_size=28)
    model = transformers.Dinov2Model(transformers.Dinov2Config(**settings))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    if described:
        (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 6}))
    config = ViTConfig(width=384, depth=4, heads=3, mlp_ratio=1.0, image_size=(28, 28))
    with pytest.raises(ValueError, match=r"config.weights.teacher: the teacher in .* has heads 6 \(config: 3\)"):
        loading.load(str(tmp_path), expected("teacher", config), "teacher", config)
    config = dataclasses.replace(config, heads=6)
    assert loading.load(str(tmp_path), expected("teacher", config), "teacher", config)


def test_a_preset_that_fits_is_named(tmp_path):
    tiny = ConvNeXtConfig(depths=(2, 2, 6, 2), channels=(40, 80, 160, 320), v2=True)
    folder.save(tmp_path / "w", made("student", tiny))
    with pytest.raises(ValueError, match="set --config.model.student.preset=v2_atto, or take other weights"):
        loading.load(str(tmp_path / "w"), expected("student", STUDENT), "student", STUDENT)


def test_wrong_kinds_and_broken_folders(tmp_path):
    folder.save(tmp_path / "w", made("student", STUDENT))
    with pytest.raises(ValueError, match="config.weights.teacher: .*w holds a student, not a teacher"):
        loading.load(str(tmp_path / "w"), expected("teacher", TEACHER), "teacher", TEACHER)
    with pytest.raises(ValueError, match="config.weights.student: no file or folder"):
        loading.load(str(tmp_path / "none"), {}, "student", STUDENT)
    tensors = tmp_path / "w" / folder.TENSORS
    assert tensors.stat().st_mode == (tmp_path / "w" / folder.DESCRIPTION).stat().st_mode
    content = tensors.read_bytes()
    tensors.write_bytes(content[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match="is not the file that was written, by its sha256"):
        loading.read(tmp_path / "w")
    tensors.write_bytes(content[:-8])
    with pytest.raises(ValueError, match="cannot read the weights in .*are they whole") as error:
        loading.read(tmp_path / "w")
    assert "\n" not in str(error.value)
    description = json.loads((tmp_path / "w" / folder.DESCRIPTION).read_text())
    del description["architecture"]["depths"]
    (tmp_path / "w" / folder.DESCRIPTION).write_text(json.dumps(description))
    with pytest.raises(ValueError, match="depths"):
        loading.read(tmp_path / "w")
