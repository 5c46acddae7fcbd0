"""`python -m ktda_jax.predict --checkpoint=... --input=FILE|GLOB|FOLDER --output=...`: maps of scenes of any size.

    python -m ktda_jax.predict --checkpoint=runs/grass --input=scene.tif --output=map.tif
    python -m ktda_jax.predict --checkpoint=weights/cloud --input='scenes/*.tif' --output=maps --cog --overlay

--checkpoint: a training's workdir, a folder of `python -m ktda_jax.convert`, a published .pth, or hf://ORG/NAME. Maps
hold class numbers, 255 where the scene has no data, with colours and class names. Takes rasterio (pip install -e
'.[geo]'). Bands and value range are read as in training, unless flags say otherwise.
"""

import signal
import sys

from absl import app, flags

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A workdir, a converted folder, a .pth, or hf://ORG/NAME.")
INPUT = flags.DEFINE_string("input", None, "A GeoTIFF, PNG or JPEG, a quoted glob pattern, or a folder of them.")
OUTPUT = flags.DEFINE_string("output", None, "The map, .tif or .png, of one input; else the folder for all maps.")
TILE = flags.DEFINE_integer("tile", None, "Side of the tiles in pixels; by default the training crop's.")
OVERLAP = flags.DEFINE_integer("overlap", None, "Pixels that tiles overlap; by default a quarter of the tile.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Tiles at once; by default 4 on each accelerator, 1 on CPU.", 1)
BANDS = flags.DEFINE_list("bands", None, "Band numbers, from 1, in the order of training; by default as in training.")
SCALE = flags.DEFINE_list("scale", None, "LOW,HIGH, or one such pair per band: the values that become 0 and 255.")
NODATA = flags.DEFINE_float("nodata", None, "Value of pixels without data; by default as trained, or as declared.")
COG = flags.DEFINE_bool("cog", False, "Cloud-Optimized GeoTIFF.")
PROBABILITIES = flags.DEFINE_bool("probabilities", False, "NAME_probabilities.tif, a band per class; 254 is 1.")
CONFIDENCE = flags.DEFINE_bool("confidence", False, "NAME_confidence.tif: the probability of the mapped class.")
POLYGONIZE = flags.DEFINE_bool("polygonize", False, "NAME.gpkg: the map as polygons, cut every 4096 pixels.")
OVERLAY = flags.DEFINE_bool("overlay", False, "NAME_overlay.png: scene and classes, at most 2048 pixels a side.")
SKIP_EXISTING = flags.DEFINE_bool("skip_existing", False, "Leave scenes alone whose outputs are all there.")
TTA = flags.DEFINE_bool("tta", False, "Average over mirror images and two other scales; six times the work.")


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if len(rest) > 1:
        sys.exit(f"error: unexpected argument {rest[1]!r}; put a pattern such as --input='*.tif' in quotes")
    for name in ("checkpoint", "input", "output"):
        if not flags.FLAGS[name].value:
            sys.exit(f"error: give --{name}; see --help")
    return rest


def _numbers(flag, kind) -> tuple | None:
    """The values of a list flag; ValueError names it."""
    if flag.value is None:
        return None
    try:
        return tuple(kind(value) for value in flag.value)
    except ValueError as error:
        raise ValueError(f"--{flag.name}={','.join(flag.value)} is not a list of numbers: {error}") from error


def _reading(data: dict | None, bands: int):
    """Reading of the training, and as the flags want it."""
    from ktda_jax import reading
    from ktda_jax.scenes.mapping import trained_reading
    from ktda_jax.scenes.raster import Reading

    trained = trained_reading(data)
    chosen, values = _numbers(BANDS, int), _numbers(SCALE, float)
    if chosen is not None and (len(chosen) != bands or len(set(chosen)) < len(chosen) or min(chosen) < 1):
        raise ValueError(f"--bands={','.join(BANDS.value)}: the model takes {bands} different bands, counted from 1")
    scale = values
    if values is not None and len(values) != 2:
        scale = tuple(zip(values[::2], values[1::2], strict=False)) if len(values) == 2 * bands else ()
    if values is not None and not reading.is_scale(scale, bands):
        raise ValueError(
            f"--scale={','.join(SCALE.value)}: give LOW,HIGH with LOW below HIGH, or one such pair for each of {bands} "
            "bands"
        )
    nodata = trained.nodata if NODATA.value is None else NODATA.value
    return trained, Reading(chosen or trained.bands, scale or trained.scale, nodata)


