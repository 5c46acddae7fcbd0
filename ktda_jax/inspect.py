"""`python -m ktda_jax.inspect --config=...`: is the data what it should be? Tables, figures, suggestions.

Reads every tile of every split that the config names, and every window of images without labels; writes
`inspection.json`, `classes.png`, `samples.png` and `unlabelled.png` into `--output`, prints the tables, and exits with
1 if something is wrong with the data.
"""

import sys

from absl import flags

from ktda_jax import cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    cli.define_config()
    flags.DEFINE_string("output", None, "Where to write; default inspection/<data set>.")
    flags.DEFINE_integer("samples", 6, "Random training tiles in the sheet.", lower_bound=1)
    PARSE = cli.parsed(cli.parse_config)  # before the imports below, which take seconds

import contextlib
import dataclasses
import pathlib

import numpy as np
from ml_collections import ConfigDict

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config.data import Data
from ktda_jax.config.workdir import write_json
from ktda_jax.data import leaks, places, shares
from ktda_jax.data.check import check_split
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.paths import expand
from ktda_jax.data.rows import Shuffled, TrainRows
from ktda_jax.data.sources import read_tile
from ktda_jax.figures import plots, sheets
from ktda_jax.training.inputs import augmentation, doubts, held_out_batches, open_source, open_windows

AUGMENTED = 3  # draws of the augmentation beside each
FEW = 16  # files of a split


def run(config: ConfigDict, output: pathlib.Path, samples: int) -> list[str]:
    """Inspects all splits; returns what is wrong with them."""
    settings = checks.resolve(config)
    data, info = settings.data, settings.data.info
    names = list(dict.fromkeys(filter(None, (data.train_split, data.validation, data.test_split))))
    names = names if settings.supervised else []
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to --output={output}: {error.strerror}") from error
    sources, counts, problems = {}, {}, []
    for split in names:
        try:
            source = open_source(data, split)
            crop = data.crop if split == data.train_split else None
            counts[split] = shares.count(source, num_threads=data.num_threads)
            sources[split] = source
            problems += doubts(data, source, split, check_split(source, crop=crop, num_threads=data.num_threads))
        except UserError as error:
            problems += {str(error)} - set(problems)  # of folds both parts of a split have the same
    if data.unlabelled:
        problems += _windows(data, sources.get(data.train_split), settings.supervised, output, samples)
    if not counts and not settings.supervised:
        return problems
    if not counts:
        with contextlib.suppress(OSError):  # others' files may be there
            output.rmdir()
        return problems
    groups = shares.doubles(counts)
    across = [group for group in groups if len({name.split("/")[0] for name in group}) > 1]
    if across:
        some = "; ".join(" = ".join(group) for group in across[:3])
        problems.append(f"{len(across)} image(s) stand in two splits, so scores flatter: {some}")
    train = counts.get(data.train_split, next(iter(counts.values())))
    classes = len(info.classes)
    suggested = {
        "inverse_frequency": shares.inverse_frequency(train.pixels[:classes]),
        "effective_number": shares.effective_number(train.tiles_with[:classes]),
    }
    print(_tables(info.classes, counts, suggested, [g for g in groups if g not in across]))
    fold = next((source.fold for source in sources.values() if source.fold), None)
    if fold:
        print(fold.table())
    warnings = _leaks(sources, counts, data.num_threads)
    for line in warnings:
        print(f"warning: {line}")
    by_split = {split: found.pixels[:classes] for split, found in counts.items()}
    plots.save_shares(output / "classes.png", by_split, info.classes, info.palette)
    if data.train_split in sources:
        _sheet(output / "samples.png", sources[data.train_split], data, settings.seed, samples)
    report = _report(info.classes, counts, groups, suggested, problems) | {"warnings": warnings}
    write_json(output / "inspection.json", report | ({"fold": dataclasses.asdict(fold)} if fold else {}))
    print(f"written to {output}")
    return problems


def _windows(data: Data, tiles, supervised: bool, output: pathlib.Path, samples: int) -> list[str]:
    """Says what windows the unlabelled images give, and draws some into `unlabelled.png`; what is wrong with them."""
    try:
        windows, found, doubtful = open_windows(data, tiles, held_out=None if supervised else False)
        if not supervised:
            held_out, doubtful = held_out_batches(data, 1)[1], list(doubtful)
            print(f"held out: {held_out.windows:,} windows of {held_out.files:,} images")
    except UserError as error:
        return [str(error)]
    print(f"unlabelled: {found.windows:,} windows of {found.files:,} images, {found.empty:,} left out without data")
    rgb = list(data.rgb_positions)
    chosen = np.unique(np.linspace(0, len(windows) - 1, samples).round().astype(int)).tolist()
    rows = [[windows[index]["image"][..., rgb]] for index in chosen]
    sheets.save_sheet(
        output / "unlabelled.png", rows, ["as distilled on"], [windows[k]["name"] for k in chosen], (), ()
    )
    return doubtful


