"""The files of one scene's map, written under temporary names and renamed when all are whole, the map last.

Those that go to a bucket are written to a scratch folder of this machine (TMPDIR), and uploaded when all are whole.
"""

import colorsys
import contextlib
import dataclasses
import pathlib
import shutil
import tempfile
import uuid

import numpy as np
from PIL import Image

from ktda_jax import UserError
from ktda_jax.data import buckets, pixel_area
from ktda_jax.data.raster import Scene
from ktda_jax.prediction import attributes, polygons, view
from ktda_jax.prediction.files import Outputs
from ktda_jax.prediction.pyramid import Layers
from ktda_jax.prediction.tally import Tally
from ktda_jax.prediction.writing import RasterWriter, convert
from ktda_jax.tiling import blend
from ktda_jax.tiling.pipeline import Finished, every

SIDES = {"overlay": 2048, "view": view.SIDE}  # pixels, the longer side of what is drawn of a scene
BESIDE = (".aux.xml", ".ovr", ".msk")  # endings of files that GDAL reads with one
OPACITY = 0.45  # of the class colours in it
TOKEN = uuid.uuid4().hex  # in the temporary names of this process


@dataclasses.dataclass(frozen=True)
class Legend:
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, count: int, classes=None, palette=None) -> "Legend":
        """Numbers for names and distinct colours where a model came without them."""
        shades = [(saturation, value) for saturation in (0.8, 0.4) for value in (0.95, 0.7, 0.45)]
        hues = [colorsys.hsv_to_rgb(0.618 * k % 1, *shades[k % len(shades)]) for k in range(count)]
        return cls(
            tuple(classes or map(str, range(count))),
            tuple(palette or (tuple(round(255 * v) for v in hue) for hue in hues)),
        )

    def colours(self) -> dict[int, tuple[int, int, int, int]]:
        """All 256 entries of a colour table; what is no class is black and transparent."""
        table = dict.fromkeys(range(256), (0, 0, 0, 0))
        return table | {k: (*colour, 255) for k, colour in enumerate(self.palette)}


