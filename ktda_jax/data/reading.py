"""What config.data says about reading raw tiles: bands, value range, the meaning of stored labels."""

import math
from numbers import Integral, Real

from ktda_jax import UserError
from ktda_jax.data.datasets import IGNORE

SETTING = "config.data.label_map"  # as messages call the label map, unless a flag gives it


def bands_of(data) -> tuple[int, tuple[int, int, int]]:
    """Number of bands in an image, and the positions of red, green and blue among them."""
    bands = tuple(data.bands or (1, 2, 3))
    rgb = data.rgb or (bands[:3] if len(bands) > 2 else bands[:1] * 3)
    return len(bands), tuple(bands.index(band) for band in rgb)


def positions_of(data, chosen, where: str) -> tuple[int, ...]:
    """Of `chosen` bands among those of an image; UserError, which names them as `where`, for one that it lacks."""
    bands = tuple(data.bands or (1, 2, 3))
    if set(chosen) - set(bands):
        raise UserError(f"{where} is {tuple(chosen)}; give some of config.data.bands {bands}")
    return tuple(bands.index(band) for band in chosen)


def label_map_of(data) -> dict | None:
    """{stored value or colour: class}."""
    return data.label_map and as_mapping(data.label_map)


def as_mapping(pairs) -> dict:
    """The same of ((stored value or colour, class), ...)."""
    return {tuple(k) if _is_sequence(k) else k: v for k, v in pairs}


def check(data, num_classes: int) -> None:
    """UserError for what no file could be read by."""
    bands = data.bands if data.bands is not None else (1, 2, 3)
    if not bands or not all(_is_whole(b) and b > 0 for b in bands) or len(set(bands)) < len(bands):
        raise UserError(f"config.data.bands is {tuple(bands)}; give different band numbers, counted from 1")
    if data.rgb is not None and (len(data.rgb) != 3 or set(data.rgb) - set(bands)):
        raise UserError(f"config.data.rgb is {tuple(data.rgb)}; give three of config.data.bands {tuple(bands)}")
    if data.scale and not is_scale(data.scale, len(bands)):
        raise UserError(
            f"config.data.scale is {data.scale}; give (low, high), or one such pair for each of the {len(bands)} bands"
        )
    if data.nodata is not None and not math.isfinite(data.nodata):
        raise UserError(f"config.data.nodata is {data.nodata}; leave it None: what is not finite never counts as data")
    if data.source == "tfds" and any(
        value is not None for value in (data.bands, data.scale, data.nodata, data.label_map)
    ):
        raise UserError("config.data.bands, scale, nodata and label_map are for folders; a TFDS builder has done it")
    check_label_map(data.label_map or (), num_classes)


def is_scale(scale, bands: int) -> bool:
    """Whether it is (low, high), or one such pair for each band."""
    pairs = scale if scale and _is_sequence(scale[0]) else [scale]
    return len(pairs) in (1, bands) and all(map(_is_range, pairs))


def check_label_map(pairs, num_classes: int, where: str = SETTING) -> None:
    """UserError, which names it as `where`, for what is no label map into so many classes."""
    if any(not _is_sequence(pair) or len(pair) != 2 for pair in pairs):
        raise UserError(f"{where} is {pairs}; give ((stored value, class), ...)")
    stored = [tuple(key) if _is_sequence(key) else key for key, _ in pairs]
    if len({isinstance(key, tuple) for key in stored}) > 1:
        raise UserError(f"{where}: give either whole numbers or (red, green, blue) triples, not both")
    for key, (_, index) in zip(stored, pairs, strict=True):
        colour = isinstance(key, tuple)
        if not (len(key) == 3 and all(_is_whole(v) and 0 <= v < 256 for v in key) if colour else _is_whole(key)):
            raise UserError(f"{where} maps {key!r}; give a whole number, or a colour of three from 0 to 255")
        if stored.count(key) > 1:
            raise UserError(f"{where} maps {key} twice; leave one of them")
        if not _is_whole(index) or (index != IGNORE and not 0 <= index < num_classes):
            raise UserError(
                f"{where} turns {key} into {index!r}; give a class from 0 to {num_classes - 1}, or {IGNORE} to ignore"
            )


def _is_sequence(value) -> bool:
    return isinstance(value, (tuple, list))


def _is_whole(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_range(pair) -> bool:
    return len(pair) == 2 and all(isinstance(v, Real) and math.isfinite(v) for v in pair) and pair[0] < pair[1]
