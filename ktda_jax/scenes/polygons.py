"""A map as polygons in a GeoPackage.

Polygons are made window by window, so that memory does not grow with the scene: they are cut every SIDE pixels.
"""

import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from ktda_jax.data.images import DataError
from ktda_jax.scenes.raster import one_line, rasterio_for

SIDE = 4096  # pixels


def check_installed() -> None:
    try:
        import pyogrio  # noqa: F401
        import shapely  # noqa: F401
    except ImportError as error:
        raise DataError("--polygonize takes pyogrio and shapely; pip install -e '.[geo]'") from error


def write(source: pathlib.Path, target: pathlib.Path, place: dict, classes: Sequence[str]) -> None:
    """source: a map. target: a GeoPackage with one layer `map`; fields `class` and `name`. DataError if it cannot."""
    import pyogrio.errors
    import shapely

    crs, begun = place.get("crs"), False
    for found in _polygons(source):
        geometry = shapely.to_wkb([shapely.geometry.shape(polygon) for polygon, _ in found])
        numbers = np.array([value for _, value in found], np.int32)
        names = np.array(classes, object)[numbers] if found else np.array([], object)
        if begun and not found:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing CRS, which has been said
                pyogrio.raw.write(
                    str(target), np.asarray(geometry, object), field_data=[numbers, names], fields=["class", "name"],
                    layer="map", driver="GPKG", geometry_type="Polygon", crs=crs.to_wkt() if crs else None,
                    append=begun,
                )  # fmt: skip
        except (pyogrio.errors.DataSourceError, pyogrio.errors.FieldError, RuntimeError) as error:
            raise DataError(f"cannot write in {target.parent}: {' '.join(str(error).split())}") from error
        begun = True


def polygons_of(path: pathlib.Path, side: int) -> Iterator[list[tuple[dict, float]]]:
    """Connected pixels of one value as (GeoJSON polygon, value), in windows of at most `side` pixels a side."""
    from rasterio.features import shapes
    from rasterio.windows import Window

    rasterio = rasterio_for(path)
    with _one_line(path), rasterio.open(path) as file:
        for top in range(0, file.height, side):
            for left in range(0, file.width, side):
                window = Window(left, top, min(side, file.width - left), min(side, file.height - top))
                transform = file.transform @ rasterio.Affine.translation(left, top)
                values = file.read(1, window=window)
                yield list(shapes(values, mask=values != file.nodata, transform=transform))
