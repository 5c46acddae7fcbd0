"""Pixels and areas by class within the polygons of a vector file. A pixel belongs to a polygon if its centre does."""

import dataclasses
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ktda_jax import UserError
from ktda_jax.data import pixel_area
from ktda_jax.data.gdal import opened, place_of
from ktda_jax.prediction.tally import Tally
from ktda_jax.tiling.blend import NODATA

BLOCK = 1 << 24  # pixels of a map in memory at once
EDGE = 1 / 200  # of a polygon's longer side: parts of its edges, before another CRS bends them
MARGIN = 0.01  # of a map's sides, around it: its bent edges are known by some of their points
SHOWN = 5  # names in one line


@dataclasses.dataclass(frozen=True)
class Zones:
    path: str
    names: list[str]
    shapes: np.ndarray  # of shapely polygons and multipolygons
    crs: Any  # rasterio's, or None


def check_installed() -> None:
    try:
        import pyogrio  # noqa: F401
        import shapely  # noqa: F401
    except ImportError as error:
        raise UserError("--polygons takes pyogrio and shapely; pip install -e '.[geo]'") from error


def read(text: str, *, layer: str | None = None, field: str | None = None, say: Callable[[str], None]) -> Zones:
    """layer: of a file with several. field: which one names the polygons; by default their numbers. `say`: warnings.

    UserError if there is nothing to count in.
    """
    import pyogrio
    import shapely
    from rasterio.crs import CRS

    path = os.path.expanduser(text)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of geometries that are said below
            layers = [str(name) for name, _ in pyogrio.list_layers(path)]
            if layer is None and len(layers) > 1:
                raise UserError(f"--polygons={text} has the layers {', '.join(layers)}; choose one by --layer")
            if layer is not None and layer not in layers:
                raise UserError(f"--polygons={text} has no layer {layer!r}; it has {', '.join(layers)}")
            about, numbers, found, values = pyogrio.raw.read(
                path, layer=layer, columns=[] if field is None else [field], return_fids=True
            )
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, OSError, RuntimeError) as error:
        raise UserError(f"cannot read --polygons={text}: {' '.join(str(error).split())}") from error
    if field is not None and field not in about["fields"]:
        known = ", ".join(pyogrio.read_info(path, layer=layer)["fields"])
        raise UserError(f"--polygons={text} has no field {field!r}; it has {known or 'none'}")
    if not len(numbers):
        raise UserError(f"--polygons={text} has no features")
    shapes = shapely.from_wkb(found) if found is not None else np.full(len(numbers), None)
    names = [str(value) for value in (numbers if field is None else values[0])]
    shapes = shapely.force_2d(shapes)
    kinds = shapely.get_type_id(shapes)
    given = np.isin(kinds, (3, 6)) & ~shapely.is_empty(shapes)  # polygons and multipolygons
    if not given.any():
        raise UserError(f"--polygons={text} holds no polygons, but {about.get('geometry_type') or 'no geometry'}")
    valid, repaired = shapely.is_valid(shapes), shapes.copy()
    for k in np.flatnonzero(given & ~valid):
        repaired[k] = _polygonal(shapely.make_valid(shapes[k]))
    polygonal = given & ~shapely.is_empty(repaired)
    if not polygonal.any():
        raise UserError(f"--polygons={text} holds no polygons with an area")
    if not polygonal.all():
        say(f"warning: --polygons={text}: {_some(names, ~polygonal)} without a polygon, left out")
    names, shapes = [name for name, kept in zip(names, polygonal, strict=True) if kept], shapes[polygonal]
    if not valid[polygonal].all():
        reason = shapely.is_valid_reason(shapes[~valid[polygonal]][0])
        say(f"warning: --polygons={text}: {_some(names, ~valid[polygonal])} not valid, repaired ({reason})")
    return Zones(text, names, repaired[polygonal], CRS.from_user_input(about["crs"]) if about["crs"] else None)


