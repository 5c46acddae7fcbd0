"""`python -m ktda_jax.areas --map=FILE|GLOB|FOLDER --output=areas.csv`: hectares per class of finished maps.

    python -m ktda_jax.areas --map=map.tif --output=areas.csv
    python -m ktda_jax.areas --map=maps --polygons=districts.gpkg --id_field=name --confusion=runs/grass \\
      --output=areas.csv

A row per class of each map, of all maps together, and of each polygon. With --confusion also the areas corrected by the
errors that a sample shows, with standard errors and 95 % intervals (Olofsson et al. 2014), and user's and producer's
accuracies. They hold for a probability sample of the mapped area: validation tiles tell what the model does on such
tiles, which is another thing. docs/howto/areas.md says more.
"""

from absl import flags, logging

from ktda_jax import UserError, cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("map", None, "A map of `predict`, a quoted glob pattern, or a folder of them.")
    flags.DEFINE_string("polygons", None, "A GeoPackage, GeoJSON, shapefile, ...: areas within each of its polygons.")
    flags.DEFINE_string("layer", None, "Its layer, if it has several.")
    flags.DEFINE_string("id_field", None, "The field that names the polygons; by default they are numbered.")
    flags.DEFINE_string(
        "confusion", None, "What is known of the map's errors: a workdir, figures/SPLIT.json, scores.json, or a CSV."
    )
    flags.DEFINE_string("output", None, "The CSV.")
    flags.adopt_module_key_flags(cli)
    hint = "put a pattern such as --map='maps/*.tif' in quotes"
    PARSE = cli.parsed(cli.parser("map", "output", hint=hint))  # before the imports below: seconds

import contextlib
import pathlib
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from ktda_jax.data import buckets
from ktda_jax.data.gdal import opened
from ktda_jax.data.paths import place
from ktda_jax.prediction import area_table, files, sampled, zones
from ktda_jax.prediction.tally import Tally


def say(text: str) -> None:
    print(text, flush=True)


def run(
    map: str, output: str, *, polygons: str | None = None, layer: str | None = None, id_field: str | None = None,
    confusion: str | None = None,
) -> list[dict]:  # fmt: skip
    """The rows of the table, which is written to `output`. UserError says in one line what is wrong."""
    target = place(output)
    if target.suffix.lower() != ".csv" or target.is_dir():
        raise UserError(f"--output={output} must be a file that ends in .csv")
    with _writing(target):  # before minutes are spent
        target.parent.mkdir(parents=True, exist_ok=True)
        buckets.probe(target.parent)
    paths = _maps(map)
    sample = None if confusion is None else sampled.read(confusion)
    if polygons is not None:
        zones.check_installed()
    wanted = None if polygons is None else zones.read(polygons, layer=layer, field=id_field, say=say)
    classes, tallies = area_table.class_names(paths, sample), [zones.whole(path) for path in paths]
    if classes is None:
        highest = max(int(np.flatnonzero(tally.pixels[:-1]).max(initial=0)) for tally in tallies)
        classes = tuple(str(k) for k in range(highest + 1))
    for path, tally in zip(paths, tallies, strict=True):
        area_table.check_values(path, tally, classes)
    for how in dict.fromkeys(tally.area.how for tally in tallies):
        known = any(tally.area.how == how and tally.area.rows is not None for tally in tallies)
        say(f"areas: {how}" if known else f"warning: pixels only, no areas: {how}")
    together = "all maps" if len(paths) > 1 else paths[0].name
    found = [area_table.Zone(path.name, "", [tally]) for path, tally in zip(paths, tallies, strict=True)]
    if len(paths) > 1:
        _warn_of_overlap(paths)
        found.append(area_table.Zone(together, "", tallies))
    all_of_it = found[-1]
    if wanted:
        found += _polygons(paths, wanted, together)
    if sample:
        _warn_of_unknown(all_of_it, classes, sample)
    rows = [row for zone in found for row in zone.rows(classes, sample)]
    with _writing(target), buckets.aside(target) as temporary:
        temporary.write_bytes(area_table.as_csv(rows, sample).encode(errors="replace"))
    say(area_table.in_words(all_of_it.rows(classes, sample)))
    if sample:
        say(f"{sample.units:,} {sample.unit}s; {sample.remark}")
    say(f"{len(found)} tables of {len(classes)} classes in {target}" if len(found) > 1 else f"table in {target}")
    return rows


