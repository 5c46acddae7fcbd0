"""Does knowledge transfer help when labels are few? One row of the evidence: one model, trained from nothing, scored.

    python benchmarks/evidence/few_labels.py --tiles=DIR --teacher=weights/dinov2s --row=unlabelled --labels=16 --draw=0

DIR holds img_dir/*/AREA_....png and ann_dir/*/ (../shared/tools/cut_dubai.py). A row writes ROWS/NAME.json: confusion
matrices by area, settings, seconds, the machine's speed and the command. What rows share, the teacher's features and
the distilled student, is made once, in --work. A row that is there is left alone. `--set=choose` trains on areas 1, 2
and 7 and scores area 4: there settings are tried, with `--with KEY=VALUE` (of the distillation: `distill:KEY`);
`--set=final` scores areas 3 and 6.
"""

import argparse
import ast
import contextlib
import hashlib
import json
import pathlib
import runpy
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from benchmarks.evidence import draws

HERE = pathlib.Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"

# What all rows have, whatever configs/few_labels.py:10 recommends by now.
BASE = {
    "model.head": "uper", "model.aux_channels": 32, "optimizer.student_lr_mult": 1.0, "data.eval_scale": "crop",
}  # fmt: skip
# Changes of that. `distilled`: starts from the student of configs/distill.py.
PLAIN = {"model.align_grid": False, "model.standardize_taps": False, "model.teacher.taps": None}
ROWS = {
    "student": {**PLAIN, "model.fam": False, "optimizer.lr": 2e-3},  # chosen on area 4
    "published": {
        **PLAIN, "distill": True, "loss.distance": "published", "model.fmm.enabled": True, "model.fmm.form": "mlp",
        "model.neck_channels": None,
    },
    "labelled": {"distill": True},
    "aligned": {},  # the same network without a teacher
    "frozen": {"distilled": True, "optimizer.student_lr_mult": 0.0},  # only the decoder learns
    "distilled": {"distilled": True},
    "unlabelled": {"distilled": True, "distill": True, "batch_size": 8, "data.unlabelled": True},
    "semi": {
        "distilled": True, "batch_size": 8, "data.unlabelled": True, "semi.weight": 1.0, "semi.ramp": 200, "ema": 0.99,
    },
    "teacher": {
        **PLAIN, "model.encoder": "teacher", "model.fam": False, "model.standardize_taps": True,
    },
    "probe": {"layer": 6},  # chosen on area 4
    "colour": {"layer": None},  # the same of a token's mean colour
    "distillation": {},  # alone: how much of the teacher's variance it explains; --labels=0
}  # fmt: skip


def main() -> None:
    args = _arguments()
    given = {**ROWS[args.row], **dict(args.changed)}
    changed = {k: v for k, v in dict(args.changed).items()}
    tag = "_" + hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:6] if changed else ""
    name = f"{args.set}_{args.labels}_{args.draw}_{args.row}{tag}"
    target = args.rows / f"{name}.json"
    if target.exists():
        print(f"{target} is there already")
        return
    started, cpu = time.monotonic(), time.process_time()
    root = draws.folder(args.work, args.tiles, args.set, args.labels, args.draw)
    if args.row == "distillation":
        scores = _curve(args, root, {k.removeprefix("distill:"): v for k, v in given.items()})
    elif args.row in ("probe", "colour"):
        scores = _probe(args, root, given["layer"])
    else:
        scores = _train(args, root, given, args.work / "runs" / name)
    row = {
        "set": args.set, "labels": args.labels, "draw": args.draw, "row": args.row, "changed": changed,
        "scores": scores, "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1), "gflops": _speed(), "device": _device(),
        "command": " ".join(["python", "benchmarks/evidence/few_labels.py", *sys.argv[1:]]),
    }  # fmt: skip
    args.rows.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(row, indent=1) + "\n")
    temporary.replace(target)
    print(f"{name}: {summary(scores)}, {row['seconds']} s, {row['gflops']} GFLOP/s", flush=True)


