"""How large pixels are: on the ellipsoid against its known area and an integral, by projections, and not known."""

import numpy as np
import pytest
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS

from ktda_jax.data import pixel_area as pa


def of(crs, transform, height=4, width=3):
    return pa.of_place({"crs": CRS.from_string(crs), "transform": transform}, height, width)


def test_the_whole_earth_has_its_area():
    """WGS 84: 510,065,621.724 km², NIMA TR8350.2, table 3.3."""
    rows = of("EPSG:4326", Affine(1, 0, -180, 0, -1, 90), 180, 360).rows
    assert 360 * rows.sum() / 1e6 == pytest.approx(510_065_621.724, abs=1e-3)
    assert rows == pytest.approx(rows[::-1])


def test_a_degree_is_the_integral_of_its_radii():
    """The radii of curvature along the meridian and across it, integrated in small steps."""
    e2, count = pa.ECCENTRICITY**2, 20_000
    latitude = np.radians(47 + (np.arange(count) + 0.5) / count)
    across = pa.AXIS / np.sqrt(1 - e2 * np.sin(latitude) ** 2)
    along = across * (1 - e2) / (1 - e2 * np.sin(latitude) ** 2)
    expected = (along * across * np.cos(latitude)).sum() * np.radians(1 / count) * np.radians(1)
    assert of("EPSG:4326", Affine(1, 0, 9, 0, -1, 48), 1, 1).rows == pytest.approx(expected, rel=1e-8)


def test_projections_are_taken_at_their_word_where_it_holds():
    found = of("EPSG:32633", Affine(30, 0, 4e5, 0, -30, 4.2e6))
    assert found.constant and found.rows.tolist() == [900] * 4 and found.how == "900 m² a pixel by EPSG:32633"
    turned = Affine(30, 0, 4e5, 0, -30, 4.2e6) @ Affine.rotation(20)
    assert of("EPSG:32633", turned).rows == pytest.approx(900)
    assert of("EPSG:2263", Affine(10, 0, 1e6, 0, -10, 2e5)).rows == pytest.approx(100 * 0.3048006096**2)  # US feet
    wrong = of("EPSG:3034", Affine(30, 0, 3e6, 0, -30, 2e6))  # a conformal cone, at its southern end
    assert wrong.rows[0] == 900 and "EPSG:3034 itself shows areas 0.946 times as large" in wrong.how
    assert "reproject to an equal-area CRS" in wrong.how


def test_web_mercator_is_mended():
    """The same ground in degrees; the factor is nearly that of the sphere."""
    x, edges = 1_669_792.3618991, (6_446_275.841017, 6_274_861.394007)  # 15° east; 50 and 49° north
    found = of("EPSG:3857", Affine(1000, 0, x, 0, -(edges[0] - edges[1]) / 100, edges[0]), 100, 10)
    degrees = of("EPSG:4326", Affine(1, 0, 15, 0, -1, 50), 1, 1).rows[0] * np.degrees(1e4 / pa.AXIS)
    assert not found.constant and 10 * found.rows.sum() == pytest.approx(degrees, rel=1e-6)
    factor = 1 / np.cos(np.radians(49.5)) ** 2
    assert f"EPSG:3857 itself shows areas {factor:.3g} times as large in its middle" in found.how


@pytest.mark.parametrize("column", [-5000, -10_000, -2500, 0])  # the line: in the middle, at an end, within
@pytest.mark.parametrize("side", [1, -1])
def test_web_mercator_at_the_date_line_is_as_elsewhere(side, column):
    half, width = np.pi * pa.AXIS, 10_000
    start = half + 10 * column if side > 0 else -half - 10 * (column + width)
    found = of("EPSG:3857", Affine(10, 0, start, 0, -10, 6_446_275), 100, width)
    elsewhere = of("EPSG:3857", Affine(10, 0, 1e6, 0, -10, 6_446_275), 100, width)
    assert elsewhere.rows.mean() == pytest.approx(100 * np.cos(np.radians(50)) ** 2, rel=5e-3)
    assert found.rows == pytest.approx(elsewhere.rows, rel=1e-7) and not found.constant


def test_where_nobody_knows_it_is_said():
    points = [GroundControlPoint(row=0, col=0, x=1, y=2)]
    for place, words in (
        ({"crs": None, "transform": Affine.identity()}, "no CRS"),
        ({"crs": CRS.from_epsg(32632), "transform": Affine.identity()}, "it has no geotransform"),
        ({"crs": CRS.from_epsg(4326), "transform": Affine.identity()}, "it has no geotransform"),
        ({"crs": CRS.from_epsg(4326), "gcps": points}, "ground control points"),
        ({"crs": CRS.from_epsg(4326), "transform": Affine.rotation(5)}, "its grid is turned in EPSG:4326"),
        (
            {"crs": CRS.from_wkt('LOCAL_CS["a mine",UNIT["metre",1]]'), "transform": Affine.scale(2)},
            "a mine, is no place",
        ),
    ):
        found = pa.of_place(place, 5, 5)
        assert found.rows is None and words in found.how


def test_a_grid_off_the_earth_is_not_called_checked():
    found = of("EPSG:32632", Affine(30, 0, 5e7, 0, -30, 5e7))
    assert found.rows.tolist() == [900] * 4
    assert found.how == "900 m² a pixel by EPSG:32632, not checked: its middle has no place on Earth"
