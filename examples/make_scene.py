"""A scene to try things on: a synthetic meadow as GeoTIFF, and its labels beside it.

    python examples/make_scene.py scene.tif             # 1024 x 1024 px of 0.1 m, and scene_labels.tif
    python examples/make_scene.py scene.tif --size=2048

The demo's tiles (configs/demo.py) come from the same generator, with other random numbers.
"""

import argparse
import pathlib

import rasterio

from data_builders.meadow import generate

PLACE = dict(crs="EPSG:32632", transform=rasterio.Affine(0.1, 0, 600_000, 0, -0.1, 5_200_000))  # near Innsbruck


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scene", type=pathlib.Path, help="the GeoTIFF to write")
    parser.add_argument("--size", type=int, default=1024, help="pixels a side")
    given = parser.parse_args()
    image, labels = generate.generate_tile(7, 0, given.size, split="scene")
    for path, bands in (
        (given.scene, image.transpose(2, 0, 1)),
        (given.scene.with_name(f"{given.scene.stem}_labels.tif"), labels[None]),
    ):
        options = dict(count=len(bands), height=given.size, width=given.size, dtype="uint8", compress="deflate")
        with rasterio.open(path, "w", driver="GTiff", tiled=True, **options, **PLACE) as file:
            file.write(bands)
        print(path)


if __name__ == "__main__":
    main()
