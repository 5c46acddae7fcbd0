"""What is KTDA worth once the student is pretrained? Students that start from nothing, ImageNet or DINOv3, each trained
alone, with KTDA, and after a distillation without labels; and the frozen teacher under the same decoder. One table.

    python benchmarks/evidence/students.py --data=DIR --classes=water,road,field --output=results/students
    python benchmarks/evidence/students.py ... --teacher=weights/vitb --imagenet=weights/in1k --dinov3=weights/cnxt

DIR holds img_dir/{train,val} and ann_dir/{train,val}; without weights of its own a row takes those of
configs/dinov3.py from the hub, and a row whose weights cannot be had says why in the table. Everything else is that
file's, `--set KEY=VALUE` changes it for all rows. A model is scored once, at its last step, on `val`: no checkpoint is
selected by what is scored. A row that is there is left alone, one that was stopped goes on, so on one GPU the same call
is repeated until the table is full. Where there is no network, wheels/ is unpacked as in few_gpu.sh.
"""

import argparse
import ast
import contextlib
import json
import pathlib
import runpy
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from benchmarks.evidence.few_table import mean

CONFIG = pathlib.Path(__file__).resolve().parents[2] / "configs" / "dinov3.py"
STARTS = ("nothing", "imagenet", "dinov3")
MATCHED = {"model.align_grid": True, "model.standardize_taps": True, "loss.distance": "mse"}  # see configs/distill.py
ALONE = {"model.fam": False, "model.fmm.enabled": False, "distill": False}
ROWS = {  # of each start
    "student": ALONE,
    "ktda": {},
    "distilled": {**MATCHED, "distill": False},  # from the workdir of such a distillation
}
FROZEN = {**ALONE, "model.encoder": "teacher"}
DISTILLATION = {**MATCHED, "supervised": False, "data.name": "images", "data.classes": "none", "data.rotate": False}


def main() -> None:
    args = _arguments()
    jobs = [(start, row) for start in args.starts for row in args.rows if row != "frozen"]
    jobs += [("teacher", "frozen")] * ("frozen" in args.rows)
    failed = {}
    for seed in args.seeds:  # a whole table first, then its repetitions
        for start, row in jobs:
            target = args.output / f"{start}_{row}_{seed}.json"
            if target.exists():
                if json.loads(target.read_text())["settings"] != _settings(args):
                    sys.exit(f"error: {target} was made with other settings; give another --output, or remove it")
                continue
            begun = time.monotonic()
            try:
                scores = _train(args, start, row, seed)
            except ValueError as error:  # in a line, as the verbs say it; the other rows go on
                failed[start, row] = str(error)
                print(f"not run: {start}, {row}: {error}", flush=True)
                continue
            found = {"start": start, "row": row, "seed": seed, "seconds": round(time.monotonic() - begun), **scores}
            found["settings"] = _settings(args)
            temporary = target.with_suffix(".tmp")
            temporary.write_text(json.dumps({**found, "command": " ".join(sys.argv)}, indent=1) + "\n")
            temporary.replace(target)
            print(f"{start}, {row}, seed {seed}: mIoU {scores['mIoU']:.2f}, {found['seconds']} s", flush=True)
    text = table([json.loads(path.read_text()) for path in sorted(args.output.glob("*_*_*.json"))], failed)
    (args.output / "table.md").write_text(text)
    print(text)
    if failed:
        sys.exit(1)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="tiles and labels in folders")
    parser.add_argument("--classes", required=True, help="their names, with commas between them")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("results/students"))
    for name in ("teacher", "imagenet", "dinov3"):
        parser.add_argument(f"--{name}", help="weights; by default configs/dinov3.py's")
    parser.add_argument("--unlabelled", help="images for the distillation; by default those of the training tiles")
    parser.add_argument("--satellite", action="store_true", help="the teacher that was trained on satellite images")
    parser.add_argument("--starts", type=_words(STARTS), default=STARTS)
    parser.add_argument("--rows", type=_words((*ROWS, "frozen")), default=(*ROWS, "frozen"))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=5_000)
    parser.add_argument("--distill_steps", type=int, default=5_000)
    parser.add_argument("--set", dest="changed", action="append", type=_change, default=[], metavar="KEY=VALUE")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    return args


