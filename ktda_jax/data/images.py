"""Images as uint8 arrays, by GDAL: which bands of a file a model sees, and their pixels. Tiles and scenes alike."""

import dataclasses
from collections.abc import Sequence

import cv2
import numpy as np

from ktda_jax.data.gdal import FileError, opened, orientation_of, upright
from ktda_jax.data.plain import decode
from ktda_jax.data.stretch import stretch


@dataclasses.dataclass(frozen=True)
class Reading:
    """How stored values become the model's 8-bit bands; as config.data of a training has them."""

    bands: tuple[int, ...] | None = None  # counted from 1; None: 8-bit RGB
    scale: tuple | None = None  # (low, high), or one such pair per band; None: 8-bit values
    nodata: float | None = None  # beside what the file declares
    by_band: bool = False  # a missing band was 0 in training; plain 8-bit RGB keeps what is stored


@dataclasses.dataclass(frozen=True)
class Layout:
    """Which bands of a file are read, and what their numbers mean."""

    bands: tuple[int, ...]
    table: np.ndarray | None  # uint8 (256, 3): colours, where the band holds their numbers or fewer than 8 bits


PREFIXES = {"config": "config.data.", "flags": "--"}  # where bands and scale are set


def read_image(path: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB, upright. Grey is repeated and alpha dropped; UserError if it is not 8-bit RGB."""
    if (plain := decode(path)) is not None:
        return plain if plain.ndim == 3 else cv2.cvtColor(plain, cv2.COLOR_GRAY2RGB)
    with opened(path) as file:
        layout = layout_of(file, Reading(), 3)
        return interleaved(upright(in_colours(file.read(layout.bands), layout), orientation_of(file)))


def read_bands(
    path: str, bands: Sequence[int] | None, scale: Sequence | None, nodata: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """`bands` of a raster (numbers from 1; None: RGB) -> uint8 (H, W, bands), and where there are data (H, W), upright.

    `scale`: (low, high) or one such pair per band, the values that become 0 and 255; None for 8-bit files. `nodata`
    stands before what the file declares. A pixel has no data where none of its bands has; a single missing band is 0.
    """
    reading = Reading(bands and tuple(bands), scale, nodata, by_band=True)
    with opened(path) as file:
        layout = layout_of(file, reading, len(bands) if bands else 3)
        pixels, present = read_window(file, layout, reading)
        orientation = orientation_of(file)
    return interleaved(upright(pixels, orientation)), np.ascontiguousarray(upright(present, orientation))


def interleaved(planes: np.ndarray) -> np.ndarray:
    """(bands, H, W) -> (H, W, bands); numpy takes twice as long."""
    return cv2.merge([np.ascontiguousarray(plane) for plane in planes]).reshape(*planes.shape[1:], len(planes))


def layout_of(file, reading: Reading, bands: int, *, by: str = "config") -> Layout:
    """What a model of `bands` bands reads of an open file; UserError if it holds nothing of the kind.

    Without `reading.bands`: red, green and blue as the file names them, all of three bands, a palette's colours, or
    grey. `by`: whether settings or flags are to be named, a key of PREFIXES.
    """
    given, prefix = reading.bands, PREFIXES[by]
    if given is not None:
        if max(given) > file.count:
            raise FileError(
                "image", file.name, f"has {file.count} band(s), and bands {given} are wanted",
                f"set {prefix}bands, their numbers in this file in the order of training, or leave it out",
            )  # fmt: skip
        layout = Layout(tuple(given), None)
    elif bands != 3:
        raise FileError(
            "image", file.name, f"has {file.count} band(s), and the model takes {bands}",
            f"set {prefix}bands, their numbers in the order of training",
        )  # fmt: skip
    else:
        layout = _colours(file, reading, prefix)
    _check_numbers(file, layout, reading, prefix)
    return layout


def _colours(file, reading: Reading, prefix: str) -> Layout:
    """Red, green and blue of a file that no one has described."""
    from rasterio.enums import ColorInterp

    kinds = list(file.colorinterp)
    named = [kinds.index(kind) + 1 for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue) if kind in kinds]
    others = [k for k, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
    if len(named) == 3:
        return Layout(tuple(named), None)
    if len(others) == 3 and ColorInterp.cyan not in kinds:
        return Layout(tuple(others), None)
    if len(others) != 1:
        raise FileError(
            "image", file.name, f"has {len(others)} bands, of which none is named red, green or blue",
            f"choose some with {prefix}bands, such as {'--bands=1,2,3' if prefix == '--' else '(1, 2, 3)'}",
        )  # fmt: skip
    band, palette = others[0], kinds[others[0] - 1] == ColorInterp.palette
    if palette and reading.scale is not None:
        raise FileError("image", file.name, "holds numbers of colours, which cannot be stretched", "convert it to RGB")
    if palette:
        colours = file.colormap(band)
        table = np.array([colours.get(k, (0, 0, 0, 0))[:3] for k in range(256)], np.uint8)
        return Layout((band,), table)
    bits = int(file.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if bits < 8 and reading.scale is None:
        grey = np.minimum(np.arange(256) * 255 // (2**bits - 1), 255).astype(np.uint8)
        return Layout((band,), np.repeat(grey[:, None], 3, 1))
    return Layout((band,) * 3, None)


def _check_numbers(file, layout: Layout, reading: Reading, prefix: str) -> None:
    kinds = {np.dtype(file.dtypes[band - 1]) for band in layout.bands}
    if odd := [str(kind) for kind in kinds if kind.kind not in "uif"]:
        raise FileError("image", file.name, f"holds {odd[0]}", "only whole and floating numbers can be read")
    if reading.scale is None and kinds != {np.dtype(np.uint8)}:
        held = " and ".join(sorted(map(str, kinds)))
        example = "=LOW,HIGH" if prefix == "--" else "=(low, high)"
        raise FileError(
            "image", file.name, f"holds {held}{_extremes(file, layout)}, not 8-bit values",
            f"set {prefix}scale{example}, the values that become 0 and 255",
        )  # fmt: skip


def _extremes(file, layout: Layout) -> str:
    """The range of the values of a small file, for a message."""
    if file.height * file.width > 1 << 22:
        return ""
    values = file.read(layout.bands, masked=True).compressed()
    values = values[np.isfinite(values)]
    return f" from {values.min()} to {values.max()}" if values.size else ""


def in_colours(values: np.ndarray, layout: Layout) -> np.ndarray:
    """uint8 (bands, H, W) as read -> (3, H, W), where these are numbers of colours."""
    return values if layout.table is None else layout.table.T[:, values[0]]


def read_window(
    file, layout: Layout, reading: Reading, window=None, alphas: Sequence[int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_bands`, of an open file and one window, as it is stored: uint8 (bands, H, W), and bool (H, W).

    `alphas`: of a scene, the bands that say where data are; then the file's own word counts beside `reading.nodata`.
    None: to be found out from what they hold here.
    """
    bands = layout.bands if len(set(layout.bands)) > 1 else layout.bands[:1]  # grey is read once
    scale, nodata = reading.scale, reading.nodata
    values = file.read(bands, window=window)
    present = True if nodata is None else values != nodata
    if nodata is None or alphas is not None:
        present = present & _present(file, bands, values, window, alphas)
    if values.dtype.kind == "f":
        present = present & np.isfinite(values)
    if scale is None:
        pixels = in_colours(values, layout)
    else:
        low, high = np.asarray(scale, np.float64).T
        pixels = np.moveaxis(stretch(np.moveaxis(values, 0, -1), low, high), -1, 0)
    if (reading.by_band or scale is not None) and not present.all():  # else as training saw plain 8-bit RGB
        pixels = pixels * present
    count = len(layout.bands) if layout.table is None else 3
    return np.broadcast_to(pixels, (count, *pixels.shape[1:])), present.any(0)


def _present(file, bands: Sequence[int], values: np.ndarray, window, alphas) -> np.ndarray:
    """Where `bands` have data, by the file's own word: a value, a mask, or an alpha band.

    bool (bands, H, W), or (1, H, W) where it is the same for all.

    GDAL calls the fourth band of every 8-bit file alpha that it is not told about, which in our files is as often near
    infrared. So alpha counts only where it is no band of ours and says nothing but 0 and 255.
    """
    from rasterio.enums import MaskFlags

    flags = [file.mask_flag_enums[band - 1] for band in bands]
    own = [MaskFlags.alpha not in kinds and MaskFlags.all_valid not in kinds for kinds in flags]
    if all(own) and all(MaskFlags.per_dataset in kinds for kinds in flags):
        present = file.read_masks(bands[0], window=window)[None] > 0
    elif any(own):
        present = np.ones(values.shape, bool)
        for place in np.flatnonzero(own):
            present[place] = file.read_masks(bands[place], window=window) > 0
    else:
        present = np.ones((1, *values.shape[1:]), bool)
    for band in alpha_bands(file, bands) if alphas is None else alphas:
        alpha = file.read(band, window=window)
        if alphas is not None or np.isin(alpha, (0, 255)).all():
            present &= alpha > 0
    return present


def alpha_bands(file, bands: Sequence[int]) -> list[int]:
    """The bands that the file calls alpha, without those that are read as data."""
    from rasterio.enums import ColorInterp

    return [k for k, kind in enumerate(file.colorinterp, 1) if kind == ColorInterp.alpha and k not in bands]
