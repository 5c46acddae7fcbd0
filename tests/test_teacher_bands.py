"""Teachers that see other bands than red, green and blue: as published with so many, or made of RGB weights."""

import dataclasses

import jax
import numpy as np
import pytest
import rasterio
import runs
import scene_files
import torch
import transformers
from absl import logging
from flax import nnx

from ktda_jax import UserError, extract, sharding
from ktda_jax.config import checks
from ktda_jax.config.model import model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDA, normalize
from ktda_jax.models.vit import MEAN, STD, ViT, ViTConfig
from ktda_jax.training import tap_statistics
from ktda_jax.training.inputs import features_folder, open_features
from ktda_jax.training.program import build
from ktda_jax.weights import folder, loading, sources
from ktda_jax.weights.folder import Weights

BANDS, SEEN = (2, 3, 4, 8, 11), (11, 4, 8, 2)  # of the file, which is blue, green, red, ...; those of the teacher
POSITIONS = (4, 2, 3, 0)
STATISTICS = {"model.teacher.mean": (90.0, 100.0, 110.0, 120.0), "model.teacher.std": (30.0, 40.0, 50.0, 60.0)}
FIVE = {"data.bands": BANDS, "data.rgb": (4, 3, 2), "data.scale": (0, 255), "data.photometric": False}
TEACHER = ViTConfig(width=16, depth=4, heads=2, image_size=(56, 56))


def arrays_of(config: ViTConfig) -> dict[str, np.ndarray]:
    shapes, rng = flat.abstract(lambda: ViT(config, rngs=nnx.Rngs(0)))[1], np.random.default_rng(0)
    return {k: 0.2 * rng.normal(size=v.shape).astype(np.float32) for k, v in sorted(shapes.items())}


def test_a_published_one_of_six_bands_is_transformers(tmp_path):
    """Files as transformers writes them, through `convert`'s reading, to the same features."""
    settings = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=56, patch_size=14, num_channels=6,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.Dinov2Model(settings).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path)
    found = sources.load(str(tmp_path))
    assert found.config.bands == 6 and len(found.config.mean) == len(found.config.std) == 6
    x = np.random.default_rng(0).normal(size=(2, 56, 56, 6)).astype(np.float32)
    graphdef, shapes, _ = flat.abstract(lambda: ViT(found.config, rngs=nnx.Rngs(0)))
    flat.check_shapes(found.arrays, shapes, "it")
    ours = jax.jit(lambda arrays, x: flat.merge(graphdef, arrays, {})(x))(dict(found.arrays), x)
    with torch.no_grad():
        states = theirs(torch.tensor(x.transpose(0, 3, 1, 2)), output_hidden_states=True)
    for level, tokens in enumerate([*states.hidden_states[1:4], states.last_hidden_state]):
        expected = tokens[:, 1:].numpy().reshape(2, 4, 4, 32)
        np.testing.assert_allclose(ours[level], expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("rgb", [(2, 1, 0), (0, 0, 0)])
def test_rgb_weights_are_made_to_see_more(tmp_path, monkeypatch, rgb):
    """Of an image whose bands are all alike they see what they saw; and it is said, once."""
    said = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: said.append(text % values))
    folder.save(tmp_path / "w", Weights("teacher", TEACHER, arrays_of(TEACHER), {}))
    mean, std = (np.full(4, np.mean(x)) for x in (MEAN, STD))
    if rgb == (2, 1, 0):
        mean[[2, 1, 0]], std[[2, 1, 0]] = MEAN, STD
    mean[3] = 1.0  # what a band has that it has not seen, it is told
    four = dataclasses.replace(TEACHER, bands=4, mean=tuple(mean.tolist()), std=tuple(std.tolist()))
    shapes = flat.abstract(lambda: ViT(four, rngs=nnx.Rngs(0)))[1]
    for _ in range(2):
        kernel = loading.load(str(tmp_path / "w"), shapes, "teacher", four, rgb=rgb)["patch_embed/kernel"]
    original = arrays_of(TEACHER)["patch_embed/kernel"]
    np.testing.assert_allclose(kernel.sum(2), original.sum(2), rtol=1e-5, atol=1e-6)
    if rgb == (2, 1, 0):
        np.testing.assert_allclose(kernel[:, :, [2, 1, 0]], original * 3 / 4, rtol=1e-6)
    assert len(said) == 1 and f"{tmp_path / 'w'} has seen RGB alone; its patch embedding is made for 4 bands" in said[0]
    if rgb == (2, 1, 0):
        other = dataclasses.replace(four, mean=(*four.mean[:2], 2.0, 1.0))
        with pytest.raises(UserError, match=r"mean \(.*, 123.675, 1.0\) \(config: \(.*, 2.0, 1.0\)\)"):
            loading.load(str(tmp_path / "w"), shapes, "teacher", other, rgb=rgb)
    with pytest.raises(
        UserError, match=r"has number of config.teacher.bands 3 \(config: 4\); set config.model.teacher"
    ):
        loading._compare("config.weights.teacher", "w", TEACHER, four)


