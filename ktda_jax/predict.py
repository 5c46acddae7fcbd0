"""`python -m ktda_jax.predict --checkpoint=... --input=FILE|GLOB|FOLDER --output=...`: maps of scenes of any size.

    python -m ktda_jax.predict --checkpoint=runs/grass --input=scene.tif --output=map.tif
    python -m ktda_jax.predict --checkpoint=weights/cloud --input='scenes/*.tif' --output=maps --cog --overlay

--checkpoint: a training's workdir, a folder of `python -m ktda_jax.convert`, a published .pth, or hf://ORG/NAME. Maps
hold class numbers, 255 where the scene has no data, with colours and class names. Bands and value range are read as in
training, unless flags say otherwise.
"""

from absl import flags, logging

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("checkpoint", None, "A workdir, a converted folder, a .pth, or hf://ORG/NAME.")
    flags.DEFINE_string("input", None, "A GeoTIFF, PNG or JPEG, a quoted glob pattern, or a folder of them.")
    flags.DEFINE_string("output", None, "The map, .tif or .png, of one input; else the folder for all maps.")
    flags.DEFINE_bool("cog", False, "Cloud-Optimized GeoTIFF.")
    flags.DEFINE_bool("polygonize", False, "NAME.gpkg: the map as polygons, cut every 4096 pixels.")
    flags.DEFINE_bool("skip_existing", False, "Leave scenes alone whose outputs are all there.")
    cli.define_mapping()
    flags.adopt_module_key_flags(cli)
    hint = "put a pattern such as --input='*.tif' in quotes"
    PARSE = cli.parsed(cli.parser("checkpoint", "input", "output", hint=hint))  # before the imports below: seconds

from collections.abc import Sequence

from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.paths import expand
from ktda_jax.prediction import files, mapping, polygons, setup
from ktda_jax.prediction.setup import say


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
            say(f"{len(inputs) - len(left)} of {len(inputs)} scenes are mapped already")
        inputs, outputs = [inputs[k] for k in left], [outputs[k] for k in left]
        if not left:
            return {"pixels": 0, "seconds": 0.0}
    mapping.check_any(inputs)
    files.make_folders(outputs)

    model, failures = setup.load(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads), []
    scenes = setup.open_scenes(
        model, inputs, bands=bands, scale=scale, nodata=nodata, polygonize=polygonize, failures=failures
    )
    named = dict(zip(inputs, outputs, strict=True))
    outputs = [named[scene.path] for scene in scenes]
    files.check_sources({scene.path: scene.files for scene in scenes}, outputs)
    step, overlap = setup.step_of(model, len(scenes), tile=tile, overlap=overlap, batch_size=batch_size, tta=tta)
    used = setup.map_scenes(model, checkpoint, scenes, outputs, step, overlap=overlap, cog=cog, failures=failures)
    if failures:
        raise mapping.not_mapped(failures, len(inputs))
    return used


OPTIONS = (
    "checkpoint", "input", "output", "tile", "overlap", "batch_size", "nodata", "cog", "probabilities", "confidence",
    "polygonize", "overlay", "skip_existing", "tta", "teacher_heads", "fmm_heads",
)  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax tells what it restores
    cli.stop_cleanly()
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    run(**given, bands=cli.numbers("bands", int), scale=cli.numbers("scale", float))


if __name__ == "__main__":
    cli.run(main, PARSE)
