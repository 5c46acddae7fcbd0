"""`python -m ktda_jax.convert --input=FILE --output=FOLDER`: published weights into our folder, or back.

python -m ktda_jax.convert --source=ktda --input=grass.pth --output=weights/grass --dataset=grass
python -m ktda_jax.convert --source=hf --input=hf://facebook/dinov2-base --output=weights/dinov2_base
python -m ktda_jax.convert --to=upstream --input=weights/grass --output=grass.pth
python -m ktda_jax.convert --input=runs/grass --output=weights/mine     # the best checkpoint of a training
"""

import dataclasses
import time

from absl import flags, logging

from ktda_jax import UserError, cli

SOURCE = flags.DEFINE_string("source", "auto", "ktda, hf, meta, timm or mmpretrain; auto goes by the names.")
INPUT = flags.DEFINE_string("input", None, "A .pth or .safetensors file, a folder, hf://ORG/NAME, or a workdir.")
OUTPUT = flags.DEFINE_string("output", None, "The folder to write; with --to=upstream the .pth file.")
TO = flags.DEFINE_enum("to", "jax", ["jax", "upstream"], "upstream: the way back, for the published PyTorch code.")
DATASET = flags.DEFINE_string("dataset", None, "grass, l8_biome, ...: names and colours of the model's classes.")
cli.define_heads()

parse = cli.parser("input", "output")


def main(_: list[str]) -> None:
    from ktda_jax.data.datasets import dataset_info
    from ktda_jax.data.paths import expand
    from ktda_jax.weights import folder, loading, sources

    cli.stop_cleanly()
    start = time.monotonic()
    try:
        output = expand(OUTPUT.value)
        folder.check_free(output)
        info = dataset_info(DATASET.value) if DATASET.value else None
        found = _read(INPUT.value, SOURCE.value)
        if info is not None:
            classes = getattr(found.config, "num_classes", None)
            if classes != len(info.classes):
                raise UserError(
                    f"--dataset={info.name} has {len(info.classes)} classes, {INPUT.value} {classes or 'none'}"
                )
            found = dataclasses.replace(found, classes=info.classes, palette=info.palette)
        if TO.value == "upstream":
            sources.to_upstream(found, output)
        else:
            folder.save(output, found)
    except OSError as error:
        raise UserError(str(error)) from error
    values = sum(array.size for array in found.arrays.values())
    new = found.source.get("initialised")
    print(
        f"{found.kind}, {len(found.arrays)} tensors, {values / 1e6:.1f} M values -> {output} "
        f"({time.monotonic() - start:.0f} s)" + (f"; not in the source, hence new: {', '.join(new)}" if new else "")
    )
    if line := loading.assumptions(INPUT.value, found):
        print(f"warning: {line}")


def _read(path: str, source: str):
    from ktda_jax.config.workdir import workdir_at
    from ktda_jax.weights import folder, loading, sources

    heads = {name: flags.FLAGS[name].value for name in ("teacher_heads", "fmm_heads")}
    if (workdir := workdir_at(path)) is not None:
        from ktda_jax.training import trained

        logging.set_verbosity(logging.ERROR)  # Orbax tells what it restores
        found = trained.from_workdir(workdir)
        teacher = "" if found.config.encoder == "teacher" else ", without its teacher, which a workdir does not hold"
        print(f"the checkpoint of step {found.source['step']}{teacher}")
    elif folder.is_folder(weights := loading.local(path)):
        found = loading.of_folder(path, weights)
    else:
        found = sources.load(path, source, **heads)
    loading.check_heads(path, found, **heads)
    return found


if __name__ == "__main__":
    cli.run(main, cli.parsed(parse))