def test_rgb_weights_see_colours_in_their_order(tmp_path):
    """Else a teacher would be shown blue for red, of which no shape tells."""
    folder.save(tmp_path / "w", Weights("teacher", TEACHER, arrays_of(TEACHER), {}))
    shapes = flat.abstract(lambda: ViT(TEACHER, rngs=nnx.Rngs(0)))[1]
    with pytest.raises(UserError, match="takes red, green and blue in this order, and config.teacher.bands names them"):
        loading.load(str(tmp_path / "w"), shapes, "teacher", TEACHER, rgb=(2, 1, 0))
    for rgb in ((0, 1, 2), (0, 0, 0)):  # the latter: of other bands than these
        assert loading.load(str(tmp_path / "w"), shapes, "teacher", TEACHER, rgb=rgb).keys() == shapes.keys()


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    """Five bands of noise in files of eleven, whose bands' means differ."""
    root, rng = tmp_path_factory.mktemp("tiles"), np.random.default_rng(0)
    for split in ("train", "val"):
        runs.write_tile(root, split, "t0", np.zeros((64, 64, 3)), rng.integers(0, 5, (64, 64)))
        (root / "img_dir" / split / "t0.png").unlink()
        pixels = 20 * np.arange(11) + rng.integers(0, 30, (64, 64, 11))
        scene_files.write(root / "img_dir" / split / "t0.tif", pixels.astype(np.uint8))
    return root


