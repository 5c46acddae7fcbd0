"""The tables of the evidence at few labels, from the rows that few_labels.py has written: Markdown on stdout.

    python benchmarks/evidence/few_table.py [--rows=DIR] [--figure=docs/few_labels.png]

Differences are paired by draw; +- is the standard error of their mean.
"""

import argparse
import collections
import json
import math
import pathlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ORDER = (
    "student",
    "published",
    "aligned",
    "labelled",
    "frozen",
    "distilled",
    "unlabelled",
    "semi",
    "teacher",
    "probe",
    "colour",
)
AGAINST = ("student", "published", "probe")


def read(rows: pathlib.Path) -> dict:
    """{(set, labels): {row with its changes: {draw: row}}}."""
    found = collections.defaultdict(lambda: collections.defaultdict(dict))
    for path in sorted(rows.glob("*.json")):
        row = json.loads(path.read_text())
        if row["row"] == "distillation":
            continue
        told = {k: v for k, v in row["changed"].items() if k != "model.aux_channels"}  # which goes with the linear head
        changed = ", ".join(f"{k.split('.')[-1]} {v}" for k, v in sorted(told.items()))
        found[row["set"], row["labels"]][row["row"] + (f" ({changed})" if changed else "")][row["draw"]] = row
    return found


def table(rows: dict) -> str:
    """A line per row: mIoU of all scored pixels, by area, and paired differences."""
    names = sorted(rows, key=lambda name: (ORDER.index(name.split(" ")[0]), name))
    areas = [area for area in next(iter(next(iter(rows.values())).values()))["scores"] if area != "all"]
    head = ["model", "draws", "mIoU", *areas, *(f"against {name}" for name in AGAINST if name in rows), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name in names:
        found = rows[name]
        cells = [f"`{name}`", str(len(found)), mean([row["scores"]["all"]["mIoU"] for row in found.values()])]
        cells += [f"{np.mean([row['scores'][area]['mIoU'] for row in found.values()]):.1f}" for area in areas]
        for other in AGAINST:
            if other in rows:
                both = sorted(found.keys() & rows[other].keys())
                differences = [score(found[draw]) - score(rows[other][draw]) for draw in both]
                cells.append("" if name == other or not both else mean(differences, sign="+"))
        seconds = [row["seconds"] for row in found.values()]
        lines.append("| " + " | ".join([*cells, f"{np.median(seconds):.0f}"]) + " |")
    return "\n".join(lines)


def score(row: dict) -> float:
    return row["scores"]["all"]["mIoU"]


def mean(values: list[float], sign: str = "") -> str:
    """With the standard error of the mean, where there are several."""
    text = f"{np.mean(values):{sign}.2f}"
    return text if len(values) < 2 else f"{text} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.2f}"


def draw_figure(rows: dict, path: pathlib.Path) -> None:
    """mIoU of every draw, and the mean, by model."""
    from matplotlib.figure import Figure

    from ktda_jax.figures.plots import FAINT, LINES, TEXT, save_figure

    names = sorted(rows, key=lambda name: (ORDER.index(name.split(" ")[0]), name))
    figure = Figure(figsize=(7, 0.5 + 0.42 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(reversed(names)):
        values = [score(row) for row in rows[name].values()]
        color = LINES[0] if name.startswith(("frozen", "distilled", "unlabelled", "labelled")) else FAINT
        axes.plot(values, [place] * len(values), "o", color=color, markersize=5, alpha=0.7)
        axes.plot([np.mean(values)] * 2, [place - 0.3, place + 0.3], color=TEXT, linewidth=2)
    axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=9, color=TEXT)
    axes.set_xlabel("mIoU (%), a dot per draw of labelled tiles", fontsize=10, color=TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=pathlib.Path, default=HERE / "rows")
    parser.add_argument("--figure", type=pathlib.Path)
    args = parser.parse_args()
    found = read(args.rows)
    for (name, labels), rows in sorted(found.items()):
        print(f"\n### {name}, {labels or 'all'} labels\n\n{table(rows)}")
    if args.figure:
        draw_figure(found["final", 16], args.figure)
    hours = sum(row["cpu_seconds"] for rows in found.values() for by in rows.values() for row in by.values()) / 3600
    print(f"\n{hours:.1f} core-hours in all")


if __name__ == "__main__":
    main()
