"""Maps of scenes: what is to be read is checked, the pipeline runs, the files are written."""

import contextlib
import sys
import time
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.images import Reading
from ktda_jax.data.raster import Scene, open_scene
from ktda_jax.prediction import pipeline
from ktda_jax.prediction.files import Outputs
from ktda_jax.prediction.outputs import PREVIEW, Legend, SceneWriter
from ktda_jax.tiling.device import Step


def trained_reading(data: dict | None) -> Reading:
    """How a training (its config.data) read its images; None: unknown, hence 8-bit RGB."""
    data = data or {}
    bands, scale = data.get("bands"), data.get("scale")
    if scale is not None:
        scale = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in scale)
    nodata = data.get("nodata")
    return Reading(bands and tuple(bands), scale, nodata, by_band=any(x is not None for x in (bands, scale, nodata)))


def differences(trained: Reading, reading: Reading) -> list[str]:
    """What is read otherwise than in training, one line each."""
    return [
        f"--{name} is {_shown(getattr(reading, name))}, in training it was {_shown(getattr(trained, name))}"
        for name in ("bands", "scale", "nodata")
        if getattr(trained, name) != getattr(reading, name)
    ]


def _shown(value) -> str:
    return "as in 8-bit RGB files" if value is None else str(value)


def check_scenes(inputs, reading: Reading, bands: int, say) -> list[Scene]:
    """Opens them all, so that what is wrong is known before anything is computed. UserError names the file."""
    scenes = [open_scene(path, reading, bands) for path in inputs]
    tiffs = [scene for scene in scenes if scene.path.suffix.lower() in (".tif", ".tiff")]
    for what, found in (
        ("no CRS; their maps will have none either", [s for s in tiffs if not s.place.get("crs")]),
        (
            "8-bit values, and --scale reaches to more; are they stretched already? then give --scale=0,255",
            [s for s in scenes if s.dtype == "uint8" and _highest(reading.scale) > 255],
        ),
    ):
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            say(f"warning: {found[0].path}{others}: {what}")
    return scenes


def _highest(scale) -> float:
    if scale is None:
        return 0
    return max(max(pair) for pair in scale) if isinstance(scale[0], tuple) else max(scale)


def map_scenes(
    scenes: Sequence[Scene], outputs: Sequence[Outputs], step: Step, legend: Legend, *, overlap: int, rgb=(0, 1, 2),
    cog=False, tags=None, say=print,
) -> dict[str, float]:  # fmt: skip
    """Writes all outputs; returns pixels and seconds. Those of a scene that was not finished are not there."""
    wanted = {name: any(getattr(each, name) for each in outputs) for name in ("probabilities", "confidence", "overlay")}
    progress = Progress(sum(scene.height * scene.width for scene in scenes))
    targets = iter(outputs)
    strips = pipeline.finished(
        scenes, step, classes=len(legend.classes), overlap=overlap, probabilities=wanted["probabilities"],
        confidence=wanted["confidence"], preview=PREVIEW if wanted["overlay"] else 0,
    )  # fmt: skip
    with contextlib.closing(strips), contextlib.ExitStack() as open_writer:
        for strip in strips:
            scene = strip.row.scene
            if strip.row.index == 0:
                target = next(targets)
                writer = SceneWriter(scene, target, legend, cog=cog, rgb=rgb, tags=tags or {})
                open_writer.push(writer)
            writer.write(strip)
            progress.advance(strip.labels.size)
            if strip.row.last:
                writer.finish()
                open_writer.close()
                progress.clear()
                if not writer.any_data:
                    say(f"warning: {scene.path} holds no data at all; its map is all {IGNORE}")
                elif strip.row.uniform is not None:
                    hint = f" with --scale={scene.reading.scale}; is its unit another?" if scene.reading.scale else ""
                    say(f"warning: {scene.path}: all its values become {strip.row.uniform}{hint}")
                say(f"{scene.path}: {scene.height} x {scene.width} -> {target.map}")
    return {"pixels": progress.total, "seconds": progress.seconds()}


class Progress:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self, total: int):
        self.total, self._done, self._start, self._said = total, 0, time.monotonic(), 0.0
        self._shown = sys.stderr.isatty()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def advance(self, pixels: int) -> None:
        self._done += pixels
        now = self.seconds()
        if self._shown and now - self._said > 0.5:
            self._said, rate = now, self._done / now
            left = (self.total - self._done) / rate
            bar = "#" * (30 * self._done // self.total)
            line = f"{bar:30} {100 * self._done // self.total:3} %, {rate / 1e6:.3g} Mpixel/s, {left:.0f} s left"
            print(f"\r{line:78}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        if self._shown:
            print(f"\r{'':78}\r", end="", file=sys.stderr, flush=True)


def check_tiles(tile: tuple[int, int], overlap: int) -> None:
    """UserError for tiles that no model takes, or that overlap more than is of use."""
    if not 32 <= min(tile) <= max(tile) <= 2048:
        raise UserError(f"--tile is {' x '.join(map(str, tile))}; give 32 to 2048 pixels")
    if not 0 <= overlap <= min(tile) // 2:
        raise UserError(f"--overlap is {overlap}; give 0 to half of the tile, {min(tile) // 2} pixels")
