"""Results of run.py as a Markdown table and a figure.

mIoU is that of one run's validation fold; a row gives mean and standard deviation over folds x seeds. `union` is the
mIoU of one confusion matrix over all folds, mean over seeds: there every tile counts once.

A difference to the baseline is paired: same fold, seed and training tiles. Runs of one fold share their validation
tiles, so they are averaged over seeds first, and the standard error is that of the folds' means (few: for 4 folds 2
standard errors are 86 %, not 95 %). The one over all folds x seeds, as if they were independent, stands beside it.
"""

import pathlib

import numpy as np

from ktda_jax.metrics.confusion import summarize

BASELINE = "student"


def miou(confusion) -> float:
    return summarize(np.asarray(confusion)).summary["mIoU"]


def paired(ours: dict, baseline: dict) -> dict | None:
    """{(fold, seed): score} each -> mean difference, `se_folds` (of folds' means), `se_runs`; None without pairs."""
    pairs = {key: ours[key] - baseline[key] for key in ours.keys() & baseline.keys()}
    if not pairs:
        return None
    by_fold = [np.mean([d for (f, _), d in pairs.items() if f == fold]) for fold in sorted({f for f, _ in pairs})]
    return {
        "mean": float(np.mean(by_fold)),
        "se_folds": _standard_error(by_fold),
        "se_runs": _standard_error(list(pairs.values())),
        "folds": len(by_fold),
        "runs": len(pairs),
    }


def _standard_error(values) -> float:
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else float("nan")


def _deviation(values) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


def rows(results: list[dict]) -> list[dict]:
    """One per (percent, name), in the order of the results; scores in per cent."""
    groups = {}
    for result in results:
        groups.setdefault((result["percent"], result["name"]), []).append(result)
    scores = {key: {(r["fold"], r["seed"]): miou(r["confusion"]) for r in group} for key, group in groups.items()}
    table = []
    for key, group in groups.items():
        percent, name = key
        metrics = [summarize(np.asarray(r["confusion"])) for r in group]
        values = list(scores[key].values())
        accuracies = [m.summary["aAcc"] for m in metrics]
        seeds = sorted({r["seed"] for r in group})
        union = [miou(sum(np.asarray(r["confusion"]) for r in group if r["seed"] == seed)) for seed in seeds]
        ious = np.array([m.per_class["IoU"] for m in metrics])
        table.append(
            {
                "percent": percent,
                "name": name,
                "runs": len(group),
                "scores": scores[key],
                "miou": float(np.mean(values)),
                "miou_sd": _deviation(values),
                "union": float(np.mean(union)),
                "iou": [float(np.mean(c[~np.isnan(c)])) if (~np.isnan(c)).any() else float("nan") for c in ious.T],
                "aacc": float(np.mean(accuracies)),
                "aacc_sd": _deviation(accuracies),
                "seconds": float(np.median([r["seconds"] - r["compile_s"] for r in group])),
                "parameters": group[0]["parameters"],
                "frozen": group[0]["frozen"],
                "inference_gflop": group[0]["inference_gflop"],
                "difference": None if name == BASELINE else paired(scores[key], scores.get((percent, BASELINE), {})),
            }
        )
    return table


def markdown(table: list[dict], classes: tuple[str, ...]) -> str:
    head = ["labels", "model", "runs", "mIoU", f"against {BASELINE}", "union", *classes, "aAcc", "time", "parameters"]
    lines = [head + ["GFLOP/Mpx"], ["---"] * (len(head) + 1)]
    for row in table:
        difference, frozen = row["difference"], row["frozen"]
        shown = "-"
        if difference:
            shown = f"{difference['mean']:+.2f} ± {difference['se_folds']:.2f} ({difference['se_runs']:.2f})"
        lines.append(
            [
                f"{row['percent']} %", row["name"], str(row["runs"]), f"{row['miou']:.2f} ± {row['miou_sd']:.2f}",
                shown,
                f"{row['union']:.2f}", *(f"{v:.1f}" for v in row["iou"]), f"{row['aacc']:.2f} ± {row['aacc_sd']:.2f}",
                f"{row['seconds']:.0f} s",
                f"{row['parameters'] / 1e6:.2f} M" + (f" + {frozen / 1e6:.1f} M frozen" if frozen else ""),
                f"{row['inference_gflop']:.1f}",
            ]
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def figure(table: list[dict], path: pathlib.Path) -> None:
    """A panel per share of labels: a dot per run, coloured by fold, and the mean; the baseline's mean as a line."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shares = sorted({row["percent"] for row in table})
    height = 1.4 + 0.32 * max(sum(row["percent"] == share for row in table) for share in shares)
    drawing, axes = plt.subplots(
        1, len(shares), figsize=(2.2 + 3.6 * len(shares), height), sharex=True, squeeze=False, layout="constrained"
    )
    for axis, share in zip(axes[0], shares, strict=True):
        shown = [row for row in table if row["percent"] == share]
        for y, row in enumerate(shown):
            for (fold, _), score in sorted(row["scores"].items()):
                axis.plot(score, y, "o", color=f"C{fold}", markersize=4, alpha=0.6, markeredgewidth=0)
            axis.plot(row["miou"], y, "|", color="black", markersize=14, markeredgewidth=2)
            difference = row["difference"]
            if difference and np.isfinite(difference["se_folds"]):
                axis.errorbar(row["miou"], y, xerr=difference["se_folds"], color="black", capsize=3, linewidth=1)
            if row["name"] == BASELINE:
                axis.axvline(row["miou"], color="grey", linewidth=0.8, linestyle=":")
        axis.set_yticks(range(len(shown)), [row["name"] for row in shown])
        axis.invert_yaxis()
        axis.set_title(f"{share} % of the labels", fontsize=10)
        axis.set_xlabel("mIoU, %")
        axis.grid(axis="x", alpha=0.3)
    folds = sorted({fold for row in table for fold, _ in row["scores"]})
    handles = [plt.Line2D([], [], marker="o", linestyle="", color=f"C{fold}", label=f"fold {fold}") for fold in folds]
    bar = plt.Line2D([], [], color="black", label=f"mean ± SE of difference to {BASELINE}")
    drawing.legend(handles=[*handles, bar], loc="outside lower center", ncols=len(folds) + 1, fontsize=8, frameon=False)
    temporary = path.with_name(f".{path.name}")
    drawing.savefig(temporary, dpi=150, format="png")
    plt.close(drawing)
    temporary.replace(path)


def write(results: list[dict], output: pathlib.Path, classes: tuple[str, ...], *, command: str) -> str:
    """Writes table.md and figure.png below `output`; prints the table."""
    table = rows(results)
    text = markdown(table, classes)
    versions = ", ".join(f"{k} {v}" for k, v in results[-1]["versions"].items())
    note = f"{command}\n\n{results[-1]['device']}, {versions}, {results[-1]['date']}; {len(results)} runs.\n"
    temporary = output / ".table.md"
    temporary.write_text(f"{text}\n{note}")
    temporary.replace(output / "table.md")
    figure(table, output / "figure.png")
    print(f"{text}\n{output / 'table.md'}, {output / 'figure.png'}", flush=True)
    return text
