"""`python -m ktda_jax.evaluate --checkpoint=... --images=FILE|GLOB|FOLDER --labels=FILE|FOLDER`: scores of a model.

    python -m ktda_jax.evaluate --checkpoint=runs/grass --images=DIR/img_dir/val --labels=DIR/ann_dir/val --output=OUT
    python -m ktda_jax.evaluate --checkpoint=weights/cloud --images=scene.tif --labels=mask.tif \\
      --label_map="((0, 0), (255, 1))"

Images may have any size, and are read and mapped as `predict` does it. The label of an image NAME is NAME.png, .tif or
.tiff in the folder --labels: class numbers, 255 where nothing is counted. Pixels without data are not counted either.
--output gets the maps, scores.json, scores.csv, confusion.png and reliability.png.
"""

from absl import flags, logging

from ktda_jax import UserError, cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("checkpoint", None, "A workdir, a converted folder, a .pth, or hf://ORG/NAME.")
    flags.DEFINE_string(
        "images", None, "An image, its address (https://, gs://, s3://, /vsi...), a pattern, a folder, or a list.txt."
    )
    flags.DEFINE_string("labels", None, "The label of one image, or the folder of the labels of all.")
    flags.DEFINE_string("label_map", None, 'What stored values or colours mean: "((0, 0), (255, 1))".')
    flags.DEFINE_string("output", None, "Folder for maps, scores and figures; by default scores are only printed.")
    cli.define_mapping()
    flags.adopt_module_key_flags(cli)
    hint = "put a pattern such as --images='*.tif' in quotes"
    PARSE = cli.parsed(cli.parser("checkpoint", "images", "labels", hint=hint))  # before the imports below: seconds

import pathlib
from collections.abc import Sequence

from ktda_jax.data.addresses import Image
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.paths import expand
from ktda_jax.prediction import files, labelled, scored, setup
from ktda_jax.prediction.setup import say
from ktda_jax.training.evaluate import Evaluation, table


def run(
    checkpoint: str, images: str, labels: str, output: str | None = None, *, label_map: str | None = None,
    tile: int | None = None, overlap: int | None = None, batch_size: int | None = None,
    bands: Sequence[int] | None = None, scale: Sequence[float] | None = None, nodata: float | None = None,
    probabilities=False, confidence=False, overlay=False, tta=False, teacher_heads: int | None = None,
    fmm_heads: int | None = None,
) -> Evaluation:  # fmt: skip
    """Scores as the flags of the same names say. UserError says in one line what is wrong.

    An image that cannot be read is one: a score over fewer images would not be the score asked for.
    """
    folder = None if output is None else expand(output)
    inputs, mapping = files.expand(images, "--images"), labelled.label_map(label_map)
    rasterio_for(inputs[0])
    paths, line = labelled.find(inputs, labels)
    if line:
        say(f"warning: {line}")
    outputs = [None] * len(inputs)
    if output is None and (probabilities or confidence or overlay):
        raise UserError("--probabilities, --confidence and --overlay need an --output to lie in")
    if output is not None:
        outputs = files.name_outputs(
            inputs, output, one=False, probabilities=probabilities, confidence=confidence, overlay=overlay
        )
        _check_free(inputs, paths, outputs, folder)
    labelled.check_fit(inputs, paths)
    counts = labelled.count_values(paths, mapping)
    if output is not None:
        files.make_folders(outputs)

    model = setup.load(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    classes = setup.legend_of(model).classes
    for line in labelled.check_values(paths, counts, classes, mapping):
        say(f"warning: {line}")
    scenes = setup.open_scenes(model, inputs, bands=bands, scale=scale, nodata=nodata, written=output is not None)
    if output is not None:
        files.check_sources({scene.path: scene.files for scene in scenes}, outputs)
    step, overlap = setup.step_of(model, len(scenes), tile=tile, overlap=overlap, batch_size=batch_size, tta=tta)
    scores = scored.Scores(dict(zip(inputs, paths, strict=True)), mapping, len(classes))
    setup.map_scenes(model, checkpoint, scenes, outputs, step, overlap=overlap, take=scores.take)
    result = scores.result(model.temperature)
    size = f"{step.shape[2]} x {step.shape[3]}"
    say(
        f"\n{len(scenes)} image{'s' * (len(scenes) > 1)}, {result.confusion.sum():,} labelled pixels, at their own "
        f"scale, in windows of {size} that overlap by {overlap}\n{table(result, classes, 'images')}"
    )
    if output is not None:
        scored.write(result, folder, classes)
        say(f"maps and scores in {folder}")
    return result


def _check_free(
    images: Sequence[Image], labels: Sequence[Image], outputs: Sequence[files.Outputs],
    folder: pathlib.Path,
) -> None:  # fmt: skip
    """UserError if a file of ours would be written over a label, or over another of ours."""
    read = {path: [path] for path in (*images, *labels)}
    ours = [files.Outputs(folder / name, None, None, None, None) for name in scored.FILES]
    files.check_sources(read, [*outputs, *ours])
    for image, made in zip(images, outputs, strict=True):
        if taken := {path.name for path in made.wanted()} & set(scored.FILES):
            raise UserError(f"the map of {image} would be called {taken.pop()}, as a file of the scores; rename it")


OPTIONS = (
    "checkpoint", "images", "labels", "output", "label_map", "tile", "overlap", "batch_size", "nodata",
    "probabilities", "confidence", "overlay", "tta", "teacher_heads", "fmm_heads",
)  # fmt: skip


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # Orbax tells what it restores
    cli.stop_cleanly()
    given = {name: flags.FLAGS[name].value for name in OPTIONS}
    run(**given, bands=cli.numbers("bands", int), scale=cli.numbers("scale", float))


if __name__ == "__main__":
    cli.run(main, PARSE)
