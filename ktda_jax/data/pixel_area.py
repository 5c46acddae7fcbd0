"""How large pixels are on the ground: by their projected CRS, or on the ellipsoid, row by row.

The area between two parallels has a closed form on an ellipsoid of revolution (Snyder, Map Projections: A Working
Manual, 1987, equation 3-12). It is taken for degrees, and for projections of straight parallels that show areas
wrongly, such as Web Mercator; every other projection's own grid is taken as it is, and what it distorts is said.
"""

import dataclasses
from typing import Any

import numpy as np

AXIS = 6_378_137.0  # WGS 84: metres, half of the major axis
FLATTENING = 1 / 298.257223563
ECCENTRICITY = (FLATTENING * (2 - FLATTENING)) ** 0.5
DISTORTION = 0.01  # of areas, up to which a projection is believed: UTM has 0.002 at most within its zone
HECTARE = 1e4  # square metres


@dataclasses.dataclass(frozen=True)
class PixelArea:
    rows: np.ndarray | None  # float64 (H,): square metres of a pixel of each row; None: not known
    how: str  # where they are from, or why they are not known; for people

    @property
    def constant(self) -> bool:
        return self.rows is None or bool((self.rows == self.rows[0]).all())


def height_on_cylinder(latitude: np.ndarray) -> np.ndarray:
    """Metres of latitudes in degrees on the equal-area cylinder around the ellipsoid, where longitude * AXIS is across:
    areas there are those on the ellipsoid.
    """
    sine = np.sin(np.radians(np.clip(latitude, -90, 90)))
    e = ECCENTRICITY
    return AXIS * (1 - e * e) / 2 * (sine / (1 - (e * sine) ** 2) + np.arctanh(e * sine) / e)


def of_place(place: dict[str, Any], height: int, width: int) -> PixelArea:
    """place: crs, transform, gcps as `data.gdal.place_of` gives them, of a raster of that size."""
    crs, transform = place.get("crs"), place.get("transform")
    if transform is None:
        return PixelArea(None, "its place is told by ground control points")
    if crs is None:
        return PixelArea(None, "it has no CRS")
    if transform.is_identity:  # what GDAL gives where there is none
        return PixelArea(None, "it has no geotransform")
    name = name_of(crs)
    straight = not transform.b and not transform.d
    if crs.is_geographic:
        if not straight:
            return PixelArea(None, f"its grid is turned in {name}")
        radians = crs.units_factor[1]
        latitudes = np.degrees((transform.f + transform.e * np.arange(height + 1)) * radians)
        rows = np.abs(np.diff(height_on_cylinder(latitudes))) * AXIS * abs(transform.a) * radians
        return PixelArea(rows, f"row by row on the WGS 84 ellipsoid ({name})")
    if not crs.is_projected:
        return PixelArea(None, f"its CRS, {name}, is no place on Earth")
    side = crs.linear_units_factor[1]  # metres
    nominal = abs(transform.determinant) * side**2
    rows = np.full(height, nominal)
    true = _true_area(crs, transform, height, width)
    if not np.isfinite(true) or not true:
        return PixelArea(rows, f"{nominal:,.6g} m² a pixel by {name}, not checked: its middle has no place on Earth")
    ratio = nominal / true
    if abs(ratio - 1) <= DISTORTION:
        return PixelArea(rows, f"{nominal:,.6g} m² a pixel by {name}")
    false = f"{name} itself shows areas {ratio:.3g} times as large in its middle"
    if straight and (along := _by_parallels(crs, transform, height, width)) is not None:
        return PixelArea(along, f"row by row on the WGS 84 ellipsoid; {false}")
    return PixelArea(rows, f"{nominal:,.6g} m² a pixel; {false}: reproject to an equal-area CRS")


def name_of(crs) -> str:
    """'EPSG:32633', or what its definition calls it."""
    text = crs.to_string()
    return text if len(text) < 40 else text.split('"')[1] if '"' in text else f"{text[:40]}..."


def applied(transform, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of arrays; affine's own operator is another one in its version 3."""
    return transform.a * x + transform.b * y + transform.c, transform.d * x + transform.e * y + transform.f


def _degrees(crs, transform, columns, rows) -> tuple[np.ndarray, np.ndarray]:
    """Longitudes and latitudes of pixel corners; not finite where the projection has none."""
    import rasterio.warp

    x, y = applied(transform, np.asarray(columns, float), np.asarray(rows, float))
    try:
        found = rasterio.warp.transform(crs, "EPSG:4326", np.atleast_1d(x), np.atleast_1d(y))
    except Exception:  # GDAL's are of no base of rasterio's
        return np.full(np.size(x), np.nan), np.full(np.size(x), np.nan)
    return np.array(found[0]), np.array(found[1])


def _around_zero(degrees: np.ndarray) -> np.ndarray:
    """Differences of longitudes, from -180 up to 180."""
    return (degrees + 180) % 360 - 180


def _true_area(crs, transform, height: int, width: int) -> float:
    """Of the pixel in the middle, on the ellipsoid."""
    row, column = height // 2, width // 2
    longitudes, latitudes = _degrees(
        crs, transform, column + np.array([0, 1, 1, 0]), row + np.array([0, 0, 1, 1])
    )  # fmt: skip
    x = AXIS * np.radians(_around_zero(longitudes - longitudes[0]))
    y = height_on_cylinder(latitudes)
    y = y - y[0]
    return abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2


def _by_parallels(crs, transform, height: int, width: int) -> np.ndarray | None:
    """Of the pixels of each row, float64 (H,), where rows are parallels and columns meridians; None elsewhere."""
    edges, middle = np.arange(height + 1), width // 2
    (west, left), (east, right), (start, _), (end, _) = (
        _degrees(crs, transform, np.full(height + 1, column), edges) for column in (0, width, middle, middle + 1)
    )
    turned = _around_zero(east - west - (east - west)[0])  # of columns away from meridians; none at 180 degrees either
    if not (np.allclose(left, right, rtol=0, atol=1e-9) and np.allclose(turned, 0, rtol=0, atol=1e-9)):
        return None
    across = abs(_around_zero(end[0] - start[0]))
    return np.abs(np.diff(height_on_cylinder(left))) * AXIS * np.radians(across)
