"""Label files as uint8 class numbers, by GDAL: whole numbers of any type, palettes, and masks drawn in colours."""

from collections.abc import Mapping

import numpy as np

from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import FileError, opened, orientation_of, upright
from ktda_jax.data.plain import decode
from ktda_jax.data.reading import SETTING

Colour = tuple[int, int, int]
_INDICES = "write the index of the class in every pixel (8-bit grey or palette PNG)"


def read_label(
    path: str, mapping: Mapping[int | Colour, int] | None = None, *, called: str = SETTING
) -> np.ndarray:  # fmt: skip
    """uint8 (H, W) class indices, upright; a palette image gives its indices, not its colours.

    `mapping` turns stored values into classes, and then every value must be in it: {128: 0, 64: 1} or, for masks drawn
    in colours, {(255, 0, 0): 0, ...}. Of floating numbers, whole ones are taken, and NaN is ignored. `called`: the
    setting or flag that gives `mapping`, for messages.
    """
    coloured = mapping is not None and isinstance(next(iter(mapping)), tuple)
    plain = None if coloured else decode(path)
    if plain is not None and plain.ndim == 2:
        values, ignored, orientation = plain, None, 1
    else:
        with opened(path) as file:
            values, ignored = _colours(file, called) if coloured else _numbers(file, called)
            orientation = orientation_of(file)
    if mapping is not None:
        values = _mapped(path, values, ignored, mapping, called)
    else:
        values = _classes(path, values, ignored, called)
    return np.ascontiguousarray(upright(values, orientation))


def label_size(path: str) -> tuple[int, int]:
    """(H, W) of a label, upright, from the file's header."""
    with opened(path) as file:
        return (file.width, file.height) if orientation_of(file) >= 5 else (file.height, file.width)


