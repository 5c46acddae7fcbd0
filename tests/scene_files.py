"""Rasters for the tests of scenes, and models that stand in for KTDA."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import rasterio

from ktda_jax.data.images import Reading
from ktda_jax.prediction import setup
from ktda_jax.prediction.files import name_outputs
from ktda_jax.prediction.mapping import check_scenes, map_scenes
from ktda_jax.prediction.outputs import Legend
from ktda_jax.tiling import device
from ktda_jax.tiling.device import Model, Step

UTM = rasterio.Affine(30.0, 0.0, 399_985.123456789, 0.0, -30.0, 4_200_015.987654321)


def write(path, values, **profile):
    """values: (H, W, bands). A GeoTIFF in UTM, unless `profile` says otherwise."""
    given = dict(driver="GTiff", crs="EPSG:32633", transform=UTM) | profile
    tags = given.pop("colorinterp", None)
    height, width, count = values.shape
    with rasterio.open(path, "w", height=height, width=width, count=count, dtype=values.dtype, **given) as file:
        if tags:
            file.colorinterp = tags
        file.write(np.moveaxis(values, -1, 0))
    return path


def smooth(height, width, bands=3, seed=0) -> np.ndarray:
    """uint8 (H, W, bands): patches of all brightnesses with some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 220, (-(-height // 16), -(-width // 16), bands))
    values = np.kron(coarse, np.ones((16, 16, 1)))[:height, :width]
    return (values + rng.integers(0, 36, values.shape)).astype(np.uint8)


def brightest(arrays, images):
    """A class per band: the pixel's own values, and nothing of its surroundings."""
    return jax.nn.softmax(images.astype(jnp.float32) / 16, -1)


def local(arrays, images):
    """The same of a 5 x 5 surrounding, zeros beyond the edge: equivariant to translation."""
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(5, 5, 3, 3)), jnp.float32)
    x = jax.lax.conv_general_dilated(
        images.astype(jnp.float32) / 255, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return jax.nn.softmax(x, -1)


def model(apply=brightest, bands=3, classes=3) -> Model:
    return Model(apply, (), bands, classes)


def install(monkeypatch) -> None:
    """`model()` in the place of a trained one, for verbs: each pixel's brightest band."""
    stub = types.SimpleNamespace(
        config=types.SimpleNamespace(
            num_classes=3, rgb=(0, 1, 2), student=types.SimpleNamespace(bands=3),
            teacher=types.SimpleNamespace(image_size=(64, 64)),
        ),
        data=None, classes=("r", "g", "b"), palette=None, temperature=1.0,
    )  # fmt: skip
    monkeypatch.setattr(setup, "load", lambda *_, **__: stub)
    monkeypatch.setattr(device, "of_segmenter", lambda *_, **__: model())


READING = Reading()


def map_one(path, output, *, stub=None, tile=64, overlap=16, reading=READING, cog=False, **wanted) -> list[str]:
    """Maps one scene with a stub; returns what was said."""
    stub, said = stub or model(), []
    scenes = check_scenes([path], reading, stub.bands, said.append)
    outputs = name_outputs([path], str(output), one=True, cog=cog, **wanted)
    legend = Legend.of(stub.classes, classes=[f"class {k}" for k in range(stub.classes)])
    map_scenes(scenes, outputs, Step(stub, (tile, tile), 8), legend, overlap=overlap, cog=cog, say=said.append)
    return said


def read(path) -> np.ndarray:
    """The values, (H, W), or (bands, H, W) of several."""
    with rasterio.open(path) as file:
        values = file.read()
    return values[0] if len(values) == 1 else values