def _leaks(sources: dict, counts: dict, num_threads: int | None) -> list[str]:
    """What may make scores flatter than they would be on new ground, one line each."""
    named = {split: [name for same in found.hashes.values() for name in same] for split, found in counts.items()}
    extents, names = {}, {}
    for split, source in sources.items():
        paths = getattr(source, "image_paths", ())
        few = paths[:: max(1, len(paths) // FEW)]  # where none of these has a place, the rest need not be opened
        if places.read(few, num_threads=num_threads).located.any():
            extents[split], names[split] = places.read(paths, num_threads=num_threads), source.names
    return leaks.by_name(named) + leaks.by_place(extents, names)


def _tables(classes, counts, suggested, within) -> str:
    width = max(map(len, (*classes, "ignored (255)")))
    lines = ["", f"{'class':{width}}" + "".join(f"{split:>24}" for split in counts)]
    for row, name in [*enumerate(classes), (IGNORE, "ignored (255)")]:
        cells = ""
        for found in counts.values():
            labelled = found.pixels.sum() if row == IGNORE else found.pixels[: len(classes)].sum()
            share = 100 * found.pixels[row] / max(labelled, 1)
            cells += f"{found.pixels[row]:>16,} {share:6.2f}%"
        lines.append(f"{name:{width}}{cells}")
    lines.append(f"{'tiles':{width}}" + "".join(f"{found.tiles:>24,}" for found in counts.values()))
    for split, found in counts.items():
        sizes = ", ".join(f"{h} x {w} ({n})" for (h, w), n in sorted(found.sizes.items(), key=lambda s: -s[1])[:4])
        more = f" and {len(found.sizes) - 4} more" if len(found.sizes) > 4 else ""
        lines.append(f"sizes in {split}: {sizes}{more}")
    if within:
        some = "; ".join(" = ".join(group) for group in within[:3])
        lines.append(f"{len(within)} image(s) stand several times in one split: {some}")
    lines.append("class weights to try (--config.loss.class_weights), from the training split:")
    for name, values in suggested.items():
        lines.append(f"  {name.replace('_', ' '):18} ({','.join(f'{v:.3g}' for v in values)})")
    return "\n".join(lines)


def _report(classes, counts, groups, suggested, problems) -> dict:
    return {
        "classes": list(classes),
        "splits": {
            split: {
                "tiles": found.tiles,
                "pixels": found.pixels[: len(classes)].tolist(),
                "ignored": int(found.pixels[IGNORE]),
                "tiles_with_class": found.tiles_with[: len(classes)].tolist(),
                "sizes": {f"{h}x{w}": n for (h, w), n in sorted(found.sizes.items())},
                "unreadable": found.unreadable,
            }
            for split, found in counts.items()
        },
        "doubles": groups,
        "class_weights": {name: [round(float(v), 6) for v in values] for name, values in suggested.items()},
        "problems": problems,
    }


def _sheet(path: pathlib.Path, source, data: Data, seed: int, samples: int) -> None:
    """Random tiles: image, label, both, and what training sees of them (not which it prefers)."""
    how = dataclasses.replace(augmentation(data), rare_crops=0.0)
    drawn = TrainRows(Shuffled(source, None, seed, False), None, None, seed=seed, augmentation=how)
    rng, rows, names = np.random.default_rng(seed), [], []
    rgb, info = list(data.rgb_positions), data.info
    for index in rng.permutation(len(source)):
        try:
            tile = read_tile(source, int(index))
            image, label = tile["image"], tile["label"]
            if image.shape[:2] != label.shape or min(np.subtract(label.shape, data.crop)) < 0:
                continue  # reported, too
            shown = image[..., rgb]
            row = [shown, sheets.paint(label, info.palette), sheets.overlay(shown, label, info.palette)]
            for _ in range(AUGMENTED):
                row.append(drawn.of_tile(int(index), rng)["image"][..., rgb])
        except UserError:  # already reported
            continue
        rows.append(row)
        names.append(tile["name"])
        if len(rows) == samples:
            break
    if rows:
        titles = ["image", "label", "overlay", *["as trained on"] * AUGMENTED]
        sheets.save_sheet(path, rows, titles, names, info.classes, info.palette)


def main(_: list[str]) -> None:
    cli.stop_cleanly()
    config, given = cli.config(), flags.FLAGS
    problems = run(config, expand(given.output or f"inspection/{config.data.name}"), given.samples)
    if problems:
        sys.exit("\n".join(f"error: {problem}" for problem in problems))
    print("nothing wrong found")


if __name__ == "__main__":
    cli.run(main, PARSE)
