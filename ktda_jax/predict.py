"""`python -m ktda_jax.predict --checkpoint=... --input=FILE|GLOB|FOLDER --output=...`: maps of scenes of any size.

    python -m ktda_jax.predict --checkpoint=runs/grass --input=scene.tif --output=map.tif
    python -m ktda_jax.predict --checkpoint=weights/cloud --input='scenes/*.tif' --output=maps --cog --overlay

Scenes are read in place: files of any size, https://, gs://, s3://, archives (/vsizip/...), or a list.txt of these.
--checkpoint: a training's workdir, a folder of `python -m ktda_jax.convert`, a published .pth, or hf://ORG/NAME. Maps
hold class numbers, 255 where the scene has no data, with colours and class names. Bands and value range are read as in
training, unless flags say otherwise. Of several processes (launch/) each maps its share of the scenes.
"""

from absl import flags, logging

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("checkpoint", None, "A workdir, a converted folder, a .pth, or hf://ORG/NAME.")
    flags.DEFINE_string(
        "input", None, "Scene, address (https://, gs://, s3://, /vsi...), pattern, folder, or list.txt."
    )
    flags.DEFINE_string("output", None, "The map, .tif or .png, of one input; else the folder for all maps; gs:// too.")
    flags.DEFINE_bool("cog", False, "Cloud-Optimized GeoTIFF.")
    flags.DEFINE_bool("polygonize", False, "NAME.gpkg: the map as polygons, cut every 4096 pixels.")
    flags.DEFINE_bool("view", False, "NAME.html: scene and map as one page for a browser; it needs no network.")
    flags.DEFINE_bool("skip_existing", False, "Leave scenes alone whose outputs are all there.")
    cli.define_mapping()
    cli.define_processes()
    flags.adopt_module_key_flags(cli)
    hint = "put a pattern such as --input='*.tif' in quotes"
    PARSE = cli.parsed(cli.parser("checkpoint", "input", "output", hint=hint))  # before the imports below: seconds

import zlib
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data.addresses import Image
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.paths import image
from ktda_jax.prediction import files, mapping, polygons, records, setup, shares
from ktda_jax.prediction.setup import say


def run(
    checkpoint: str, input: str, output: str, *, cog=False, probabilities=False, confidence=False, polygonize=False,
    overlay=False, view=False, skip_existing=False, process: tuple[int, int] = (0, 1), coordinator: str | None = None,
    join_timeout: float = 300, **how,
) -> dict[str, float]:  # fmt: skip
    """Maps what the flags of the same names say, `how` being those of `_map`. UserError says in one line what is wrong.

    Of several scenes those that can be are mapped, and the UserError about the others comes at the end. process: its
    index and how many there are; of several each maps its own share.
    """
    inputs = files.expand(input)
    rasterio_for(inputs[0])
    if polygonize:
        polygons.check_installed()
    one = len(inputs) == 1 and inputs[0] == image(input)
    outputs = files.name_outputs(
        inputs, output, one=one, probabilities=probabilities, confidence=confidence, overlay=overlay,
        polygonize=polygonize, view=view, cog=cog,
    )  # fmt: skip
    how |= dict(cog=cog, polygonize=polygonize)
    if process[1] > 1:
        return _map_share(
            checkpoint, inputs, outputs, process, coordinator, join_timeout, skip_existing=skip_existing, how=how
        )
    if skip_existing:
        inputs, outputs = _not_there(inputs, outputs)
    if not inputs:
        return {"pixels": 0, "seconds": 0.0}
    return _map(checkpoint, inputs, outputs, [], **how)


def _not_there(inputs, outputs) -> tuple[list[Image], list[files.Outputs]]:
    left = files.missing(outputs)
    if len(left) < len(inputs):
        say(f"{len(inputs) - len(left)} of {len(inputs)} scenes are mapped already")
    return [inputs[k] for k in left], [outputs[k] for k in left]


