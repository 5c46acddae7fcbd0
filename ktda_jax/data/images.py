"""Image and label files as uint8 arrays: 8-bit RGB through Pillow, anything with other bands or values through GDAL."""

import io
import logging
import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError

from ktda_jax import UserError
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.stretch import stretch

# Pillow reads the 8-bit files and not OpenCV, which turns palette labels into colours, returns half a JPEG without
# an error and prints a line for every GeoTIFF tag.

# Modes that become RGB without changing a value that we keep: grey repeats, palettes expand, alpha drops.
_RGB_LIKE = ("RGB", "RGBA", "L", "LA", "P", "1")
# Pillow stretches grey PNGs of 2 and 4 bits to 0..255; a label wants the stored numbers back.
_GREY_STRETCH = {"L;2": 85, "L;4": 17}

Colour = tuple[int, int, int]


def read_image(path: str) -> np.ndarray:
    """uint8 (H, W, 3) RGB. Grey is repeated and alpha dropped; 16-bit, float or CMYK data raise UserError."""
    try:
        # Read at once: Pillow asks for a TIFF's tags bit by bit, and each time the threads fight for Python's lock.
        with open(path, "rb", buffering=0) as opened:
            data = opened.read()
        with Image.open(io.BytesIO(data)) as file:
            mode, stored = file.mode, _stored_mode(file)
            # Pillow calls 16-bit RGB 'RGB' too and would keep the high byte without a word.
            if mode in _RGB_LIKE and ";16" not in stored:
                plain = _plain_rgb(data, file) if mode == "RGB" else None
                return np.asarray(file if mode == "RGB" else file.convert("RGB")) if plain is None else plain
    except UnidentifiedImageError as error:
        if not _is_tiff(path):
            raise unreadable(path, error) from error
        mode, stored = "TIFF", "TIFF with other bands or numbers"
    except Exception as error:
        raise unreadable(path, error) from error
    raise UserError(
        f"image {path} is stored as {stored or mode}, not 8-bit RGB: set config.data.bands and config.data.scale, the "
        "values that become 0 and 255, or convert it"
    )


def _plain_rgb(data: bytes, file: Image.Image) -> np.ndarray | None:
    """Pixels that lie uncompressed and in order in the file, read-only; None for any other file.

    Pillow would take them apart and pack them again, much of it under Python's lock, so that a second reading thread
    would gain nothing (benchmarks/NOTES.md).
    """
    width, height = file.size
    start = file.tile[0].offset if file.tile else 0
    end = start
    for codec, (left, top, right, bottom), offset, args in file.tile:
        in_order = offset == end and end - start == top * width * 3
        if not in_order or (codec, left, right, args) != ("raw", 0, width, ("RGB", 0, 1)):
            return None
        end = offset + (bottom - top) * width * 3
    if not file.tile or end - start != height * width * 3 or end > len(data):
        return None
    return np.frombuffer(data, np.uint8, end - start, start).reshape(height, width, 3)


