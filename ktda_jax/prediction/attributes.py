"""What GDAL and QGIS find beside a map, in NAME.aux.xml: class names, and a raster attribute table.

GeoTIFF and PNG have no place for them of their own. The table has a row per class: its number, name, colour and pixels.
"""

import pathlib
from collections.abc import Sequence
from xml.sax.saxutils import escape

import numpy as np

# Name, type (0 whole number of 32 bits, 1 any number, 2 text) and usage, as GDAL's GDALRATFieldType and
# GDALRATFieldUsage number them.
FIELDS = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8), ("Count", 1, 1))


def beside(path: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(f"{path}.aux.xml")


def write(path: pathlib.Path, classes: Sequence[str], palette: Sequence[Sequence[int]], pixels: np.ndarray) -> None:
    """Adds them to what GDAL has already put beside the map `path`. pixels: int (256,), by value."""
    aside = beside(path)
    text = aside.read_text(encoding="utf-8") if aside.exists() else "<PAMDataset></PAMDataset>"
    names = "".join(f"<Category>{_text(name)}</Category>" for name in classes)
    columns = "".join(
        f'<FieldDefn index="{k}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>'
        for k, (name, kind, usage) in enumerate(FIELDS)
    )
    rows = "".join(
        f'<Row index="{k}">{"".join(f"<F>{_text(v)}</F>" for v in (k, name, *colour, pixels[k]))}</Row>'
        for k, (name, colour) in enumerate(zip(classes, palette, strict=True))
    )
    table = f'<GDALRasterAttributeTable tableType="thematic">{columns}{rows}</GDALRasterAttributeTable>'
    band = f'<PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames>{table}</PAMRasterBand>'
    aside.write_text(text.replace("</PAMDataset>", f"{band}</PAMDataset>").rstrip() + "\n", encoding="utf-8")


def _text(value) -> str:
    """Escaped, and without the control characters that XML cannot hold."""
    return escape("".join(c if c.isprintable() else " " for c in str(value)))