def summary(scores: dict) -> str:
    if "curve" in scores:
        return ", ".join(f"{k} {v:.3f}" for k, v in scores["curve"][-1].items())
    return ", ".join(f"{area} {found['mIoU']:.2f}" for area, found in scores.items())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=pathlib.Path, required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--work", type=pathlib.Path, default=pathlib.Path("results/few_labels"))
    parser.add_argument("--rows", type=pathlib.Path, default=HERE / "rows")
    parser.add_argument("--row", choices=ROWS, required=True)
    parser.add_argument("--set", choices=draws.SETS, default="final")
    parser.add_argument("--labels", type=int, default=16, help="tiles; 0: all")
    parser.add_argument("--draw", type=int, default=0, help="of the tiles, and the seed")
    parser.add_argument("--computed", action="store_true", help="the teacher runs in every step, as suits a GPU")
    parser.add_argument("--with", dest="changed", action="append", type=_change, default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def _change(text: str) -> tuple:
    key, _, value = text.partition("=")
    with contextlib.suppress(ValueError, SyntaxError):
        value = ast.literal_eval(value)
    return key, value


def _config(args: argparse.Namespace, path: str, given: dict):
    """A config of configs/ with changes, on one device."""
    file, _, argument = path.partition(":")
    config = runpy.run_path(str(CONFIGS / file))["get_config"](argument)
    config.update_from_flattened_dict({
        **(BASE if file == "few_labels.py" else {}), "mesh.data": 1, "seed": args.draw, "weights.teacher": args.teacher,
        "teacher.mode": "computed" if args.computed else "precomputed", "teacher.dtype": "float16", **given,
    })  # fmt: skip
    config.eval_every = min(config.eval_every, config.total_steps) if file == "distill.py" else config.total_steps
    return config.lock()


def _train(args: argparse.Namespace, root: pathlib.Path, given: dict, workdir: pathlib.Path) -> dict:
    """Trains one model and scores its last step; the workdir stays."""
    from ktda_jax import extract
    from ktda_jax.training import loop

    given = dict(given)
    distill = {k.removeprefix("distill:"): given.pop(k) for k in list(given) if k.startswith("distill:")}
    if given.pop("distilled", False):
        given["weights.student"] = str(_distilled(args, root, distill))
    given["data.root"], given["data.classes"] = str(root), draws.SETS[args.set][0]
    given["data.val_split"] = "train"  # what is scored is not looked at before the end
    features = args.work / "features" / root.name
    if given.get("data.unlabelled"):
        given["data.unlabelled"] = str(root / "img_dir" / "images")
        windows = features.with_name(f"{features.name}_unlabelled")
        if not args.computed and not windows.exists():
            _extracted(args, root)
            windows.symlink_to(_features(args).name + "_unlabelled")
    given["teacher.features"] = str(features)
    config = _config(args, "few_labels.py:10", given)
    if config.distill and not args.computed:
        extract.run(config)
    _finished(loop.train_and_evaluate(config, workdir))
    return _scores(args, config, workdir)


def _finished(result) -> None:
    """Ends where a signal has stopped the training: what is half trained is no row."""
    if result is None:
        raise SystemExit("stopped; the same command goes on")


def _features(args: argparse.Namespace) -> pathlib.Path:
    return args.work / "features" / args.set


def _extracted(args: argparse.Namespace, root: pathlib.Path) -> dict:
    """What a distillation of the set is given, and its teacher's features, made once: no labels are looked at."""
    from ktda_jax import extract

    given = {"data.unlabelled": str(root / "img_dir" / "images"), "teacher.features": str(_features(args)), "seed": 0}
    held_out = {"data.unlabelled_val": ",".join(str(root / "img_dir" / group) for group in draws.SETS[args.set][2])}
    # The images of the scored areas, without their labels, show how far the distillation is. They choose the checkpoint
    # as well: the last one, as long as the curve rises.
    if not args.computed:
        extract.run(_config(args, "distill.py", {**given, **held_out}))
    return {**given, **held_out}


def _distilled(args: argparse.Namespace, root: pathlib.Path, changed: dict) -> pathlib.Path:
    """The workdir of the set's distilled student; of other settings another one."""
    from ktda_jax.training import loop

    tag = "_".join(f"{k.split('.')[-1]}{v}" for k, v in sorted(changed.items())).replace(" ", "")
    workdir = args.work / "distilled" / f"{args.set}{'_' if tag else ''}{tag}"
    if not (workdir / "figures" / "held_out.json").exists():
        config = _config(args, "distill.py", {**_extracted(args, root), **changed})
        _finished(loop.train_and_evaluate(config, workdir))
    return workdir


def _curve(args: argparse.Namespace, root: pathlib.Path, changed: dict) -> dict:
    """The variance explained over the steps on the images of the scored areas; of stored features, by position too."""
    from benchmarks.evidence import position
    from ktda_jax.config.settings import Settings
    from ktda_jax.training.inputs import held_out_batches

    workdir = _distilled(args, root, changed)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    curve = [{k.removeprefix("val/"): v for k, v in row.items()} for row in rows if "val/explained" in row]
    if args.computed:
        return {"curve": curve}
    settings = Settings.of(_config(args, "distill.py", {**_extracted(args, root), **changed}))
    windows = _features(args).with_name(f"{_features(args).name}_unlabelled")
    held_out, _ = held_out_batches(settings.data, settings.eval_batch_size)
    return {"curve": curve, "position": position.shares(settings, windows, held_out)}


def _scores(args: argparse.Namespace, config, workdir: pathlib.Path) -> dict:
    """By area, and of all together: confusion matrix, mIoU and IoU per class."""
    import numpy as np

    from ktda_jax.config.settings import Settings
    from ktda_jax.training import evaluate
    from ktda_jax.training.checkpoint import Checkpoints
    from ktda_jax.training.inputs import eval_source
    from ktda_jax.training.program import build

    settings = Settings.of(config)
    program = build(settings, teacher=False, initial=False)
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        current, _ = checkpoints.restore(checkpoints.latest_step(), program.abstract, program.shardings)
    frozen, confusions = program.teacher() if settings.encodes else None, {}
    for area in draws.SETS[args.set][2]:
        batches, *_ = eval_source(settings.data, area, settings.eval_batch_size)
        params = current.params if current.ema is None else current.ema
        confusions[area] = evaluate.evaluate(
            program.eval_step, params, current.batch_stats, batches, program.mesh,
            num_classes=settings.data.info.num_classes, frozen=frozen,
        ).confusion  # fmt: skip
    return _summaries({**confusions, "all": np.sum(list(confusions.values()), 0)})


def _summaries(confusions: dict) -> dict:
    from ktda_jax.metrics.confusion import summarize

    found = {}
    for area, confusion in confusions.items():
        metrics = summarize(confusion)
        iou = [None if x != x else round(float(x), 3) for x in metrics.per_class["IoU"]]
        found[area] = {"mIoU": round(metrics.summary["mIoU"], 4), "IoU": iou, "confusion": confusion.tolist()}
    return found


def _probe(args: argparse.Namespace, root: pathlib.Path, layer: int | None) -> dict:
    """A linear probe of one layer of the frozen teacher, or of mean colours (None), the penalty as chosen before."""
    import numpy as np

    from benchmarks.evidence import probe

    tiles, names = {}, {}
    for split in ("train", *draws.SETS[args.set][2]):
        names[split] = [path.stem for path in sorted((root / "img_dir" / split).iterdir())]
        tiles |= {n: tuple(root / kind / split / f"{n}.png" for kind in ("img_dir", "ann_dir")) for n in names[split]}
    if layer is None:
        taps = probe.colours(tiles, 14)
    else:
        config = _config(args, "few_labels.py:10", {"model.teacher.taps": (layer,) * 4, "data.classes": "none"})
        taps = {name: found[0] for name, found in probe.features(config, tiles).items()}
    options = dict(patch=14, num_classes=len(draws.SETS[args.set][0].split(",")), l2=1e-2)
    scored = {a: probe.run(taps, tiles, names["train"], names[a], **options) for a in draws.SETS[args.set][2]}
    return _summaries({**scored, "all": np.sum(list(scored.values()), 0)})


def _device() -> str:
    import jax

    return jax.devices()[0].device_kind


def _speed() -> float:
    """GFLOP/s of a 2,048 float32 product: what the seconds are to be read by."""
    import jax
    import jax.numpy as jnp

    x, product = jnp.ones((2048, 2048)), jax.jit(lambda a: a @ a)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        begun = time.monotonic()
        product(x).block_until_ready()
        times.append(time.monotonic() - begun)
    return round(2 * 2048**3 / min(times) / 1e9, 1)


if __name__ == "__main__":
    main()
