"""Areas by class as a table: what was mapped, and what a sample of the map's errors makes of it."""

import csv
import io
import math
import pathlib
from collections.abc import Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.gdal import opened
from ktda_jax.data.pixel_area import HECTARE
from ktda_jax.prediction.sampled import Sample
from ktda_jax.prediction.tally import Tally
from ktda_jax.tiling.blend import NODATA

MAPPED = ("map", "polygon", "class_number", "class", "pixels", "unit", "mapped", "mapped_percent")
ADJUSTED = (
    "adjusted", "adjusted_se", "adjusted_low", "adjusted_high", "users_accuracy_percent", "users_accuracy_se",
    "producers_accuracy_percent", "producers_accuracy_se", "overall_accuracy_percent", "overall_accuracy_se",
    "sampling_unit", "sampling_units", "remark",
)  # fmt: skip
ELSEWHERE = "errors within the polygon taken to be those of the whole sample"


def class_names(paths: Sequence[pathlib.Path], sample: Sample | None) -> tuple[str, ...] | None:
    """As the maps' tags have them, or else the sample; None where neither has. UserError where they differ."""
    known = ("--confusion", sample.classes) if sample else None
    for path in paths:
        with opened(path) as file:
            tags = file.tags()
        names = tuple(tags[f"CLASS_{k}"] for k in range(NODATA) if f"CLASS_{k}" in tags)
        if names and known and names != known[1]:
            raise UserError(
                f"the classes of {path} are {', '.join(names)}, and those of {known[0]} are {', '.join(known[1])}"
            )
        if names:
            known = path, names
    return known and known[1]


def check_values(path: pathlib.Path, tally: Tally, classes: Sequence[str]) -> None:
    """UserError for a value that is no class."""
    others = [int(v) for v in np.flatnonzero(tally.pixels[:NODATA]) if v >= len(classes)]
    if others:
        raise UserError(f"{path} holds {others[0]}, and its {len(classes)} classes are 0 to {len(classes) - 1}")


class Zone:
    """Pixels and hectares by value of one or several maps, in all or within a polygon."""

    def __init__(self, map: str, polygon: str, tallies: Sequence[Tally]):
        self.map, self.polygon = map, polygon
        self.pixels = np.sum([tally.pixels for tally in tallies], 0)
        squares = [tally.square_metres for tally in tallies]
        self.hectares = None if any(each is None for each in squares) else np.sum(squares, 0) / HECTARE

    def rows(self, classes: Sequence[str], sample: Sample | None) -> list[dict]:
        """One per class, one of no data if there are any, one of all classes."""
        count, known = len(classes), self.hectares is not None
        values = self.hectares if known else self.pixels.astype(np.float64)
        mapped = values[:count]
        start = {"map": self.map, "polygon": self.polygon}
        unit = {"unit": "ha" if known else "pixels"}
        total = float(mapped.sum())

        def row(number, name: str, pixels, amount, share) -> dict:
            found = {"class_number": number, "class": name, "pixels": int(pixels), **unit}
            return start | found | {"mapped": amount, "mapped_percent": share}

        with np.errstate(divide="ignore", invalid="ignore"):
            shares = 100 * mapped / mapped.sum()
        rows = [row(k, name, self.pixels[k], mapped[k], shares[k]) for k, name in enumerate(classes)]
        everything = row("", "all classes", self.pixels[:count].sum(), total, 100 if total else math.nan)
        if sample and total:
            self._adjust(rows, everything, mapped, sample)
        if self.pixels[NODATA]:
            rows.append(row(NODATA, "no data", self.pixels[NODATA], values[NODATA], math.nan))
        return [*rows, everything]

    def _adjust(self, rows: list[dict], everything: dict, mapped: np.ndarray, sample: Sample) -> None:
        found = sample.estimate(mapped)
        low, high = found.interval
        about = {
            "sampling_unit": sample.unit, "sampling_units": sample.units,
            "remark": f"{sample.remark}; {ELSEWHERE}" if self.polygon else sample.remark,
        }  # fmt: skip
        for k, row in enumerate(rows):
            row |= {
                "adjusted": found.area[k], "adjusted_se": found.area_error[k], "adjusted_low": low[k],
                "adjusted_high": high[k], "users_accuracy_percent": 100 * found.users[k],
                "users_accuracy_se": 100 * found.users_error[k],
                "producers_accuracy_percent": 100 * found.producers[k],
                "producers_accuracy_se": 100 * found.producers_error[k],
            } | about  # fmt: skip
        everything |= {
            "adjusted": float(found.area.sum()), "overall_accuracy_percent": 100 * found.overall,
            "overall_accuracy_se": 100 * found.overall_error,
        } | about  # fmt: skip


def as_csv(rows: Sequence[dict], sample: Sample | None) -> str:
    """Empty where nothing is known."""
    file = io.StringIO()
    writer = csv.DictWriter(file, MAPPED + ADJUSTED if sample else MAPPED, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({key: _number(value) if isinstance(value, float) else value for key, value in row.items()})
    return file.getvalue()


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4f}".rstrip("0").rstrip(".")


def in_words(rows: Sequence[dict]) -> str:
    """For the terminal: a line per class."""
    unit = rows[0]["unit"]
    lines, width = [], max(len(row["class"]) for row in rows)
    for row in rows:
        line = f"{row['class']:{width}}  {row['mapped']:14,.2f} {unit}"
        if not math.isnan(error := row.get("adjusted_se", math.nan)):
            line += f", by the sample {row['adjusted']:,.2f} ± {error:,.2f} (standard error)"
            line += f", {row['adjusted_low']:,.2f} to {row['adjusted_high']:,.2f} in 95 %"
        lines.append(line)
    return "\n".join(lines)
