"""`python -m ktda_jax.predict --checkpoint=... --input=FILE|GLOB|FOLDER --output=...`: maps of scenes of any size.

    python -m ktda_jax.predict --checkpoint=runs/grass --input=scene.tif --output=map.tif
    python -m ktda_jax.predict --checkpoint=weights/cloud --input='scenes/*.tif' --output=maps --cog --overlay

--checkpoint: a training's workdir, a folder of `python -m ktda_jax.convert`, a published .pth, or hf://ORG/NAME. Maps
hold class numbers, 255 where the scene has no data, with colours and class names. Bands and value range are read as in
training, unless flags say otherwise.
"""

import sys

from absl import flags, logging

from ktda_jax import UserError, cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("checkpoint", None, "A workdir, a converted folder, a .pth, or hf://ORG/NAME.")
    flags.DEFINE_string("input", None, "A GeoTIFF, PNG or JPEG, a quoted glob pattern, or a folder of them.")
    flags.DEFINE_string("output", None, "The map, .tif or .png, of one input; else the folder for all maps.")
    flags.DEFINE_integer("tile", None, "Side of the tiles in pixels; by default the training crop's.")
    flags.DEFINE_integer("overlap", None, "Pixels that tiles overlap; by default a quarter of the tile.")
    flags.DEFINE_integer("batch_size", None, "Tiles at once; by default 4 on each accelerator, 1 on CPU.", 1)
    flags.DEFINE_list("bands", None, "Band numbers, from 1, in the order of training; by default as in training.")
    flags.DEFINE_list("scale", None, "LOW,HIGH, or one such pair per band: the values that become 0 and 255.")
    flags.DEFINE_float("nodata", None, "Value of pixels without data, beside what a file declares; else as trained.")
    flags.DEFINE_bool("cog", False, "Cloud-Optimized GeoTIFF.")
    flags.DEFINE_bool("probabilities", False, "NAME_probabilities.tif, a band per class; 254 is 1.")
    flags.DEFINE_bool("confidence", False, "NAME_confidence.tif: the probability of the mapped class.")
    flags.DEFINE_bool("polygonize", False, "NAME.gpkg: the map as polygons, cut every 4096 pixels.")
    flags.DEFINE_bool("overlay", False, "NAME_overlay.png: scene and classes, at most 2048 pixels a side.")
    flags.DEFINE_bool("skip_existing", False, "Leave scenes alone whose outputs are all there.")
    flags.DEFINE_bool("tta", False, "Average over mirror images and two other scales; six times the work.")
    cli.define_heads()
    hint = "put a pattern such as --input='*.tif' in quotes"
    PARSE = cli.parsed(cli.parser("checkpoint", "input", "output", hint=hint))  # before the imports below: seconds

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.images import Reading
from ktda_jax.data.paths import expand
from ktda_jax.data.reading import is_scale
from ktda_jax.prediction import files, mapping, polygons, segmenter
from ktda_jax.prediction.outputs import Legend
from ktda_jax.tiling import device
from ktda_jax.tiling.windows import usual_overlap