def _is_tiff(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the latter two: BigTIFF


def read_bands(
    path: str, bands: Sequence[int] | None, scale: Sequence | None, nodata: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """`bands` of a raster (numbers from 1; None: all three) -> uint8 (H, W, bands), and where there are data (H, W).

    `scale`: (low, high) or one such pair per band, the values that become 0 and 255; None for 8-bit files. `nodata`
    stands before what the file declares. A pixel has no data where none of its bands has; a single missing band is 0.
    """
    rasterio = import_rasterio(path)
    try:
        with rasterio.open(path) as file:
            chosen = tuple(bands or range(1, file.count + 1))
            if max(chosen) > file.count:
                raise UserError(
                    f"image {path} has {file.count} band(s), so no band {max(chosen)}: correct config.data.bands"
                )
            if bands is None and file.count != 3:
                raise UserError(f"image {path} has {file.count} bands: choose some with config.data.bands, from 1")
            pixels, present = read_window(file, chosen, scale, nodata)
    except UserError:
        raise
    except Exception as error:
        # GDAL's own words are in the cause; rasterio's are "Read failed. See previous exception for details."
        raise unreadable(path, error.__cause__ or error) from error
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), present


def read_window(
    file, bands: Sequence[int], scale: Sequence | None, nodata: float | None, window=None, alphas=None, by_band=True
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_bands`, of an open raster and one window of it: uint8 (bands, H, W), and where there are data (H, W).

    `alphas`: of a scene, the bands that say where data are; then the file's own word counts beside `nodata`. None: to
    be found out from what they hold here. `by_band`: a missing band is 0 where others are not; else 8-bit values stay.
    """
    values = file.read(bands, window=window)
    present = True if nodata is None else values != nodata
    if nodata is None or alphas is not None:
        present = present & _present(file, bands, values, window, alphas)
    if values.dtype.kind not in "uif":
        raise UserError(f"image {file.name} holds {values.dtype}: only whole and floating numbers can be read")
    if values.dtype.kind == "f":
        present = present & np.isfinite(values)
    if scale is None:
        if values.dtype != np.uint8:
            held = values[np.broadcast_to(present, values.shape)]
            held = f" from {held.min()} to {held.max()}" if held.size else ""
            raise UserError(
                f"image {file.name} holds {values.dtype}{held}, not 8-bit values: set config.data.scale=(low, high), "
                "the values that become 0 and 255"
            )
        pixels = values
    else:
        low, high = np.asarray(scale, np.float64).T
        pixels = np.moveaxis(stretch(np.moveaxis(values, 0, -1), low, high), -1, 0)
    if not present.all():
        pixels *= present if by_band or scale is not None else present.any(0)
    return pixels, present.any(0)


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


def import_rasterio(path: str):
    """The module, or UserError: it is an extra."""
    try:
        import rasterio
    except ImportError as error:
        raise UserError(
            f"{path}: reading bands other than 8-bit RGB takes rasterio; pip install -e '.[geo]'"
        ) from error
    # A tile without a place on Earth is as good as any, and what goes wrong is raised anyway.
    warnings.filterwarnings("ignore", category=rasterio.errors.NotGeoreferencedWarning)
    logging.getLogger("rasterio").setLevel(logging.CRITICAL)
    return rasterio


def read_label(path: str, mapping: Mapping[int | Colour, int] | None = None) -> np.ndarray:
    """uint8 (H, W) class indices; a palette image gives its indices, not its colours.

    `mapping` turns stored values into classes, and then every value must be in it: {128: 0, 64: 1} or, for masks drawn
    in colours, {(255, 0, 0): 0, ...}.
    """
    coloured = mapping is not None and isinstance(next(iter(mapping)), tuple)
    try:
        with Image.open(path) as file:
            mode, stored = file.mode, _stored_mode(file)
            values = np.asarray(file.convert("RGB") if coloured and mode in _RGB_LIKE else file)
            if not coloured and file.format == "TIFF":
                values = _tiff_values(path, file, values)
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    if coloured:
        if values.ndim != 3 or values.dtype != np.uint8 or ";16" in stored:
            raise UserError(f"label {path} is {mode}, not 8-bit RGB, though config.data.label_map maps colours")
        # One number per colour, 0xRRGGBB.
        values = values.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    elif values.ndim != 2 or values.dtype.kind not in "bui":
        raise UserError(
            f"label {path} is {mode}, not one band of class indices: write the index of the class in every pixel "
            "(8-bit grey or palette PNG)"
            + ("" if values.ndim == 2 else ", or map its colours by config.data.label_map")
        )
    elif stored in _GREY_STRETCH:
        values = values // np.uint8(_GREY_STRETCH[stored])
    if mapping is not None:
        return _mapped(path, values, mapping)
    if values.dtype not in (np.uint8, np.bool_) and (values.min() < 0 or values.max() > IGNORE):
        raise UserError(
            f"label {path} ({mode}) holds values from {values.min()} to {values.max()}: class indices must fit 0 to "
            f"{IGNORE - 1}, with {IGNORE} for ignored pixels; other values can be mapped by config.data.label_map"
        )
    return values.astype(np.uint8, copy=False)


_BANDS, _PHOTOMETRIC, _SAMPLE_FORMAT = 277, 262, 339  # TIFF tags


def _tiff_values(path: str, file: Image.Image, values: np.ndarray) -> np.ndarray:
    """What Pillow passes over: further bands, white as 0, and numbers with another sign than its modes have."""
    tags = file.tag_v2
    if tags.get(_BANDS, 1) != 1 and values.ndim == 2:
        raise UserError(f"label {path} has {tags[_BANDS]} bands, not one of class indices: write only that one")
    if tags.get(_PHOTOMETRIC) == 0:
        raise UserError(
            f"label {path} is stored with white as 0, so its numbers are not sure: write it as 'black is 0'"
        )
    signed = tags.get(_SAMPLE_FORMAT, (1,))[0] == 2
    if values.dtype == np.uint8 and signed:
        return values.view(np.int8)
    return values.view(np.uint32) if values.dtype == np.int32 and not signed else values


def _mapped(path: str, values: np.ndarray, mapping: Mapping) -> np.ndarray:
    numbers = {(k[0] << 16 | k[1] << 8 | k[2]) if isinstance(k, tuple) else k: v for k, v in mapping.items()}
    known = np.array(sorted(numbers), np.int64)
    classes = np.array([numbers[k] for k in known.tolist()], np.uint8)
    values = values.astype(np.int64)
    place = np.minimum(np.searchsorted(known, values), len(known) - 1)
    if (strange := known[place] != values).any():
        found = np.unique(values[strange])[:5].tolist()
        coloured = isinstance(next(iter(mapping)), tuple)
        named = ", ".join(str((v >> 16, v >> 8 & 255, v & 255) if coloured else v) for v in found)
        raise UserError(
            f"label {path} holds {'colours' if coloured else 'values'} that config.data.label_map does not name: "
            f"{named}; add them ({IGNORE} for pixels to ignore)"
        )
    return classes[place]


def _stored_mode(file: Image.Image) -> str:
    """Pillow's name for the pixel layout inside the file, such as 'RGB;16B'; ask before loading them."""
    args = file.tile[0].args if file.tile else ""
    return args if isinstance(args, str) else str(args[0]) if args else ""


def unreadable(path: str, error: BaseException) -> UserError:
    text = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"cannot read {path}: {text}")