def _polygonal(shape):
    """Without the lines and points that a repair or a cut leaves beside polygons: `rasterize` would burn them, too."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(shape))  # of multipolygons in collections, too
    return shapely.MultiPolygon(list(parts[shapely.get_type_id(parts) == 3]))


def _some(names: Sequence[str], chosen: np.ndarray) -> str:
    picked = [names[k] for k in np.flatnonzero(chosen)]
    more = f" and {len(picked) - SHOWN} more" if len(picked) > SHOWN else ""
    return f"{len(picked)} of {len(names)} ({', '.join(picked[:SHOWN])}{more})"


def whole(path: pathlib.Path) -> Tally:
    """Of a map, in blocks of rows. UserError if it is none."""
    with opened(path) as file:
        _check_map(file, path)
        tally = Tally(pixel_area.of_place(place_of(file), file.height, file.width))
        for labels, top, _ in _blocks(file, range(file.height), range(file.width)):
            tally.add(labels, top)
    return tally


def within(path: pathlib.Path, zones: Zones) -> list[Tally | None]:
    """Of a map, for each polygon; None where it is not touched. UserError if they cannot be laid over each other."""
    import shapely
    from rasterio.features import rasterize

    with opened(path) as file:
        _check_map(file, path)
        place = place_of(file)
        if "gcps" in place:
            raise UserError(f"{path} is placed by ground control points, on which no polygon fits; use gdalwarp first")
        if (place["crs"] is None) != (zones.crs is None):
            lacking = path if place["crs"] is None else f"--polygons={zones.path}"
            raise UserError(f"{lacking} has no CRS, so where the polygons lie on the map is not known; give it one")
        area = pixel_area.of_place(place, file.height, file.width)
        shapes, inverse = _reprojected(zones, file), ~file.transform
        found = []
        for shape, (west, south, east, north) in zip(shapes, shapely.bounds(shapes), strict=True):
            corners = np.array([west, east, east, west]), np.array([south, south, north, north])
            columns, rows = pixel_area.applied(inverse, *corners)
            if not np.isfinite(columns).all() or not np.isfinite(rows).all():
                found.append(None)
                continue
            rows, columns = _range(rows, file.height), _range(columns, file.width)
            if not rows or not columns:
                found.append(None)
                continue
            tally, geometry = Tally(area), shapely.geometry.mapping(shape)
            for labels, top, transform in _blocks(file, rows, columns):
                inside = rasterize([(geometry, 1)], labels.shape, transform=transform, dtype="uint8")
                tally.add(labels, top, inside)
            found.append(tally if tally.pixels.any() else None)
        return found


def _check_map(file, path: pathlib.Path) -> None:
    if file.count != 1 or file.dtypes[0] != "uint8":
        raise UserError(
            f"{path} is no map of classes: {file.count} bands of {file.dtypes[0]}, where one of uint8 is wanted"
        )
    if "UNIT" in file.tags():
        raise UserError(f"{path} holds {file.tags()['UNIT']}, not classes; give the map itself")


def _range(values: np.ndarray, most: int) -> range:
    """Of `most` pixels those between the lowest and the highest value."""
    return range(max(int(np.floor(values.min())), 0), min(int(np.ceil(values.max())), most))


def _blocks(file, rows: range, columns: range) -> Iterator[tuple[np.ndarray, int, Any]]:
    """(labels (h, w) with 255 where there are no data, their first row, their transform), from top to bottom."""
    from rasterio.windows import Window, transform

    side = file.block_shapes[0][0]
    step = max(BLOCK // len(columns) // side * side, 1)
    for top in rows[::step]:
        window = Window(columns.start, top, len(columns), min(step, rows.stop - top))
        labels = file.read(1, window=window)
        if file.nodata not in (None, NODATA):
            labels[labels == file.nodata] = NODATA
        yield labels, top, transform(window, file.transform)


def _reprojected(zones: Zones, file) -> np.ndarray:
    """The polygons in the map's CRS, where they are near the map; far from it they may have none, or a wrong one."""
    if zones.crs is None or zones.crs == file.crs:
        return zones.shapes
    near = _near(zones, file)
    if (found := _moved(near, zones.crs, file.crs)) is None:
        lost = np.array([_moved(near[k : k + 1], zones.crs, file.crs) is None for k in range(len(near))])
        raise UserError(
            f"--polygons={zones.path}: {_some(zones.names, lost)} cannot be brought to "
            f"{pixel_area.name_of(file.crs)}, where some of their corners have no place; cut them to the map"
        )
    return found


def _near(zones: Zones, file) -> np.ndarray:
    """The polygons cut to the map's bounds and a margin; as they are if the bounds have no place in their CRS."""
    import rasterio.warp
    import shapely

    x, y = pixel_area.applied(
        file.transform, np.array([0, file.width, file.width, 0]), np.array([0, 0, file.height, file.height])
    )
    try:
        bounds = rasterio.warp.transform_bounds(file.crs, zones.crs, x.min(), y.min(), x.max(), y.max(), densify_pts=50)
    except Exception:  # GDAL's are of no base of rasterio's
        return zones.shapes
    if not np.isfinite(bounds).all():
        return zones.shapes
    west, south, east, north = bounds
    turn = _turn(zones.crs)  # polygons may go beyond 180 degrees
    east += turn if east < west else 0  # across the date line
    across, up = MARGIN * (east - west), MARGIN * (north - south)
    if turn:
        across = min(across, (turn - (east - west)) / 2)  # once around at most
    box, pieces = shapely.box(west - across, south - up, east + across, north + up), []
    for k in (-1, 0, 1) if turn else (0,):
        step = np.array([k * turn, 0])
        cut = shapely.intersection(zones.shapes, shapely.transform(box, lambda xy, step=step: xy + step))
        pieces.append(shapely.transform(cut, lambda xy, step=step: xy - step))
    near = shapely.union_all(np.stack(pieces), axis=0)
    for k in np.flatnonzero(~np.isin(shapely.get_type_id(near), (3, 6)) & ~shapely.is_empty(near)):
        near[k] = _polygonal(near[k])
    return near


def _turn(crs) -> float:
    """After how much of x a place comes again; 0: it does not, or nobody draws that far."""
    if crs.is_geographic:
        return 2 * np.pi / crs.units_factor[1]
    return 2 * np.pi * pixel_area.AXIS if crs.to_epsg() == 3857 else 0.0


def _moved(shapes: np.ndarray, source, target) -> np.ndarray | None:
    """In another CRS; None if a point has no place there."""
    import rasterio.warp
    import shapely

    found, there = shapes.copy(), ~shapely.is_empty(shapes)
    west, south, east, north = shapely.bounds(shapes[there]).T
    fine = shapely.segmentize(shapes[there], np.maximum(east - west, north - south) * EDGE)

    def moved(points: np.ndarray) -> np.ndarray:
        return np.column_stack(rasterio.warp.transform(source, target, points[:, 0], points[:, 1]))

    try:
        found[there] = shapely.transform(fine, moved) if there.any() else fine
    except Exception:  # GDAL's are of no base of rasterio's
        return None
    return found if np.isfinite(shapely.get_coordinates(found)).all() else None