def run(
    checkpoint: str, input: str, output: str, *, tile: int | None = None, overlap: int | None = None,
    batch_size: int | None = None, bands: Sequence[int] | None = None, scale: Sequence[float] | None = None,
    nodata: float | None = None, cog=False, probabilities=False, confidence=False, polygonize=False, overlay=False,
    skip_existing=False, tta=False, teacher_heads: int | None = None, fmm_heads: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Maps what the flags of the same names say. UserError says in one line what is wrong.

    Of several scenes those that can be are mapped, and the UserError about the others comes at the end.
    """
    inputs = files.expand(input)
    rasterio_for(inputs[0])
    if polygonize:
        polygons.check_installed()
    one = len(inputs) == 1 and inputs[0] == expand(input)
    outputs = files.name_outputs(
        inputs, output, one=one, probabilities=probabilities, confidence=confidence, overlay=overlay,
        polygonize=polygonize, cog=cog,
    )  # fmt: skip
    if skip_existing:
        left = [k for k, made in enumerate(outputs) if not all(path.exists() for path in made.wanted())]
        if len(left) < len(inputs):
            _say(f"{len(inputs) - len(left)} of {len(inputs)} scenes are mapped already")
        inputs, outputs = [inputs[k] for k in left], [outputs[k] for k in left]
        if not left:
            return {"pixels": 0, "seconds": 0.0}
    mapping.check_any(inputs)
    files.make_folders(outputs)

    on_cpu = jax.default_backend() == "cpu"
    model = segmenter.load_pretrained(
        checkpoint, dtype=jnp.float32 if on_cpu else jnp.bfloat16, teacher_heads=teacher_heads, fmm_heads=fmm_heads,
        say=lambda line: _say(f"warning: {line}"),
    )  # fmt: skip
    if model.config.num_classes > IGNORE:
        raise UserError(f"the model has {model.config.num_classes} classes; a map holds at most {IGNORE}")
    trained = mapping.trained_reading(model.data)
    reading = _reading(trained, model.config.student.bands, bands, scale, nodata)
    count, failures = model.config.student.bands, []
    scenes = mapping.check_scenes(inputs, reading, count, _say, polygonize=polygonize, failures=failures)
    for line in mapping.differences(trained, reading, scenes, count) if model.data is not None else ():
        _say(f"warning: {line}")
    named = dict(zip(inputs, outputs, strict=True))
    outputs = [named[scene.path] for scene in scenes]
    files.check_sources({scene.path: scene.files for scene in scenes}, outputs)
    size = (tile, tile) if tile else tuple((model.data or {}).get("crop") or model.config.teacher.image_size)
    overlap = usual_overlap(size) if overlap is None else overlap
    mapping.check_tiles(size, overlap)

    found = device.of_segmenter(model, tta=tta)
    step = device.Step(found, size, batch_size or (1 if on_cpu else 4) * jax.local_device_count())
    _say(
        f"{len(scenes)} scene{'s' * (len(scenes) > 1)}, tiles of {size[0]} x {size[1]} overlapping by {overlap}, "
        f"{step.batch_size} at once on {jax.local_device_count()} x {jax.devices()[0].device_kind}"
    )
    tags = {"CHECKPOINT": str(checkpoint), "SOFTWARE": "ktda_jax"}
    if model.temperature != 1 and (probabilities or confidence):
        tags["TEMPERATURE"] = f"{model.temperature:.4g}"
    try:
        used = mapping.map_scenes(
            scenes, outputs, step, Legend.of(found.classes, model.classes, model.palette), overlap=overlap,
            rgb=model.config.rgb, cog=cog, tags=tags, say=_say, failures=failures,
            temperature=model.temperature,
        )  # fmt: skip
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = str(error).strip().partition("\n")[0]
        raise UserError(f"{words or 'out of memory'}; a smaller --batch_size or --tile takes less memory") from error
    rate = used["pixels"] / used["seconds"] / 1e6
    _say(f"{used['pixels'] / 1e6:.3g} Mpixel in {used['seconds']:.1f} s, {rate:.3g} Mpixel/s")
    if failures:
        raise mapping.not_mapped(failures, len(inputs))
    return used


def _reading(trained: Reading, count: int, bands, scale, nodata) -> Reading:
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


def _say(text: str) -> None:
    print(text, flush=True)


def _numbers(name: str, kind) -> list | None:
    text = flags.FLAGS[name].value
    try:
        return None if text is None else [kind(value) for value in text]
    except ValueError:
        sys.exit(f"error: --{name}={_list(text)} is not a list of {'whole ' * (kind is int)}numbers")


OPTIONS = (
    "checkpoint", "input", "output", "tile", "overlap", "batch_size", "nodata", "cog", "probabilities", "confidence",
    "polygonize", "overlay", "skip_existing", "tta", "teacher_heads", "fmm_heads",
)  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax tells what it restores
    cli.stop_cleanly()
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    run(**given, bands=_numbers("bands", int), scale=_numbers("scale", float))


if __name__ == "__main__":
    cli.run(main, PARSE)