def _settings(args: argparse.Namespace) -> dict:
    """What all rows of a table must have in common."""
    names = ("data", "classes", "teacher", "imagenet", "dinov3", "unlabelled", "satellite", "steps", "distill_steps")
    return {name: getattr(args, name) for name in names} | {"changed": dict(sorted(map(_as_text, args.changed)))}


def _as_text(change: tuple) -> tuple[str, str]:
    return change[0], repr(change[1])


def _words(known: tuple[str, ...]):
    def parse(text: str) -> list[str]:
        words = text.split(",")
        if unknown := set(words) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}; known: {', '.join(known)}")
        return words

    return parse


def _change(text: str) -> tuple:
    key, _, value = text.partition("=")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return key, value


def _config(args: argparse.Namespace, start: str, seed: int, steps: int, given: dict):
    """configs/dinov3.py with the weights at hand, scored once, at the end."""
    begins = start if start in STARTS else "nothing"
    config = runpy.run_path(str(CONFIG))["get_config"](f"{'satellite' if args.satellite else 'web'},{begins}")
    config.data.root, config.data.classes, config.seed = args.data, args.classes, seed
    config.total_steps = config.eval_every = steps
    config.schedule.warmup = min(config.schedule.warmup, steps // 20)
    for key, value in (("teacher", args.teacher), ("student", getattr(args, begins, None))):
        if value:
            config.weights[key] = value
    config.update_from_flattened_dict({**dict(args.changed), **given})
    return config.lock()


def _train(args: argparse.Namespace, start: str, row: str, seed: int) -> dict:
    """Trains one model, to the end; its scores on `val`. UserError where it cannot be."""
    given = FROZEN if row == "frozen" else ROWS[row]
    if row == "distilled":
        given = {**given, "weights.student": str(_distilled(args, start, seed))}
    config = _config(args, start, seed, args.steps, given)
    metrics = _run(config, args.output / "runs" / f"{start}_{row}_{seed}").metrics
    return {"mIoU": round(metrics.summary["mIoU"], 4), "IoU": [round(float(x), 3) for x in metrics.per_class["IoU"]]}


def _distilled(args: argparse.Namespace, start: str, seed: int) -> pathlib.Path:
    workdir = args.output / "runs" / f"{start}_distillation_{seed}"
    images = args.unlabelled or str(pathlib.Path(args.data) / "img_dir" / "train")
    _run(_config(args, start, seed, args.distill_steps, {**DISTILLATION, "data.unlabelled": images}), workdir)
    return workdir


def _run(config, workdir: pathlib.Path):
    from ktda_jax.training import loop

    result = loop.train_and_evaluate(config, workdir)
    if result is None:
        raise SystemExit("stopped; the same command goes on")
    return result


def table(rows: list[dict], failed: dict) -> str:
    """Markdown: by start and row the mIoU, and paired by seed the differences from the student alone of the same start
    and from that of nothing, ± one standard error of their mean."""
    found = {}
    for row in rows:
        found.setdefault((row["start"], row["row"]), {})[row["seed"]] = row["mIoU"]
    order = [(start, row) for start in STARTS for row in ROWS] + [("teacher", "frozen")]
    lines = [
        "| student starts from | trained | seeds | mIoU | against it alone | against nothing, alone |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for start, row in order:
        scores = found.get((start, row))
        if not scores:
            if (start, row) in failed:
                lines.append(f"| {start} | {row} | 0 | not run: {failed[start, row]} | | |")
            continue
        cells = [mean(list(scores.values()))]
        for other in ((start, "student"), ("nothing", "student")):
            base = found.get(other, {})
            both = sorted(scores.keys() & base.keys())
            cells.append(
                "" if other == (start, row) or not both else mean([scores[s] - base[s] for s in both], sign="+")
            )
        name = "the teacher, frozen" if row == "frozen" else start
        lines.append(f"| {name} | {row} | {len(scores)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