@contextlib.contextmanager
def _writing(target: pathlib.PurePath) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to --output={target}: {error.strerror or error}") from error


def _maps(text: str) -> list[pathlib.Path]:
    """Without what `predict` puts beside them."""
    paths = files.expand(text, "--map")
    stems = {path.stem for path in paths}
    beside = ("_probabilities", "_confidence", "_overlay")
    kept = [p for p in paths if not any(p.stem.endswith(e) and p.stem.removesuffix(e) in stems for e in beside)]
    return kept if len(paths) > 1 else paths


def _polygons(paths: Sequence[pathlib.Path], wanted: zones.Zones, together: str) -> list[area_table.Zone]:
    parts: list[list[Tally]] = [[] for _ in wanted.names]
    for path in paths:
        for part, tally in zip(parts, zones.within(path, wanted), strict=True):
            if tally is not None:
                part.append(tally)
    missed = [name for name, part in zip(wanted.names, parts, strict=True) if not part]
    if len(missed) == len(parts):
        raise UserError(
            f"none of the {len(parts)} polygons of {wanted.path} holds a pixel's centre of {together}; do they lie "
            "elsewhere, or is their CRS another one?"
        )
    if missed:
        more = f" and {len(missed) - 5} more" if len(missed) > 5 else ""
        say(f"warning: {len(missed)} of {len(parts)} polygons hold no pixel: {', '.join(missed[:5])}{more}; left out")
    return [area_table.Zone(together, name, part) for name, part in zip(wanted.names, parts, strict=True) if part]


def _warn_of_unknown(zone: area_table.Zone, classes: Sequence[str], sample: sampled.Sample) -> None:
    lacking = (sample.counts.sum(1) == 0) & (zone.pixels[: len(classes)] > 0)
    if lacking.any():
        names = ", ".join(classes[k] for k in np.flatnonzero(lacking))
        share = 100 * zone.pixels[: len(classes)][lacking].sum() / zone.pixels[: len(classes)].sum()
        say(
            f"warning: no unit of the sample was mapped as {names} ({share:.3g} % of the map): no area can be corrected"
        )


def _warn_of_overlap(paths: Sequence[pathlib.Path]) -> None:
    placed: dict[str, list[tuple]] = {}
    for path in paths:
        with opened(path) as file:
            if file.crs:
                margin = min(map(abs, file.res)) / 2
                west, south, east, north = file.bounds
                box = (west + margin, min(south, north) + margin, east - margin, max(south, north) - margin)
                placed.setdefault(file.crs.to_wkt(), []).append((path, box))
    for found in placed.values():
        boxes = np.array([box for _, box in found])
        for k, (west, south, east, north) in enumerate(boxes[:-1]):
            others = boxes[k + 1 :]
            across = (others[:, 0] < east) & (west < others[:, 2]) & (others[:, 1] < north) & (south < others[:, 3])
            if across.any():
                other = found[k + 1 + int(np.argmax(across))][0]
                say(f"warning: {found[k][0]} and {other} overlap; what both map counts twice in all maps together")
                return


OPTIONS = ("map", "output", "polygons", "layer", "id_field", "confusion")


def main(_: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)
    cli.stop_cleanly()
    sys.stdout.reconfigure(errors="replace")  # names of files may be no UTF-8
    run(**{name: flags.FLAGS[name].value for name in OPTIONS})


if __name__ == "__main__":
    cli.run(main, PARSE)
