"""The forms in which `l8_biome` can be built: the published `tiles`, or `scenes` cut by us. The name says all options.

`scenes[_percentile|_reflectance][_clear][_SIZEpx]`, as in `scenes_percentile_clear`.
"""

import dataclasses
import itertools
import re

import tensorflow_datasets as tfds

from ktda_jax import UserError
from ktda_jax.data.datasets import dataset_info

STRETCHES = {  # the first is the default, which the name leaves out
    "minmax": "min-max stretched per tile, fill included, as published",
    "percentile": "stretched per scene from the 1st to the 99th percentile of its three bands together",
    "reflectance": "top-of-atmosphere reflectance 0 to 1 (without sun angle correction) spread over 0 to 255",
}
FILLS = {"ignore": "fill is labelled 255 (ignore)", "clear": "fill is labelled Clear, as published"}
TILE_SIZE = dataset_info("l8_biome").tile_size


@dataclasses.dataclass(eq=False)
class Variant(tfds.core.BuilderConfig):
    """`tiles`, or scenes cut with these options; UserError unless `name` is the one that tells them."""

    stretch: str = "minmax"  # a key of STRETCHES
    fill: str = "ignore"  # a key of FILLS
    tile_size: int = TILE_SIZE  # pixels a side

    def __post_init__(self):
        for option, known in (("stretch", STRETCHES), ("fill", FILLS)):
            if getattr(self, option) not in known:
                raise UserError(f"l8_biome: {option} is {getattr(self, option)!r}, not {' or '.join(known)}")
        if not isinstance(self.tile_size, int) or self.tile_size < 1:
            raise UserError(f"l8_biome: tile_size is {self.tile_size!r}, not a whole number of pixels from 1")
        name = _name(self.stretch, self.fill, self.tile_size)
        if self.name not in (name, "tiles") or (self.name == "tiles" and name != "scenes"):
            raise UserError(
                f"l8_biome: the configuration with stretch {self.stretch}, fill {self.fill} and {self.tile_size} px "
                f"is called {name!r}, not {self.name!r}: give it that name"
            )
        if self.name == "tiles":
            self.description = "The published 512 px tiles."
        else:
            self.description = (
                f"{self.tile_size} px tiles cut from USGS scenes, bands 4-3-2, {STRETCHES[self.stretch]}; "
                f"{FILLS[self.fill]}."
            )


def variant(name: str) -> Variant:
    """The variant with the options that `name` tells; UserError for other names."""
    pattern = rf"scenes(?:_({'|'.join(STRETCHES)}))?(?:_({'|'.join(FILLS)}))?(?:_(\d+)px)?"
    if name != "tiles":
        if not (match := re.fullmatch(pattern, name)):
            raise UserError(f"l8_biome has no configuration {name!r}: known are {', '.join(VARIANTS)}")
        stretch, fill, size = match.groups()
        return Variant(name, stretch=stretch or "minmax", fill=fill or "ignore", tile_size=int(size or TILE_SIZE))
    return Variant(name)


def _name(stretch, fill, tile_size) -> str:
    parts = [
        "" if stretch == "minmax" else f"_{stretch}",
        "" if fill == "ignore" else f"_{fill}",
        "" if tile_size == TILE_SIZE else f"_{tile_size}px",
    ]
    return "scenes" + "".join(parts)


VARIANTS = {
    name: variant(name)
    for name in ("tiles", *(_name(*options, TILE_SIZE) for options in itertools.product(STRETCHES, FILLS)))
}
