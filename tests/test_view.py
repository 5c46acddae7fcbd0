"""`predict --view`: one page that needs no network, says what the map says, and works in a browser. And what GDAL finds
beside a map.
"""

import base64
import html.parser
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree

import browser
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import scene_files as sf
from PIL import Image

from ktda_jax.data.pixel_area import of_place
from ktda_jax.data.raster import open_scene
from ktda_jax.prediction import mapping, pyramid, view
from ktda_jax.prediction.files import name_outputs
from ktda_jax.prediction.outputs import Legend
from ktda_jax.prediction.tally import Tally
from ktda_jax.tiling.device import Step

EVIL = '<script>alert("1")</script>&'
NAMES = (f"low {EVIL}", "b", "c")
PALETTE = ((200, 30, 30), (30, 160, 30), (40, 60, 220))
SIZE = (700, 930)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scene.tif and its map with all that --view --confidence write; photo.png, and its page without confidence."""
    folder = tmp_path_factory.mktemp("view")
    values = sf.smooth(*SIZE)
    values[:60, :300] = 0
    sf.write(folder / "scene.tif", values, nodata=0)
    Image.fromarray(values[:90, 300:420]).save(folder / "photo.png")
    step = Step(sf.model(), (64, 64), 8)
    for name, made, wanted in (("scene.tif", "map.tif", dict(confidence=True)), ("photo.png", "picture.png", {})):
        scenes = mapping.check_scenes([folder / name], sf.READING, 3, print)
        outputs = name_outputs([folder / name], str(folder / made), one=True, view=True, **wanted)
        tags = {"CHECKPOINT": "runs/<i>best</i>"}
        mapping.map_scenes(scenes, outputs, step, Legend(NAMES, PALETTE), overlap=16, tags=tags, say=lambda line: None)
    return folder


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.data = [], [], "", ""
        self._within = None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        self._within = (tag, dict(attributes).get("id"))

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within == ("script", "data"):
            self.data += data
        elif self._within is None or self._within[0] not in ("script", "style"):
            self.text += data + " "


def decoded(uri: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_a_page_says_what_the_map_says_and_asks_nobody(folder):
    text = (folder / "map.html").read_text(encoding="utf-8")
    page, labels = Page(text), sf.read(folder / "map.tif")
    assert "http:" not in text and "https:" not in text and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    for name, value in page.attributes:
        assert name not in ("src", "href", "srcset", "action") or value.startswith("data:")
    assert page.tags.count("script") == 2 and "i" not in page.tags  # names are text, wherever they stand
    assert f"low {EVIL}" in page.text and "runs/<i>best</i>" in page.text
    for k in range(3):
        hectares = (labels == k).sum() * 0.09
        assert re.search(rf"{hectares:,.0f}|{hectares:.1f}", page.text), hectares
    assert f"{(labels == 255).sum() * 0.09:,.0f}" in page.text and "900 m² a pixel by EPSG:32633" in page.text
    assert "700 × 930 pixels, all of them shown" in page.text

    found = json.loads(page.data)
    assert found["classes"] == list(NAMES)
    assert [(level["height"], level["width"]) for level in found["levels"]] == [(700, 930), (350, 465)]
    tiles = [np.asarray(decoded(tile)) for tile in found["levels"][0]["tiles"]["map"]]
    whole = np.concatenate([np.concatenate(tiles[:2], 1), np.concatenate(tiles[2:], 1)])
    np.testing.assert_array_equal(whole, np.where(labels == 255, 3, labels))
    first = decoded(found["levels"][0]["tiles"]["map"][0]).convert("RGBA")
    assert first.getpixel((0, 0))[3] == 0 and first.getpixel((400, 400)) == (*PALETTE[labels[400, 400]], 255)
    confidence = np.asarray(decoded(found["levels"][0]["tiles"]["confidence"][0]))
    stored = sf.read(folder / "map_confidence.tif")[:512, :512]
    assert (confidence[stored == 255] == pyramid.STEPS).all() and (stored == 255).any()
    np.testing.assert_allclose((confidence[stored < 255] + 0.5) / pyramid.STEPS, stored[stored < 255] / 254, atol=0.02)


def test_a_picture_has_pixels_and_no_areas(folder):
    text = (folder / "picture.html").read_text(encoding="utf-8")
    page, labels = Page(text), sf.read(folder / "picture.png")
    assert "No areas, only pixels: it has no CRS." in page.text and "hectares" not in page.text
    assert all(f"{(labels == k).sum():,}" in page.text for k in range(3))
    assert "confidence" not in page.text and json.loads(page.data)["transform"] is None


def test_classes_of_one_colour_are_known_apart():
    red, almost = (255, 0, 0), (255, 0, 1)
    assert view._apart((red, red, almost, (9, 9, 9))) == (red, almost, (255, 0, 2), (9, 9, 9))
    assert view._apart(PALETTE) == PALETTE


def test_a_page_of_a_large_scene_is_bounded_and_says_what_it_shows(folder):
    """Noise, which nothing makes small."""
    scene, rng = open_scene(folder / "scene.tif", sf.READING, 3), np.random.default_rng(0)
    noise = [rng.integers(0, most, SIZE).astype(np.uint8) for most in (3, 254)]
    tally = Tally(of_place(scene.place, *SIZE))
    tally.add(noise[0], 0)
    seen = view.View(scene, pyramid.Layers(sf.smooth(*SIZE), *noise), tally, NAMES, PALETTE)
    whole = len(view.render(seen))
    text = view.render(seen, limit=whole // 3)
    assert whole // 5 < len(text) < whole // 3 + 30_000  # and what is no picture
    finest = json.loads(Page(text).data)["levels"][0]
    height, width = finest["height"], finest["width"]
    assert 350 < height < 600 and width / height == pytest.approx(930 / 700, abs=0.01)
    shown = f"shown at {height:,} × {width:,}: one of {930 / width:.3g} in each direction"
    assert shown in Page(text).text


def test_coarser_levels():
    labels = np.array([[0, 1, 2], [1, 2, 2], [255, 255, 1]], np.uint8)
    confidence = np.array([[100, 101, 50], [100, 100, 50], [255, 255, 20]], np.uint8)
    scene = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    half = pyramid.Layers(scene, labels, confidence).halved()
    np.testing.assert_array_equal(half.labels, [[1, 2], [255, 1]])
    np.testing.assert_array_equal(half.confidence, [[100, 50], [255, 20]])
    np.testing.assert_array_equal(half.scene[0, 0], [6, 7, 8])
    assert pyramid.Layers(scene, labels, None).halved().confidence is None


@pytest.fixture(scope="module")
def tab():
    if browser.program() is None:
        pytest.skip("needs a browser: apt-get install chromium")
    with browser.tab() as found:
        yield found


READY = "decoded.size > 0 && [...decoded.values()].every(picture => picture.complete) && frame === null"
PIXELS = "canvas.toDataURL()"


@pytest.mark.parametrize("size", [(1400, 900), (420, 800)])
def test_in_a_browser(tab, folder, size):
    tab.said.clear(), tab.asked.clear()
    tab.size(*size)
    tab.open(folder / "map.html")
    tab.until(READY)
    assert tab.run("document.documentElement.scrollWidth <= innerWidth")
    assert tab.run("document.querySelector('tbody th').textContent") == f"low {EVIL}"
    x, y = tab.run("(box => [box.x + box.width / 2, box.y + box.height / 2])(canvas.getBoundingClientRect())")
    assert tab.run("canvas.clientHeight") >= 400 and y > 0

    def state() -> tuple[float, str]:
        tab.until(READY)
        return float(tab.run("canvas.dataset.scale")), tab.run(PIXELS)

    whole = state()
    tab.mouse("mouseWheel", x, y, deltaX=0, deltaY=-300)
    tab.until(f"Number(canvas.dataset.scale) > {whole[0]}")
    nearer = state()
    assert nearer[0] == pytest.approx(2 * whole[0]) and nearer[1] != whole[1]
    tab.mouse("mousePressed", x, y, button="left", clickCount=1)
    tab.mouse("mouseMoved", x - 60, y - 40, button="left", buttons=1)
    tab.mouse("mouseReleased", x - 60, y - 40, button="left", clickCount=1)
    moved = state()
    assert moved[0] == nearer[0] and moved[1] != nearer[1]

    # What is under the pointer, by the map itself.
    labels = sf.read(folder / "map.tif")
    column, row = (int(v) for v in tab.run(f"at({x} - canvas.getBoundingClientRect().x, {y})"))
    tab.mouse("mouseMoved", x, y)
    tab.until("readout.textContent.includes('sure')")
    east, north = sf.UTM @ (column + 0.5, row + 0.5)
    said = tab.run("readout.textContent")
    assert said.startswith(f"{NAMES[labels[row, column]]} · ") and said.endswith(f" · {east:.0f}, {north:.0f}"), said
    assert tab.run("document.querySelectorAll('tr.here').length") == 1

    tab.run("canvas.focus()")
    tab.key("0")
    tab.until(f"Math.abs(canvas.dataset.scale - {whole[0]}) < 1e-9")
    assert state()[1] == whole[1]
    tab.key("+")
    tab.key("ArrowLeft")
    assert state()[0] == pytest.approx(2 * whole[0]) and state()[1] not in (nearer[1], whole[1])
    tab.run("document.querySelector('[data-zoom=fit]').click()")
    assert state()[1] == whole[1]

    def opacity(percent: int) -> str:
        tab.run(f"slider.value = {percent}; slider.dispatchEvent(new Event('input'))")
        return state()[1]

    pictures = [opacity(0), opacity(100), opacity(55)]
    assert pictures[2] == whole[1] and len(set(pictures)) == 3
    assert tab.run("output.textContent") == "55 %" and not tab.run("scale.checkVisibility()")
    tab.run("document.querySelector('input[value=confidence]').click()")
    assert state()[1] not in pictures and tab.run("scale.checkVisibility()")
    # Two fingers.
    tab.touch("touchStart", (x - 20, y), (x + 20, y))
    tab.touch("touchMove", (x - 60, y), (x + 60, y))
    tab.touch("touchEnd")
    tab.until(f"Number(canvas.dataset.scale) > {1.5 * whole[0]}")

    assert not tab.said
    assert {address for address in tab.asked if not address.startswith("data:")} == {(folder / "map.html").as_uri()}


def test_gdal_reads_names_colours_and_counts(folder, tmp_path):
    """GDAL writes what it has understood into a description of its own."""
    rasterio.shutil.copy(folder / "map.tif", tmp_path / "copy.vrt", driver="VRT")
    counts = [int((sf.read(folder / "map.tif") == k).sum()) for k in range(3)]
    rows = [
        [str(k), name, *map(str, colour), str(count)]
        for k, (name, colour, count) in enumerate(zip(NAMES, PALETTE, counts, strict=True))
    ]
    band = ElementTree.parse(tmp_path / "copy.vrt").find("VRTRasterBand")
    assert [name.text for name in band.iter("Category")] == list(NAMES)
    table = band.find("GDALRasterAttributeTable")
    assert table.get("tableType") == "thematic"
    assert [[cell.text for cell in row] for row in table.iter("Row")] == rows
    fields = {field.find("Name").text: int(field.find("Usage").text) for field in table.iter("FieldDefn")}
    # As GDALRATFieldUsage numbers them; QGIS finds its columns by these.
    assert fields == {"Value": 5, "Class": 2, "Red": 6, "Green": 7, "Blue": 8, "Count": 1}
    with rasterio.open(tmp_path / "copy.vrt") as copy:
        assert [copy.colormap(1)[k] for k in (0, 1, 2, 255)] == [*((*c, 255) for c in PALETTE), (0, 0, 0, 0)]


@pytest.mark.skipif(shutil.which("gdalinfo") is None, reason="needs gdalinfo: apt-get install gdal-bin")
def test_gdalinfo_shows_the_table(folder):
    told = subprocess.run(["gdalinfo", "-json", folder / "map.tif"], capture_output=True, text=True, check=True).stdout
    table = json.loads(told)["rat"]
    assert [row["f"][1] for row in table["row"]] == list(NAMES)
    assert [row["f"][2:5] for row in table["row"]] == [list(colour) for colour in PALETTE]