def _numbers(file, called: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The one band of numbers (H, W), and where they are none."""
    from rasterio.enums import ColorInterp

    bands = [k for k, kind in enumerate(file.colorinterp, 1) if kind != ColorInterp.alpha]
    if len(bands) != 1:
        raise FileError(
            "label", file.name, f"has {file.count} bands, not one of class indices{_looks_like(file)}",
            f"{_INDICES}, or map its colours by {called}",
        )  # fmt: skip
    kind = np.dtype(file.dtypes[bands[0] - 1])
    if kind.kind not in "uif":
        raise FileError("label", file.name, f"holds {kind}, not class indices", _INDICES)
    if file.tags(ns="IMAGE_STRUCTURE").get("MINISWHITE") == "YES":
        raise FileError(
            "label", file.name, "is stored with white as 0, so its numbers are not sure", "write it as 'black is 0'"
        )
    for band in set(range(1, file.count + 1)) - set(bands):
        if not (file.read(band) == np.iinfo(file.dtypes[band - 1]).max).all():
            raise FileError(
                "label", file.name, "has an alpha band that is not opaque everywhere",
                f"write one band, {IGNORE} where pixels are to be ignored",
            )  # fmt: skip
    values = file.read(bands[0])
    if kind.kind != "f":
        return values, None
    absent = np.isnan(values)
    if file.nodata is not None and file.nodata not in range(IGNORE + 1):  # no class could be meant
        absent |= values == values.dtype.type(file.nodata)
    whole = absent | (np.isfinite(values) & (values == np.floor(values)))
    if not whole.all():
        some = ", ".join(f"{v:g}" for v in np.unique(values[~whole])[:3])
        raise FileError("label", file.name, f"holds fractions, such as {some}", _INDICES)
    return values, absent if absent.any() else None


def _colours(file, called: str) -> tuple[np.ndarray, None]:
    """One number per colour (H, W), 0xRRGGBB, of RGB, palette or grey; alpha does not count."""
    from rasterio.enums import ColorInterp

    kinds = list(file.colorinterp)
    bands = [k for k, kind in enumerate(kinds, 1) if kind != ColorInterp.alpha]
    named = [kinds.index(kind) + 1 for kind in (ColorInterp.red, ColorInterp.green, ColorInterp.blue) if kind in kinds]
    bands = named if len(named) == 3 else bands
    if len(bands) not in (1, 3) or any(np.dtype(file.dtypes[band - 1]) != np.uint8 for band in bands):
        held = f"{len(bands)} band(s) of {file.dtypes[bands[0] - 1]}"
        raise FileError(
            "label", file.name, f"holds {held}, not 8-bit RGB, though {called} maps colours",
            "map its numbers, or write it as RGB",
        )  # fmt: skip
    values = file.read(bands)
    if len(bands) == 1 and kinds[bands[0] - 1] == ColorInterp.palette:
        colours = file.colormap(bands[0])
        table = np.array([colours.get(k, (0, 0, 0))[:3] for k in range(256)], np.uint8)
        values = np.moveaxis(table[values[0]], -1, 0)
    elif len(bands) == 1:
        bits = int(file.tags(bands[0], ns="IMAGE_STRUCTURE").get("NBITS", 8))
        values = np.repeat(values.astype(np.uint32) * 255 // (2**bits - 1), 3, 0)
    red, green, blue = values.astype(np.uint32)
    return red << 16 | green << 8 | blue, None


def _looks_like(file) -> str:
    """What several bands may be: one per class, of which one is set."""
    values = file.read()
    if values.dtype.kind not in "uif" or not np.isin(values, (0, values.max())).all():
        return ""
    one_hot = ((values > 0).sum(0) == 1).all()
    return " (one band per class, it seems: the class is the number of the band that is set)" if one_hot else ""


def _classes(path: str, values: np.ndarray, ignored: np.ndarray | None, called: str) -> np.ndarray:
    """Numbers of any type -> uint8."""
    if ignored is not None:
        values = np.where(ignored, IGNORE, values)
    if values.dtype != np.uint8 and (values.min() < 0 or values.max() > IGNORE):
        raise FileError(
            "label", path, f"({values.dtype}) holds values from {values.min()} to {values.max()}",
            f"class indices must fit 0 to {IGNORE - 1}, with {IGNORE} for ignored pixels; other values can be mapped "
            f"by {called}",
        )  # fmt: skip
    return values.astype(np.uint8, copy=False)


def _mapped(
    path: str, values: np.ndarray, ignored: np.ndarray | None, mapping: Mapping, called: str
) -> np.ndarray:  # fmt: skip
    numbers = {(k[0] << 16 | k[1] << 8 | k[2]) if isinstance(k, tuple) else k: v for k, v in mapping.items()}
    # In the type of the values, so that no number changes: 2**64 - 1 is none of int64.
    known = np.array(sorted(k for k in numbers if _fits(k, values.dtype)), values.dtype)
    place = np.searchsorted(known, values)
    strange = known[np.minimum(place, len(known) - 1)] != values if len(known) else np.ones(values.shape, bool)
    if ignored is not None:
        strange &= ~ignored
    if strange.any():
        coloured = isinstance(next(iter(mapping)), tuple)
        found = [int(v) for v in np.unique(values[strange])[:5]]
        named = ", ".join(str((v >> 16, v >> 8 & 255, v & 255) if coloured else v) for v in found)
        raise FileError(
            "label", path,
            f"holds {'colours' if coloured else 'values'} that {called} does not name: {named}",
            f"add them ({IGNORE} for pixels to ignore)",
        )  # fmt: skip
    classes = np.array([*(numbers[int(k)] for k in known), IGNORE], np.uint8)
    return classes[place] if ignored is None else np.where(ignored, np.uint8(IGNORE), classes[place])


def _fits(number: int, kind: np.dtype) -> bool:
    limits = np.iinfo(kind) if kind.kind in "ui" else np.finfo(kind)
    return int(limits.min) <= number <= int(limits.max)