def _map(
    checkpoint: str, inputs: Sequence[Image], outputs: Sequence[files.Outputs], failures: list[UserError], *,
    tile: int | None = None, overlap: int | None = None, batch_size: int | None = None,
    bands: Sequence[int] | None = None, scale: Sequence[float] | None = None, nodata: float | None = None, cog=False,
    polygonize=False, tta=False, teacher_heads: int | None = None, fmm_heads: int | None = None, done=None,
) -> dict[str, float]:  # fmt: skip
    """failures: takes the errors of single scenes, which together are a UserError at the end."""
    mapping.check_any(inputs, failures)
    files.make_folders(outputs)
    model = setup.load(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    scenes = setup.open_scenes(
        model, inputs, bands=bands, scale=scale, nodata=nodata, polygonize=polygonize, failures=failures
    )
    named = dict(zip(inputs, outputs, strict=True))
    outputs = [named[scene.path] for scene in scenes]
    files.check_sources({scene.path: scene.files for scene in scenes}, outputs)
    step, overlap = setup.step_of(model, len(scenes), tile=tile, overlap=overlap, batch_size=batch_size, tta=tta)
    used = setup.map_scenes(
        model, checkpoint, scenes, outputs, step, overlap=overlap, cog=cog, failures=failures, done=done
    )
    if failures:
        raise mapping.not_mapped(failures, len(inputs))
    return used


def _map_share(
    checkpoint: str, inputs: Sequence[Image], outputs: Sequence[files.Outputs], process: tuple[int, int],
    coordinator: str | None, join_timeout: float, *, skip_existing: bool, how: dict,
) -> dict[str, float]:  # fmt: skip
    """The scenes of one of several processes; process 0 then tells of all. What is there does not change who maps what:
    processes that begin later find more.
    """
    (index, count), total, failures = process, len(inputs), []
    sizes = shares.sizes(inputs)
    dealt = shares.deal(sizes, count)
    checksum = zlib.crc32(repr([(path.name, size) for path, size in zip(inputs, sizes, strict=True)]).encode())
    files.make_folders(outputs)
    folder = outputs[0].map.parent
    inputs, outputs = [inputs[k] for k in dealt[index]], [outputs[k] for k in dealt[index]]
    say(f"process {index} of {count}: {len(inputs)} of {total} scenes")
    if skip_existing:
        inputs, outputs = _not_there(inputs, outputs)
    record = records.Record(
        folder, index, count, scenes=len(dealt[index]), skipped=len(dealt[index]) - len(inputs), failures=failures,
        dealt=checksum, coordinator=coordinator,
    )  # fmt: skip
    used = {"pixels": 0, "seconds": 0.0}
    with record:
        if inputs:
            try:
                used = _map(checkpoint, inputs, outputs, failures, done=record.mapped, **how)
            except UserError:
                if index or record.left:  # else it is about single scenes, and told with those of the others
                    raise
    if index:
        return used
    found = records.gather(record, join_timeout, say)
    for line in records.summary(found, [len(share) for share in dealt]):
        say(line)
    failures = [UserError(text) for each in found if each for text in each["failures"]]
    undone = records.undone(found, [len(share) for share in dealt])
    lines = [str(mapping.not_mapped(failures, total))] if failures else ["stopped before all was mapped:"]
    if undone:
        lines += ["  " + line for line in [*undone, "the same command with --skip_existing maps what is left"]]
    if failures or undone:
        raise UserError("\n".join(lines))
    return used


OPTIONS = (
    "checkpoint", "input", "output", "tile", "overlap", "batch_size", "nodata", "cog", "probabilities", "confidence",
    "polygonize", "overlay", "view", "skip_existing", "tta", "teacher_heads", "fmm_heads", "coordinator",
    "join_timeout",
)  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax tells what it restores
    cli.stop_cleanly()
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    process = cli.given("process_id"), cli.given("num_processes")
    if None in process:
        process = shares.by_cluster() if given["coordinator"] else (0, 1)
    run(**given, process=process, bands=cli.numbers("bands", int), scale=cli.numbers("scale", float))


if __name__ == "__main__":
    cli.run(main, PARSE)
