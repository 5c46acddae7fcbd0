"""Tiles cut from Landsat-8 scenes, a strip of rows at a time, with the place of each tile on the ground.

Labels come from the mask alone. Where it says fill there is nothing to see; where it does not but the bands are 0, as
along the edges of a scene, its word stands, since it is the reference that others are measured against.
"""

import contextlib
import functools
import pathlib
import typing
from collections.abc import Callable, Iterator

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from data_builders import tiles
from data_builders.l8_biome.scene_folders import Scene, split_scenes
from data_builders.l8_biome.variants import Variant
from ktda_jax import UserError
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.stretch import minmax, stretch

FILL = 0
CLASSES = {128: 0, 64: 1, 192: 2, 255: 3}  # value in the mask -> Clear, Cloud Shadow, Thin Cloud, Cloud
STACKED_BANDS = 11

# REFLECTANCE_MULT_BAND_x = 2e-5 and REFLECTANCE_ADD_BAND_x = -0.1 of the product: reflectance 0 and 1 in its numbers.
REFLECTANCE_LIMITS = (5_000, 55_000)
PERCENTILES = (1, 99)

# TFDS stores floats in 32 bits unless told to keep their bytes.
_FLOAT64 = {"shape": (), "dtype": np.float64, "encoding": "bytes"}
METADATA = {
    "scene": tfds.features.Text(doc="Landsat scene id"),
    "biome": tfds.features.Text(),
    "row": tfds.features.Scalar(np.int32, doc="of the upper left pixel in the scene"),
    "column": tfds.features.Scalar(np.int32, doc="of the upper left pixel in the scene"),
    "crs": tfds.features.Text(doc="coordinate system of easting and northing, such as EPSG:32647"),
    "easting": tfds.features.Tensor(**_FLOAT64, doc="of the upper left corner, in units of the crs"),
    "northing": tfds.features.Tensor(**_FLOAT64, doc="of the upper left corner, in units of the crs"),
}


def scene_shards(scenes: list[Scene], variant: Variant) -> dict[str, list[Callable[[], Iterator]]]:
    """{split: generators of (key, example), one per scene and file to write}.

    All scenes are checked first, masks pixel by pixel. UserError for files that cannot be read or do not belong
    together, unknown mask values, and scenes that are all fill.
    """
    splits = split_scenes(scenes)
    for check in (_check_files, _check_mask):  # the quick one for all scenes before the slow one
        for scene in scenes:
            check(scene)
    for split, found in splits.items():
        logging.info("%s: %s", split, ", ".join(scene.id for scene in found))
    return {
        split: [functools.partial(scene_tiles, scene, variant) for scene in found] for split, found in splits.items()
    }


def scene_tiles(scene: Scene, variant: Variant) -> Iterator[tuple[int, dict]]:
    """(key, example) of the tiles that are not all fill, row by row.

    The grid begins in the upper left corner; tiles that stick out are padded with fill, which is 0 in the image.
    """
    limits = None  # minmax: those of each tile
    if variant.stretch == "percentile":
        limits = percentile_limits(scene, variant.tile_size)
    elif variant.stretch == "reflectance":
        limits = REFLECTANCE_LIMITS
    labels = _label_table(variant.fill)
    size, key = variant.tile_size, 0
    with _open(scene) as files:
        place = files.bands[0]
        for row, pixels, mask in _strips(scene, files, size):
            for column in range(0, mask.shape[1], size):
                window = np.s_[:, column : column + size]
                if not (mask[window] != FILL).any():
                    continue
                image = stretch(pixels[window], *(limits or minmax(pixels[window])))
                easting, northing = place.xy(row, column, offset="ul")
                yield (
                    key,
                    {
                        **tiles.encode_tile(
                            image, labels[mask[window]], f"{scene.biome}_{scene.id}_patch_{row}_{column}"
                        ),
                        "scene": scene.id,
                        "biome": scene.biome,
                        "row": row,
                        "column": column,
                        "crs": place.crs.to_string() if place.crs else "",
                        "easting": np.float64(easting),
                        "northing": np.float64(northing),
                    },
                )
                key += 1


