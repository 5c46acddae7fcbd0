"""Maps of scenes: what is to be read is checked, the pipeline runs, the files are written."""

import concurrent.futures
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence

from ktda_jax import UserError
from ktda_jax.data.addresses import Image
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import opened
from ktda_jax.data.images import Reading
from ktda_jax.data.raster import Scene, open_scene
from ktda_jax.data.reading import is_scale
from ktda_jax.prediction import polygons
from ktda_jax.prediction.files import Outputs
from ktda_jax.prediction.outputs import SIDES, Legend, SceneWriter
from ktda_jax.tiling import blend, pipeline
from ktda_jax.tiling.device import Step

READERS = 16  # scenes that are looked at at once: over a network each takes its time
FAILURES_SHOWN = 50  # at the end of a run; each is said when it is found


def trained_reading(data: dict | None) -> Reading:
    """How a training (its config.data) read its images; None: unknown, hence 8-bit RGB."""
    data = data or {}
    bands, scale = data.get("bands"), data.get("scale")
    if scale is not None:
        scale = tuple(tuple(pair) if isinstance(pair, (list, tuple)) else pair for pair in scale)
    nodata = data.get("nodata")
    return Reading(bands and tuple(bands), scale, nodata, by_band=any(x is not None for x in (bands, scale, nodata)))


def asked_reading(trained: Reading, count: int, bands, scale, nodata) -> Reading:
    """That of the training, changed as the flags say. UserError names the flag."""
    if bands is not None and (len(bands) != count or len(set(bands)) < count or min(bands) < 1):
        raise UserError(f"--bands={_list(bands)}: the model takes {count} different bands, counted from 1")
    if scale is not None:
        pairs = tuple(zip(scale[::2], scale[1::2], strict=False))
        if len(scale) % 2 or not is_scale(pairs, count):
            raise UserError(
                f"--scale={_list(scale)}: give LOW,HIGH with LOW below HIGH, or one such pair for each of {count} bands"
            )
        scale = pairs[0] if len(pairs) == 1 else pairs
    return Reading(
        trained.bands if bands is None else tuple(bands),
        trained.scale if scale is None else scale,
        trained.nodata if nodata is None else nodata,
        trained.by_band,
    )


def _list(values) -> str:
    return ",".join(map(str, values))


def differences(trained: Reading, reading: Reading, scenes: Sequence[Scene], bands: int) -> list[str]:
    """What is read otherwise than in training, one line each; not what all of these scenes require."""
    return [
        f"--{name} is {_shown(getattr(reading, name))}, in training it was {_shown(getattr(trained, name))}"
        for name in ("bands", "scale", "nodata")
        if getattr(trained, name) != getattr(reading, name)
        and not all(_required(name, trained, scene, bands) for scene in scenes)
    ]


def _required(name: str, trained: Reading, scene: Scene, bands: int) -> bool:
    """Whether a scene cannot be read with this setting as it was in training, or should not, as we say ourselves."""
    reading = dataclasses.replace(scene.reading, **{name: getattr(trained, name)})
    try:
        open_scene(scene.path, reading, bands)
    except UserError:
        return True
    return _stretched(scene, reading) and not _stretched(scene, scene.reading)


def _shown(value) -> str:
    return "as in 8-bit RGB files" if value is None else str(value)


def check_any(inputs: Sequence[Image], failures: list[UserError]) -> None:
    """UserError if none of the files can be opened at all: what can be known before the model is loaded.

    failures: takes the errors then.
    """
    wrong = []
    for path in inputs:
        try:
            with opened(path):
                return
        except UserError as error:
            wrong.append(error)
    failures += wrong
    raise not_mapped(wrong, len(inputs))


def check_scenes(
    inputs: Sequence[Image], reading: Reading, bands: int, say, *, polygonize=False, written=True,
    failures: list[UserError] | None = None,
) -> list[Scene]:  # fmt: skip
    """Opens them all, so that what is wrong is known before anything is computed. UserError names the file.

    written: whether there will be files of their maps. failures: takes the errors of single files, so that the others
    can be mapped; it is still one if none can.
    """

    def look(path: Image) -> Scene | UserError:
        try:
            scene = open_scene(path, reading, bands)
            if polygonize:
                polygons.check_place(scene)
            return scene
        except UserError as error:
            return error

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(look, inputs))
    scenes, wrong = ([each for each in found if isinstance(each, kind)] for kind in (Scene, UserError))
    if wrong and failures is None:
        raise wrong[0]
    if failures is not None:
        failures += wrong
    if not scenes:
        raise not_mapped(wrong, len(inputs))
    for error in wrong:
        say(f"warning: left out: {error}")
    tiffs = [scene for scene in scenes if scene.path.suffix.lower() in (".tif", ".tiff")]
    for what, found in (
        ("no CRS; their maps will have none either", [s for s in tiffs if written and not s.place.get("crs")]),
        (
            "8-bit values, and --scale reaches to more; are they stretched already? then give --scale=0,255",
            [s for s in scenes if _stretched(s, reading)],
        ),
    ):
        if found:
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            say(f"warning: {found[0].path}{others}: {what}")
    return scenes


