"""Random scene folders in the file forms of the USGS and of torchgeo, for tests and measurements."""

import pathlib
import warnings

import numpy as np
import rasterio
from rasterio.transform import from_origin

from data_builders.l8_biome.scene_tiles import CLASSES

ORIGIN = (382_185.0, 3_571_815.0)  # easting and northing of the upper left corner in EPSG:32647, 30 m pixels


def scene_id(number: int) -> str:
    """A Landsat-8 scene id; `number` stands where path and row would."""
    return f"LC8{number:06d}2014014LGN00"


def random_scene(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(pixels uint16 (H, W, 3) of bands 4, 3, 2, mask uint8 (H, W)): fill in two corners, as in real scenes."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(6_000, 30_000, (height, width, 3), np.uint16)
    mask = rng.choice(np.array(list(CLASSES), np.uint8), (height, width))
    y, x = np.mgrid[:height, :width]
    fill = (x + y < 0.6 * width) | (x + y > height + 0.7 * width)
    pixels[fill], mask[fill] = 0, 0
    return pixels, mask


def write_scene(
    folder: pathlib.Path,
    scene: str,
    pixels: np.ndarray,
    mask: np.ndarray,
    *,
    stacked: bool = False,
    mask_suffix: str = ".img",
) -> pathlib.Path:
    """Writes `folder`/SCENE/ with a file per band or `stacked`, the mask as ENVI (.img) or GeoTIFF (.TIF)."""
    target = folder / scene
    target.mkdir(parents=True)
    bands = dict(zip((4, 3, 2), np.moveaxis(pixels, -1, 0), strict=True))
    if stacked:
        other = np.full(mask.shape, 77, np.uint16)
        write_raster(target / f"{scene}.TIF", [bands.get(band, other) for band in range(1, 12)])
    else:
        for band, values in {**bands, 5: bands[4]}.items():
            write_raster(target / f"{scene}_B{band}.TIF", [values])
    write_raster(target / f"{scene}_fixedmask{mask_suffix}", [mask])
    (target / f"{scene}_MTL.txt").write_text("GROUP = L1_METADATA_FILE\n")
    return target


def write_raster(path: pathlib.Path, bands: list[np.ndarray], origin=ORIGIN) -> None:
    """Writes `bands` of one shape and dtype as ENVI or GeoTIFF, whichever the suffix says."""
    envi = path.suffix == ".img"
    place = {} if envi else {"crs": "EPSG:32647", "transform": from_origin(*origin, 30, 30), "compress": "deflate"}
    height, width = bands[0].shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        with rasterio.open(
            path,
            "w",
            driver="ENVI" if envi else "GTiff",
            height=height,
            width=width,
            count=len(bands),
            dtype=bands[0].dtype,
            **place,
        ) as file:
            for index, values in enumerate(bands, 1):
                file.write(values, index)
