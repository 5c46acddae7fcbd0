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


SMALL = 1 << 20  # pixels of a band that is looked at as a whole
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
    stands before the value that the file declares; its mask and its alpha count all the same. A pixel has no data where
    none of its bands has; a single missing band is 0.
    """
    reading = Reading(bands and tuple(bands), scale, nodata, by_band=True)
    with opened(path) as file:
        layout = layout_of(file, reading, len(bands) if bands else 3)
        pixels, present = read_window(file, layout, reading, alphas_of(file, layout), declared=nodata is None)
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
    file, layout: Layout, reading: Reading, alphas: Sequence[int], window=None, *, declared: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_bands`, of an open file and one window, as it is stored: uint8 (bands, H, W), and bool (H, W).

    `alphas`: see `alphas_of`. `declared`: whether the value that the file declares counts beside `reading.nodata`, as
    it does in scenes.
    """
    bands = layout.bands if len(set(layout.bands)) > 1 else layout.bands[:1]  # grey is read once
    scale, nodata = reading.scale, reading.nodata
    values = file.read(bands, window=window)
    present = _present(file, bands, values, window, alphas, declared)
    if nodata is not None:
        present = present & (values != nodata)
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


def _present(file, bands: Sequence[int], values: np.ndarray, window, alphas: Sequence[int], declared: bool):
    """Where `bands` have data, by the file's own word: a value, if that counts (`declared`), a mask, or an alpha band.

    bool (bands, H, W), or (1, H, W) where it is the same for all.
    """
    from rasterio.enums import MaskFlags

    others = {MaskFlags.alpha, MaskFlags.all_valid} | (set() if declared else {MaskFlags.nodata})
    every = file.mask_flag_enums
    flags = [every[band - 1] for band in bands]
    own = [others.isdisjoint(kinds) for kinds in flags]
    if all(own) and all(MaskFlags.per_dataset in kinds for kinds in flags):
        present = file.read_masks(bands[0], window=window)[None] > 0
    elif any(own):
        present = np.ones(values.shape, bool)
        for place in np.flatnonzero(own):
            present[place] = file.read_masks(bands[place], window=window) > 0
    else:
        present = np.ones((1, *values.shape[1:]), bool)
    for band in alphas:
        present &= file.read(band, window=window) > 0
    return present


def alphas_of(file, layout: Layout) -> tuple[int, ...]:
    """The bands that say where data are, wherever they are not 0: one rule for tiles and scenes."""
    from rasterio.enums import ColorInterp

    called = [band for band, kind in enumerate(file.colorinterp, 1) if kind == ColorInterp.alpha]
    return tuple(band for band in called if band not in layout.bands and _is_alpha(file, band))


def may_hide(path: str) -> bool:
    """Whether an image has a mask, or a band that is called alpha."""
    from rasterio.enums import ColorInterp, MaskFlags

    with opened(path) as file:
        return ColorInterp.alpha in file.colorinterp or any(MaskFlags.per_dataset in k for k in file.mask_flag_enums)


def _is_alpha(file, band: int) -> bool:
    """Whether a band that is called alpha is one.

    GDAL calls the fourth band of every 8-bit file alpha that it is not told about, which in our files is as often near
    infrared. Of an alpha band most is opaque that is not 0, also if its edges are soft; of near infrared next to
    nothing has the highest value, unless it is all clouds. Of a large file 16 places are looked at.
    """
    from rasterio.windows import Window

    if file.driver in ("PNG", "WEBP") or file.count == 2:
        return True  # there nothing is called alpha that is not
    if file.height * file.width <= SMALL:
        values = file.read(band)
    else:
        width, height = min(256, file.width), min(256, file.height)
        columns, rows = (np.linspace(0, x, 4).astype(int) for x in (file.width - width, file.height - height))
        windows = [Window(column, row, width, height) for row in rows for column in columns]
        values = np.stack([file.read(band, window=window) for window in windows])
        if not values.any():  # no data in these places, or a lake
            values = file.read(band, out_shape=(min(file.height, 1024), min(file.width, 1024)))
    shown = values[values > 0]
    opaque = (1, 255) if shown.dtype.kind == "f" else (255, np.iinfo(shown.dtype).max)
    return 2 * np.count_nonzero(np.isin(shown, opaque)) >= shown.size