class SceneWriter:
    """Takes the strips of one scene from top to bottom. As a context it removes what was not finished."""

    def __init__(self, scene: Scene, outputs: Outputs, legend: Legend, *, cog: bool, rgb: tuple, tags: dict[str, str]):
        self._scene, self._outputs, self._legend, self._cog, self._rgb = scene, outputs, legend, cog, rgb
        self._temporaries: dict[pathlib.PurePath, pathlib.Path] = {}  # in the order in which they are renamed
        self._drawn: dict[str, list[tuple]] = {name: [] for name in SIDES if getattr(outputs, name)}
        self._tags, self._tally = tags, Tally(pixel_area.of_place(scene.place, scene.height, scene.width))
        names = {f"CLASS_{k}": name for k, name in enumerate(legend.classes)}
        every_tag = {**tags, **names}
        self._writers = {}
        try:
            for path in (outputs.probabilities, outputs.confidence):
                if path:
                    bands = legend.classes if path == outputs.probabilities else ("confidence",)
                    temporary = self._temporary(path)
                    self._writers[path] = RasterWriter(
                        temporary, scene, bands, unit=1 / blend.CERTAIN, tags=tags | {"UNIT": "probability"}
                    )
            self._writers[outputs.map] = RasterWriter(
                self._temporary(outputs.map, ".tif"), scene, ("class",), palette=legend.colours(), tags=every_tag
            )
        except BaseException:
            self.__exit__()
            raise

    def _temporary(self, path: pathlib.PurePath, suffix: str | None = None) -> pathlib.Path:
        folder = path.parent
        if buckets.is_remote(path):
            folder = _scratch(TOKEN)
            folder.mkdir(exist_ok=True)
        made = folder / f".{TOKEN}.{uuid.uuid4().hex[:8]}.tmp{suffix or path.suffix}"
        self._temporaries[path] = made
        return made

    def write(self, strip: Finished) -> None:
        self._writers[self._outputs.map].write(strip.labels)
        if self._outputs.probabilities:
            self._writers[self._outputs.probabilities].write(strip.probabilities)
        if self._outputs.confidence:
            self._writers[self._outputs.confidence].write(strip.confidence)
        self._tally.add(strip.labels, strip.row.top)
        for name, parts in self._drawn.items():
            step, row = every(self._scene, SIDES[name]), strip.row
            taken = np.s_[-row.top % step :: step, ::step]
            confidence = strip.confidence[taken] if name == "view" and self._outputs.confidence else None
            image = np.moveaxis(row.previews[SIDES[name]][list(self._rgb)], 0, -1)
            parts.append((image, strip.labels[taken], confidence))

    def finish(self) -> None:
        """UserError if something could not be written."""
        outputs, drawn = self._outputs, self._temporaries
        for writer in self._writers.values():
            writer.close()
        plain = drawn[outputs.map]  # a GeoTIFF so far, whatever it becomes
        try:
            if outputs.overlay:
                self._overlay().save(self._temporary(outputs.overlay))
            if outputs.view:
                seen = view.View(
                    self._scene, self._layers("view"), self._tally, self._legend.classes, self._legend.palette,
                    self._tags.get("CHECKPOINT", ""),
                )  # fmt: skip
                page = view.render(seen).encode(errors="replace")  # names of files may be no UTF-8
                self._temporary(outputs.view).write_bytes(page)
            if outputs.polygons:
                polygons.write(plain, self._temporary(outputs.polygons), self._scene.place, self._legend.classes)
            for path, writer in self._writers.items():
                driver = "PNG" if path.suffix.lower() == ".png" else "COG" if self._cog else None
                if driver:
                    source = drawn[path]
                    try:
                        convert(source, self._temporary(path), driver, writer.checksums)
                    finally:
                        _remove(source)
            self._describe(drawn[outputs.map])
            for path in sorted(drawn, key=lambda path: path == outputs.map):
                for ending in BESIDE:
                    made, target = (file.with_name(file.name + ending) for file in (drawn[path], path))
                    if made.exists():
                        buckets.move(made, target)
                    else:  # that of an older map would be taken for ours
                        buckets.discard(target)
                buckets.move(drawn[path], path)
        except OSError as error:
            raise UserError(f"cannot write in {outputs.map.parent}: {error.strerror or error}") from error

    def _layers(self, name: str) -> Layers:
        parts = zip(*self._drawn.pop(name), strict=True)
        return Layers(*(None if part[0] is None else np.concatenate(part) for part in parts))

    def _overlay(self) -> Image.Image:
        drawn = self._layers("overlay")
        image, labels = drawn.scene, drawn.labels
        colours = np.array([colour[:3] for colour in self._legend.colours().values()], np.float32)
        opacity = np.where(labels == blend.NODATA, 0, OPACITY)[..., None]
        return Image.fromarray((image * (1 - opacity) + colours[labels] * opacity + 0.5).astype(np.uint8))

    def _describe(self, path: pathlib.Path) -> None:
        if path.suffix.lower() == ".png":  # a plain image stays one file, unless it has a place on Earth
            if not self._scene.located:
                attributes.beside(path).unlink(missing_ok=True)
            return
        attributes.write(path, self._legend.classes, self._legend.palette, self._tally.pixels)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for writer in self._writers.values():
            writer.abandon()
        for temporary in self._temporaries.values():
            _remove(temporary)
        if buckets.is_remote(self._outputs.map):
            shutil.rmtree(_scratch(TOKEN), ignore_errors=True)


def _scratch(token: str) -> pathlib.Path:
    return pathlib.Path(tempfile.gettempdir(), f"ktda_jax_{token}")


def _remove(temporary: pathlib.Path) -> None:
    """With what GDAL may have put beside it."""
    for ending in ("", "-journal", *BESIDE):
        with contextlib.suppress(OSError):
            pathlib.Path(f"{temporary}{ending}").unlink(missing_ok=True)


def remove_temporaries(folder: pathlib.PurePath, token: str) -> None:
    """What the process of that `TOKEN` left when it was killed; for a bucket, if that was on this machine."""
    if buckets.is_remote(folder):
        shutil.rmtree(_scratch(token), ignore_errors=True)
        return
    for path in folder.glob(f".{token}.*"):
        with contextlib.suppress(OSError):
            path.unlink()
