"""Maps a scene of any size: GeoTIFF in, GeoTIFF of classes out, with the scene's place on the ground.

    python examples/map_scene.py WORKDIR scene.tif map.tif

The map holds class numbers, and 255 where the scene has no data; a picture of it lies beside it. Needs
`pip install -e '.[geo]'`.
"""

import argparse
import pathlib
import sys

import numpy as np

from ktda_jax import predict


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="the workdir of a training, or converted weights")
    parser.add_argument("scene", help="a GeoTIFF with the bands of the training")
    parser.add_argument("map", help="the GeoTIFF to write")
    given = parser.parse_args()
    if pathlib.Path(given.map).suffix.lower() not in (".tif", ".tiff"):
        sys.exit(f"error: the map {given.map} must end in .tif")
    try:
        predict.run(given.model, given.scene, given.map, overlay=True)
    except ValueError as error:
        sys.exit(f"error: {error}")

    import rasterio

    with rasterio.open(given.map) as found:  # block by block: a map may be larger than memory
        blocks = (found.read(1, window=window) for _, window in found.block_windows(1))
        counts = sum(np.bincount(block.ravel(), minlength=256) for block in blocks)[:255]
        names = found.tags()
    for number in np.flatnonzero(counts):
        print(f"{names[f'CLASS_{number}']:24} {counts[number]:>14,} pixels {counts[number] / counts.sum():7.1%}")
    print(f"look at {pathlib.Path(given.map).with_suffix('')}_overlay.png")


if __name__ == "__main__":
    main()