def not_mapped(failures: Sequence[UserError], count: int) -> UserError:
    """What was wrong with these of `count` inputs, a line each."""
    if count == 1:
        return failures[0]
    lines = [f"{len(failures)} of {count} scenes could not be mapped:", *map(str, failures[:FAILURES_SHOWN])]
    if len(failures) > FAILURES_SHOWN:
        lines.append(f"and {len(failures) - FAILURES_SHOWN} more")
    return UserError("\n  ".join(lines))


def _stretched(scene: Scene, reading: Reading) -> bool:
    """Whether it seems to be 8-bit already, while its values are read as larger ones."""
    return scene.dtype == "uint8" and _highest(reading.scale) > 255


def _highest(scale) -> float:
    if scale is None:
        return 0
    return max(max(pair) for pair in scale) if isinstance(scale[0], tuple) else max(scale)


def map_scenes(
    scenes: Sequence[Scene], outputs: Sequence[Outputs | None], step: Step, legend: Legend, *, overlap: int,
    rgb=(0, 1, 2), cog=False, tags=None, temperature=1.0, say=print, failures: list[UserError] | None = None,
    take: Callable[[pipeline.Finished], None] | None = None, done: Callable[[int], None] | None = None,
) -> dict[str, float]:  # fmt: skip
    """Writes all outputs; returns pixels and seconds. Those of a scene that was not finished are not there.

    outputs: None for a scene of which nothing is to be written. failures: takes the errors of files that cannot be read
    to their end, so that the others are mapped. take: gets every strip, with probabilities in float32. done: gets the
    pixels of every scene whose files are there.
    """
    written = [each for each in outputs if each]
    kinds = ("probabilities", "confidence", *SIDES)
    wanted = {name: any(getattr(each, name) for each in written) for name in kinds}
    left = {scene.path: scene.height * scene.width for scene in scenes}  # pixels
    progress = Progress(sum(left.values()))
    targets = {scene.path: target for scene, target in zip(scenes, outputs, strict=True)}
    strips = pipeline.finished(
        scenes, step, classes=len(legend.classes), overlap=overlap,
        probabilities="float32" if take else wanted["probabilities"],
        confidence=wanted["confidence"], temperature=temperature,
        previews=[side for name, side in SIDES.items() if wanted[name]], keep_going=failures is not None,
    )  # fmt: skip
    with contextlib.closing(strips), contextlib.ExitStack() as open_writer, contextlib.ExitStack() as ending:
        ending.callback(progress.clear)
        for strip in strips:
            if isinstance(strip, pipeline.Failed):
                open_writer.close()  # and what there is of its files is removed
                failures.append(strip.error)
                progress.total -= left.pop(strip.scene.path)
                progress.clear()
                say(f"warning: left out: {strip.error}")
                continue
            scene, target = strip.row.scene, targets[strip.row.scene.path]
            if strip.row.index == 0:
                any_data = False
            any_data = any_data or bool(strip.row.present.any())
            if take:
                take(strip)
                if wanted["probabilities"]:
                    stored = blend.stored(strip.probabilities, strip.row.present)
                    strip = dataclasses.replace(strip, probabilities=stored)
            if target:
                if strip.row.index == 0:
                    writer = SceneWriter(scene, target, legend, cog=cog, rgb=rgb, tags=tags or {})
                    open_writer.push(writer)
                writer.write(strip)
            left[scene.path] -= strip.labels.size
            progress.advance(strip.labels.size)
            if strip.row.last:
                if target:
                    writer.finish()
                    open_writer.close()
                if done:
                    done(scene.height * scene.width)
                progress.clear()
                if not any_data:
                    say(f"warning: {scene.path} holds no data at all; its map is all {IGNORE}")
                elif strip.row.uniform is not None:
                    hint = f" with --scale={scene.reading.scale}; is its unit another?" if scene.reading.scale else ""
                    say(f"warning: {scene.path}: all its values become {strip.row.uniform}{hint}")
                if target:
                    say(f"{scene.path}: {scene.height} x {scene.width} -> {target.map}")
    return {"pixels": progress.done, "seconds": progress.seconds()}


class Progress:
    """One line on a terminal; nothing elsewhere."""

    def __init__(self, total: int):
        self.total, self.done, self._start, self._said = total, 0, time.monotonic(), 0.0
        self._shown = sys.stderr.isatty()

    def seconds(self) -> float:
        return time.monotonic() - self._start

    def advance(self, pixels: int) -> None:
        self.done += pixels
        now = self.seconds()
        if self._shown and now - self._said > 0.5:
            self._said, rate = now, self.done / now
            left = (self.total - self.done) / rate
            bar = "#" * (30 * self.done // self.total)
            line = f"{bar:30} {100 * self.done // self.total:3} %, {rate / 1e6:.3g} Mpixel/s, {left:.0f} s left"
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
