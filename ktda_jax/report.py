"""`python -m ktda_jax.report --workdir=...`: one HTML page of a training, or of several side by side.

    python -m ktda_jax.report --workdir=runs/grass
    python -m ktda_jax.report --workdir=runs/grass,runs/grass_mlp --output=comparison.html --root=/new/place

Curves, scores and settings come from the workdir. The best checkpoint is evaluated again on the split that training
evaluates, for the best and worst tiles, the class shares and the feature maps; what cannot be had (no data, no
checkpoint yet, no teacher) is said in the page, in one line. The page is one file and needs no network.
"""

import sys

from absl import flags, logging

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_multi_string("workdir", None, "A run's folder; several for a comparison, repeated or with commas.")
    flags.DEFINE_string("output", None, "The page; default report.html (of several: comparison.html) in the first.")
    flags.DEFINE_string("root", None, "Where the data are now, in the place of config.data.root.")
    flags.DEFINE_integer("tiles", 4, "Best and worst tiles each; 0: without a model and without data.", lower_bound=0)
    PARSE = cli.parsed(cli.parser())  # before the imports below, which take seconds

import pathlib
from collections.abc import Sequence

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.data.paths import absolute, place
from ktda_jax.reports import workdir
from ktda_jax.reports.gather import gather
from ktda_jax.reports.page import render


def run(workdirs: Sequence[str], output: str | None = None, *, root: str | None = None, tiles: int = 4) -> pathlib.Path:
    """Writes the page and returns its path; UserError for what is no workdir or cannot be written to."""
    paths = list({absolute(path): path for path in map(place, workdirs)}.values())  # x and x/ are one
    name = "report.html" if len(paths) == 1 else "comparison.html"
    path = place(output) if output else paths[0] / name
    for given in paths:  # before the output's folder is made
        workdir.check(given)
    if path.is_dir():
        raise UserError(f"--output={path} is a folder; give a file, such as {path / name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        buckets.probe(path.parent)  # a place that will not do is said before minutes are spent
        page = render(gather(paths, root=root, keep=tiles))
        with buckets.aside(path) as temporary:
            temporary.write_bytes(page.encode(errors="replace"))  # names of files may be no UTF-8
    except OSError as error:
        raise UserError(f"cannot write to --output={path}: {error.strerror or error}") from error
    return path


def _workdirs() -> list[str]:
    split = ([given] if place(given).is_dir() else given.split(",") for given in flags.FLAGS.workdir or ())
    return [path for paths in split for path in paths if path]


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    cli.stop_cleanly()
    sys.stdout.reconfigure(errors="replace")  # names of files may be no UTF-8
    given = flags.FLAGS
    if not _workdirs():
        sys.exit("error: give a workdir: --workdir=runs/grass")
    path = run(_workdirs(), given.output, root=given.root, tiles=given.tiles)
    print(f"{path}, {buckets.size(path) / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main, PARSE)