def run() -> dict:
    """Maps what the flags name. ValueError, also DataError, says in one line what is wrong."""
    import jax
    import jax.numpy as jnp

    from ktda_jax import pretrained
    from ktda_jax.data.datasets import IGNORE
    from ktda_jax.scenes import device, files, mapping, polygons
    from ktda_jax.scenes.outputs import Legend
    from ktda_jax.scenes.raster import rasterio_for

    inputs = files.expand(INPUT.value)
    rasterio_for(inputs[0])
    if POLYGONIZE.value:
        polygons.check_installed()
    one = len(inputs) == 1 and str(inputs[0]) == str(files.pathlib.Path(INPUT.value).expanduser())
    outputs = files.name_outputs(
        inputs, OUTPUT.value, one=one, probabilities=PROBABILITIES.value, confidence=CONFIDENCE.value,
        overlay=OVERLAY.value, polygonize=POLYGONIZE.value, cog=COG.value,
    )  # fmt: skip
    if SKIP_EXISTING.value:
        left = [k for k, made in enumerate(outputs) if not all(path.exists() for path in made.wanted())]
        if len(left) < len(inputs):
            _say(f"{len(inputs) - len(left)} of {len(inputs)} scenes are mapped already")
        inputs, outputs = [inputs[k] for k in left], [outputs[k] for k in left]
        if not left:
            return {}
    try:
        for made in outputs:
            made.map.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write to --output={OUTPUT.value}: {error.strerror}") from error

    on_cpu = jax.default_backend() == "cpu"
    model = pretrained.load_pretrained(CHECKPOINT.value, dtype=jnp.float32 if on_cpu else jnp.bfloat16)
    bands = model.config.student.bands
    trained, wanted = _reading(model.data, bands)
    for line in mapping.differences(trained, wanted):
        _say(f"warning: {line}")
    scenes = mapping.check_scenes(inputs, wanted, bands, _say)
    if model.config.num_classes > IGNORE:
        raise ValueError(f"the model has {model.config.num_classes} classes; a map holds at most {IGNORE}")
    crop = (model.data or {}).get("crop") or model.config.teacher.image_size
    tile = (TILE.value, TILE.value) if TILE.value else tuple(crop)
    overlap = min(tile) // 4 if OVERLAP.value is None else OVERLAP.value
    mapping.check_tile(tile, overlap)

    found = device.of_segmenter(model, tta=TTA.value)
    per_device = 1 if on_cpu else 4
    step = device.Step(found, tile, BATCH_SIZE.value or per_device * jax.local_device_count())
    _say(
        f"{len(scenes)} scene{'s' * (len(scenes) > 1)}, tiles of {tile[0]} x {tile[1]} overlapping by {overlap}, "
        f"{step.batch_size} at once on {jax.local_device_count()} x {jax.devices()[0].device_kind}"
    )
    legend = Legend.of(found.classes, model.classes, model.palette)
    made_by = {"CHECKPOINT": CHECKPOINT.value, "SOFTWARE": "ktda_jax"}
    used = mapping.map_scenes(
        scenes, outputs, step, legend, overlap=overlap, rgb=model.config.rgb, cog=COG.value, tags=made_by, say=_say
    )
    rate = used["pixels"] / used["seconds"] / 1e6
    _say(f"{used['pixels'] / 1e6:.3g} Mpixel in {used['seconds']:.1f} s, {rate:.3g} Mpixel/s")
    return used


def _say(text: str) -> None:
    print(text, flush=True)


def main(_: list[str]) -> None:
    # Both through the cleaning up, once: a second signal must not end it.
    def stop(number, frame):
        for each in (signal.SIGTERM, signal.SIGINT):
            signal.signal(each, signal.SIG_IGN)
        sys.exit("error: stopped by a signal; what was not finished is removed")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        run()
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main, flags_parser=_parse)
