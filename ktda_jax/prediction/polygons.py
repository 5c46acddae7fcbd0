"""A map as polygons in a GeoPackage.

Polygons are made window by window, so that memory does not grow with the scene: they are cut every SIDE pixels.
"""

import functools
import itertools
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.gdal import one_line, rasterio_for
from ktda_jax.data.raster import Scene

SIDE = 4096  # pixels
PORTION = 100_000  # polygons written at once


def check_installed() -> None:
    try:
        import pyogrio  # noqa: F401
        import shapely  # noqa: F401
    except ImportError as error:
        raise UserError("--polygonize takes pyogrio and shapely; pip install -e '.[geo]'") from error


def check_place(scene: Scene) -> None:
    """UserError if its ground control points are too few."""
    if points := scene.place.get("gcps"):
        try:
            by_points(points, np.zeros((1, 2)))
        except UserError as error:
            raise UserError(f"{scene.path}: {error}") from error


def write(source: pathlib.Path, target: pathlib.Path, place: dict, classes: Sequence[str]) -> None:
    """source: a map. target: a GeoPackage with one layer `map`; fields `class` and `name`. UserError if it cannot."""
    import pyogrio.errors
    import shapely

    crs, begun = place.get("crs"), False
    for found in itertools.chain(_polygons(source), [[]]):
        if begun and not found:
            continue
        geometry = [shapely.geometry.shape(polygon) for polygon, _ in found]
        if place.get("gcps"):
            geometry = shapely.transform(geometry, functools.partial(by_points, place["gcps"]))
        geometry = shapely.to_wkb(geometry)
        numbers = np.array([value for _, value in found], np.int32)
        names = np.array(classes, object)[numbers] if found else np.array([], object)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a missing CRS, which has been said
                pyogrio.raw.write(
                    str(target), np.asarray(geometry, object), field_data=[numbers, names], fields=["class", "name"],
                    layer="map", driver="GPKG", geometry_type="Polygon", crs=crs.to_wkt() if crs else None,
                    append=begun,
                )  # fmt: skip
        except (pyogrio.errors.DataSourceError, pyogrio.errors.FieldError, RuntimeError) as error:
            raise UserError(f"cannot write in {target.parent}: {' '.join(str(error).split())}") from error
        begun = True


def by_points(points: Sequence, places: np.ndarray) -> np.ndarray:
    """places: columns and rows in pixels, (N, 2) -> coordinates (N, 2) by ground control points. UserError: too few."""
    import rasterio
    from rasterio.transform import GCPTransformer

    try:
        with rasterio.Env(), GCPTransformer(points) as found:
            return np.stack(found.xy(places[:, 1], places[:, 0], offset="ul"), -1)
    except Exception as error:  # GDAL's are of no base of rasterio's
        raise UserError(f"--polygonize: {len(points)} ground control points do not give places: {error}") from error


def _polygons(path: pathlib.Path) -> Iterator[list[tuple[dict, float]]]:
    """Connected pixels of one value as (GeoJSON polygon, value), by at most PORTION, in windows of SIDE pixels."""
    from rasterio import windows
    from rasterio.features import shapes

    rasterio = rasterio_for(path)
    with one_line(path), rasterio.open(path) as file:
        for top in range(0, file.height, SIDE):
            for left in range(0, file.width, SIDE):
                window = windows.Window(left, top, min(SIDE, file.width - left), min(SIDE, file.height - top))
                transform, values = windows.transform(window, file.transform), file.read(1, window=window)
                found = shapes(values, mask=values != file.nodata, transform=transform)
                while portion := list(itertools.islice(found, PORTION)):
                    yield portion