def test_all_that_ask_the_teacher_show_it_the_same_bands(tiles, tmp_path):
    """The step, the taps' statistics, and what is stored; the ViT on bands chosen by hand is the oracle."""
    config = runs.config(tiles, {**FIVE, **STATISTICS, "teacher.bands": SEEN, "batch_size": 1, "eval_batch_size": 1})
    config.unlock()
    config.data.flip, config.teacher.features, config.teacher.dtype = 0.0, str(tmp_path / "features"), "float16"
    model = model_of(Settings.of(config))
    assert (model.teacher.bands, model.seen, model.teacher_rgb) == (4, POSITIONS, (0, 0, 0))  # 3 is not among them
    arrays = arrays_of(model.teacher)
    folder.save(tmp_path / "w", Weights("teacher", model.teacher, arrays, {}))
    config.weights.teacher = str(tmp_path / "w")

    settings = Settings.of(config)
    program, image = build(settings), np.random.default_rng(1).integers(0, 256, (1, 64, 64, 5), np.uint8)
    vit = program.teacher_graphdef
    seen = normalize(image[..., list(POSITIONS)], np.float32, *STATISTICS.values())
    see = jax.jit(lambda arrays, seen: flat.merge(vit, arrays, {})(seen))
    expected = see(arrays, seen)

    state = runs.random_state(program)
    step = jax.jit(
        lambda params, stats, arrays, image: (
            flat.merge(program.graphdef, params, stats)(image, teacher=flat.merge(vit, arrays, {})).taps
        )
    )
    for ours, theirs in zip(step(state.params, state.batch_stats, arrays, image), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    mean, _ = tap_statistics._moments(program, settings)(
        {"image": sharding.to_global(program.mesh, {"image": image})["image"]}, program.teacher()
    )
    np.testing.assert_allclose(mean, [tap.mean((0, 1, 2)) for tap in expected], atol=1e-4)

    extract.run(config)
    identity = teacher_identity(config.weights.teacher, 0, model)
    stored = open_features(features_folder(settings.teacher, settings.data), identity, "train", None)
    with rasterio.open(tiles / "img_dir/train/t0.tif") as file:
        pixels = np.moveaxis(file.read(SEEN), 0, -1)
    whole = see(arrays, normalize(pixels[None], np.float32, *STATISTICS.values()))
    np.testing.assert_allclose(stored.read(0, 0), np.concatenate(whole), atol=2e-3 * np.abs(whole).max())
    other = model_of(Settings.of(runs.config(tiles, {**FIVE, **STATISTICS, "teacher.bands": (11, 8, 4, 2)})))
    with pytest.raises(UserError, match=r"are of other bands \(\[4, 2, 3, 0\], wanted \[4, 3, 2, 0\]\)"):
        open_features(tmp_path / "features", teacher_identity(config.weights.teacher, 0, other), "train", None)


def test_a_frozen_encoder_of_other_bands_predicts_from_them(tiles):
    """config.model.encoder='teacher', with the encoder in the model, as predict and export have it."""
    frozen = {"model.encoder": "teacher", "model.fam": False, "model.fmm.enabled": False, "distill": False}
    model = model_of(Settings.of(runs.config(tiles, {**FIVE, **STATISTICS, **frozen, "teacher.bands": SEEN})))
    graphdef, params, stats = flat.abstract(lambda: KTDA(model, own_encoder=True, rngs=nnx.Rngs(0)))
    assert params["teacher/patch_embed/kernel"].shape == (14, 14, 4, 16)
    image = jax.ShapeDtypeStruct((1, 64, 64, 5), np.uint8)
    logits = jax.eval_shape(lambda p, s, x: flat.merge(graphdef, p, s)(x).logits, params, stats, image)
    assert logits.shape[-1] == runs.CLASSES


def test_statistics_that_are_not_given(tiles):
    """The preset's for red, green and blue, wherever they stand, and their average for all others."""
    model = model_of(Settings.of(runs.config(tiles, {**FIVE, "teacher.bands": (8, 2, 3, 4)})))
    assert model.teacher.mean == (pytest.approx(np.mean(MEAN)), *MEAN[::-1]) and model.teacher_rgb == (3, 2, 1)
    assert model.teacher.std == (pytest.approx(np.mean(STD)), *STD[::-1])
    usual = model_of(Settings.of(runs.config(tiles, FIVE)))
    assert (usual.seen, usual.teacher.bands, usual.teacher.mean) == ((2, 1, 0), 3, MEAN)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"teacher.bands": (2, 12)}, r"config.teacher.bands is \(2, 12\); give some of config.data.bands \(2, 3, 4, 8"),
        ({"teacher.bands": ()}, "config.teacher.bands is .*; give some of config.data.bands, or None"),
        ({"teacher.bands": SEEN, "model.teacher.mean": MEAN}, "config.model.teacher.mean has 3 .* the teacher sees 4"),
        ({"model.teacher.std": (1.0,) * 5}, "config.model.teacher.std has 5 number.* sees 3 band.*; give one for each"),
    ],
)
def test_what_does_not_fit_is_one_line(tiles, settings, message):
    config = runs.config(tiles, FIVE).unlock()
    for key, value in settings.items():
        *sections, name = key.split(".")
        config_part = config
        for section in sections:
            config_part = config_part[section]
        config_part[name] = value
    with pytest.raises(UserError, match=message) as error:
        model_of(checks.resolve(config))
    assert "\n" not in str(error.value)