def percentile_limits(scene: Scene, rows: int) -> tuple[float, float]:
    """The 1st and 99th percentile of bands 4-3-2 together, read `rows` at a time: values that occur in the scene.

    Joint, so that clouds stay white. Only pixels count that are not fill in the mask and not 0 in any of the bands.
    """
    counts = np.zeros(2**16, np.int64)
    with _open(scene) as files:
        for _, pixels, mask in _strips(scene, files, rows):
            seen = (mask != FILL) & (pixels > 0).all(-1)
            counts += np.bincount(pixels[seen].ravel(), minlength=len(counts))
    below = counts.cumsum()
    ranks = [-(-below[-1] * percentile // 100) for percentile in PERCENTILES]  # rounded up
    low, high = np.searchsorted(below, ranks)
    return float(low), float(high)


def _label_table(fill) -> np.ndarray:
    """uint8 (256,): mask value -> label."""
    table = np.full(256, IGNORE, np.uint8)
    table[list(CLASSES)] = list(CLASSES.values())
    table[FILL] = {"ignore": IGNORE, "clear": CLASSES[128]}[fill]
    return table


class _Files(typing.NamedTuple):
    """The open rasters of a scene: those of red, green and blue, the index of each in its file, and the mask."""

    bands: tuple
    indices: tuple[int, ...]
    mask: object


@contextlib.contextmanager
def _open(scene):
    rasterio = rasterio_for("Landsat scenes")
    with contextlib.ExitStack() as stack:
        opened = {}
        for path in dict.fromkeys([*(path for path, _ in scene.bands), scene.mask]):
            with _one_line(path):
                opened[path] = stack.enter_context(rasterio.open(path))
        bands = tuple(opened[path] for path, _ in scene.bands)
        yield _Files(bands, tuple(index for _, index in scene.bands), opened[scene.mask])


@contextlib.contextmanager
def _one_line(path):
    try:
        yield
    except rasterio_for(path).errors.RasterioError as error:
        text = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"cannot read {path}: {text}; download the scene again or remove it") from error


def _strips(scene, files, rows) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """(row, pixels uint16 (rows, W, 3), mask uint8 (rows, W)): whole strips, W a multiple of `rows`, padded with 0."""
    for row in range(0, files.mask.height, rows):
        mask = _strip(files.mask, 1, row, rows)
        pixels = np.zeros((*mask.shape, 3), np.uint16)
        for channel, (band, index) in enumerate(zip(files.bands, files.indices, strict=True)):
            pixels[..., channel] = _strip(band, index, row, rows)
        yield row, pixels, mask


def _strip(raster, index, row, rows) -> np.ndarray:
    height = min(rows, raster.height - row)
    strip = np.zeros((rows, -(-raster.width // rows) * rows), raster.dtypes[index - 1])
    from rasterio.windows import Window

    window = Window(0, row, raster.width, height)
    with _one_line(raster.name):
        strip[:height, : raster.width] = raster.read(index, window=window)
    return strip


def _check_files(scene):
    with _open(scene) as files:
        for raster, dtype, count in (
            *(
                (band, "uint16", 1 if index == 1 else STACKED_BANDS)
                for band, index in zip(files.bands, files.indices, strict=True)
            ),
            (files.mask, "uint8", 1),
        ):
            if raster.count != count or set(raster.dtypes) != {dtype}:
                raise UserError(
                    f"scene {scene.id}: {raster.name} has {raster.count} bands of {'/'.join(set(raster.dtypes))}, not "
                    f"{count} of {dtype}: replace the file or remove the scene"
                )
            if raster.shape != files.mask.shape:
                raise UserError(
                    f"scene {scene.id}: {raster.name} is {raster.height} x {raster.width} pixels, its mask "
                    f"{files.mask.name} {files.mask.height} x {files.mask.width}: replace one or remove the scene"
                )
        # GDAL reads what an ENVI file lacks as 0, which would be fill.
        size, promised = scene.mask.stat().st_size, files.mask.height * files.mask.width
        if files.mask.driver == "ENVI" and size < promised:
            raise UserError(
                f"scene {scene.id}: {scene.mask} has {size} bytes, its header promises {promised}: download it again "
                "or remove the scene"
            )
        places = {(str(band.crs), band.transform) for band in files.bands}
        if files.mask.crs:  # the ENVI masks of the USGS have no place
            places.add((str(files.mask.crs), files.mask.transform))
        if len(places) > 1:
            names = ", ".join(pathlib.Path(raster.name).name for raster in (*files.bands, files.mask))
            raise UserError(
                f"scene {scene.id}: {names} do not lie on the same ground: replace them or remove the scene"
            )


def _check_mask(scene):
    counts = np.zeros(256, np.int64)
    with _open(scene) as files:
        for row in range(0, files.mask.height, 512):
            counts += np.bincount(_strip(files.mask, 1, row, 512).ravel(), minlength=256)
    unknown = set(np.flatnonzero(counts).tolist()) - {FILL, *CLASSES}
    if unknown:
        raise UserError(
            f"scene {scene.id}: mask {scene.mask} holds {', '.join(map(str, sorted(unknown)))}, where only 0 (fill), "
            "64 (shadow), 128 (clear), 192 (thin cloud) and 255 (cloud) mean something: replace it or remove the scene"
        )
    if not counts[list(CLASSES)].any():
        raise UserError(f"scene {scene.id}: mask {scene.mask} is all fill (0): replace it or remove the scene")
