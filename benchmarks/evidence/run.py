"""Does KTDA help? Ablations (configs/ablations.py) over folds, seeds and shares of the labels: one table, one figure.

    python benchmarks/evidence/run.py --data=DIR --teacher=weights/dinov2s --output=results/evidence
    python benchmarks/evidence/run.py ... --names=student,full,scaled,probe --labels=25,100 --seeds=0,1
    python benchmarks/evidence/run.py ... --names=student,scaled,probe --choose  # hyper-parameters, before scoring

DIR holds tiles named BIOME_SCENE_NUMBER in img_dir/*/ and ann_dir/*/, whose splits are ignored: folds are made here
(folds.py). Every run trains on the other folds and is scored once, at its last step, on its own: no checkpoint is
selected by its score. The names `probe...` are linear probes (probe.py).

A finished run is known by its result.json and a hash of all that decides it; the same command leaves it alone, and
begins a run that was stopped again. `--choose` runs CANDIDATES (choice.py) for every scored fold on folds that are not
scored (trains on all but it and the next one, validates on the next one) and writes OUTPUT/choice.json, which scoring
then reads; a name that nothing was chosen for runs as configured.
"""

import argparse
import ast
import gc
import hashlib
import itertools
import json
import math
import os
import pathlib
import runpy
import shutil
import sys
import time
from importlib import metadata

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # where `benchmarks` is, for a start by path

from benchmarks.evidence import choice as choices
from benchmarks.evidence import folds as fold_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
ABLATIONS = runpy.run_path(str(ROOT / "configs" / "ablations.py"))
# Linear probes: of all four taps of the teacher, of each alone, and of the mean colour for comparison.
PROBES = {"probe": slice(None), **{f"probe_tap{k}": slice(k, k + 1) for k in range(4)}, "probe_colour": None}
NAMES = (*ABLATIONS["ABLATIONS"], *PROBES)
PROBE = {"l2": 1e-2}
RESULT, CHOICE = "result.json", "choice.json"


class Stopped(Exception):
    """A signal ended a run; the same command goes on."""


class Study:
    """The tiles, their folds and what all runs share."""

    def __init__(self, args: argparse.Namespace):
        from ktda_jax.data.datasets import dataset_info

        self.args, self.output = args, args.output
        self.classes = dataset_info(args.dataset).classes
        self.tiles = fold_files.find_tiles(args.data)
        self.counts = fold_files.count_classes(self.tiles, len(self.classes))
        self.fold_of = fold_files.assign(self.counts, args.folds)
        self.fingerprint = fold_files.fingerprint(self.tiles)
        self.teacher = fold_files.digest_of(args.teacher)
        # What a choice is made for, and so where it may be used.
        self.terms = {
            "folds": self.fold_of, "tiles": self.fingerprint, "teacher": self.teacher, "published": args.published,
            "set": {k: str(v) for k, v in args.set.items()},
        }  # fmt: skip
        self.size = fold_files.size(self.tiles)
        self.taps = None  # of all tiles, once the probe needs them

    def of_folds(self, wanted) -> list[str]:
        return [name for name, fold in self.fold_of.items() if fold in wanted]

    def training_part(self, without, percent: int, seed: int) -> list[str]:
        """`percent` of the tiles of all folds but `without`; which ones, the seed decides."""
        names = self.of_folds(set(range(self.args.folds)) - set(without))
        fold_files.check_classes(names, self.counts, f"what remains without folds {sorted(without)}")
        return fold_files.fewer(names, self.counts, percent, seed)

    def config(self, name: str, overrides: dict, seed: int):
        """The ablation's config, but for where its tiles are; a probe's is that of `full`, which names the teacher."""
        argument = "full" if name in PROBES else name
        config = ABLATIONS["get_config"](f"{argument},{'base' if self.args.published else 'small'}")
        sizes = {k: v for k, v in overrides.items() if k not in PROBE}
        try:
            config.lock().update_from_flattened_dict({**self.args.set, **sizes})
        except (KeyError, TypeError) as error:
            raise ValueError(f"--set or --candidates: {str(error.args[0]).splitlines()[0]}") from error
        config.data.name, config.seed, config.weights.teacher = self.args.dataset, seed, str(self.args.teacher)
        config.data.train_split, config.data.val_split, config.data.test_split = "train", "val", None
        if self.args.published or name in PROBES:  # whole tiles
            config.data.crop = config.model.teacher.image_size = self.size
        config.eval_every = config.total_steps  # scored once: a best checkpoint would be selected on the scored tiles
        return config

    def measure(self, name: str, place: str, *, train: list, val: list, seed: int, overrides: dict) -> dict:
        """The result of one run, from its file if it is there."""
        from ktda_jax.config.fields import flat
        from ktda_jax.config.settings import Settings
        from ktda_jax.config.workdir import flatten, write_json

        probes = name in PROBES
        config = self.config(name, overrides, seed)
        cut = None if self.args.published or probes else min(config.data.crop)
        tiles = hashlib.sha256(json.dumps([train, val, cut, self.fingerprint]).encode()).hexdigest()[:10]
        config.data.root = str(self.output / "tiles" / tiles)
        if config.teacher.mode == "precomputed":
            size = "x".join(map(str, config.data.crop))
            config.teacher.features = str(self.output / "features" / f"{tiles}-{self.teacher[:10]}-{size}")
        lasting = flat(Settings.of(config), runtime=False)
        decides = {k: v for k, v in flatten(json.loads(config.to_json_best_effort())).items() if k in lasting}
        decides = {k: v for k, v in decides.items() if not k.startswith("weights.")}
        if config.distill or config.model.encoder == "teacher" or probes:
            decides["teacher"] = self.teacher
        if probes:
            decides |= {**PROBE, **overrides}
        decides |= {"name": name, "train": train, "val": val, "tiles": self.fingerprint}
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
        workdir = self.output / "runs" / f"{place}-{digest[:10]}"
        path = workdir / RESULT
        if path.exists():
            return json.loads(path.read_text())
        if self.args.collect:
            return {}
        print(f"== {place}", flush=True)
        shutil.rmtree(workdir, ignore_errors=True)  # of a run that was stopped; its time would not be that of a run
        workdir.mkdir(parents=True)
        if probes:  # which read the tiles where they are
            found = self._probe(name, config, train, val, {**PROBE, **overrides})
        else:
            fold_files.write_folder(pathlib.Path(config.data.root), self.tiles, train, val, cut)
            found = _train(config, workdir)
        result = {
            "name": name, "seed": seed, "overrides": overrides, "train": train, "val": val, "digest": digest,
            "date": time.strftime("%Y-%m-%d"), "versions": {p: metadata.version(p) for p in ("jax", "flax", "numpy")},
            **found,
        }  # fmt: skip
        write_json(path, result)
        if not self.args.keep_checkpoints:
            shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        return result

    def _probe(self, name: str, config, train: list, val: list, settings: dict) -> dict:
        import jax
        import numpy as np

        from benchmarks.evidence import probe
        from ktda_jax.config.model import model_of
        from ktda_jax.config.settings import Settings
        from ktda_jax.plan import flops

        model = model_of(Settings.of(config))
        patch, classes = model.teacher.patch, len(self.classes)
        if name == "probe_colour":
            features, teacher = probe.colours(self.tiles, patch), 0
        else:
            if self.taps is None:
                self.taps = probe.features(config, self.tiles)
            features = {n: np.concatenate(taps[PROBES[name]], -1) for n, taps in self.taps.items()}
            teacher = flops.of_model(model, self.size)["teacher"]  # of all its layers, whichever tap is used
        start = time.perf_counter()
        confusion = probe.run(features, self.tiles, train, val, patch=patch, num_classes=classes, **settings)
        seconds = time.perf_counter() - start
        height, width, channels = features[val[0]].shape
        head = 2 * height * width * channels * classes
        return {
            "confusion": confusion.tolist(),
            "seconds": seconds,
            "compile_s": 0.0,
            "steps": 0,
            "parameters": (channels + 1) * classes,
            "frozen": _frozen(model) if teacher else 0,
            "inference_gflop": (teacher + head) / 1e3 / math.prod(self.size),
            "device": jax.devices()[0].device_kind,
        }


def _frozen(model) -> int:
    """Parameters of the teacher."""
    from flax import nnx

    from ktda_jax.models import flat
    from ktda_jax.models.vit import ViT

    return flat.count(flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))[1])


def _train(config, workdir: pathlib.Path) -> dict:
    """Trains in this process and scores the last step. Parameters are those that inference needs."""
    import jax
    from flax import nnx

    from ktda_jax import extract
    from ktda_jax.config.model import model_of
    from ktda_jax.config.settings import Settings
    from ktda_jax.models import flat
    from ktda_jax.models.ktda import KTDA
    from ktda_jax.plan import flops
    from ktda_jax.training import loop

    if config.distill and config.teacher.mode == "precomputed":
        extract.run(config)
    _COMPILED.clear()
    start = time.perf_counter()
    result = loop.train_and_evaluate(config, workdir)
    seconds = time.perf_counter() - start
    if result is None:
        raise Stopped
    model = model_of(Settings.of(config))
    operations = flops.of_model(model, tuple(config.data.crop), distill=False)
    params = flat.abstract(lambda: KTDA(model, rngs=nnx.Rngs(0)))[1]
    found = {
        "confusion": result.confusion.tolist(),
        "seconds": seconds,
        "compile_s": sum(_COMPILED),  # XLA's alone; reading its cache counts, tracing does not
        "steps": config.total_steps,
        "parameters": flat.count({k: v for k, v in params.items() if not k.startswith("auxiliary_head/")}),
        "frozen": _frozen(model) if model.encoder == "teacher" else 0,
        "inference_gflop": operations["inference"] / 1e3 / math.prod(config.data.crop),  # of a megapixel
        "device": jax.devices()[0].device_kind,
    }
    jax.clear_caches()  # every run compiles programs of its own
    gc.collect()
    return found


_COMPILED = []


def _prepare_jax(output: pathlib.Path) -> None:
    """Compiled programs are shared by the folds of an ablation and by later calls."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(output / "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: name == event and _COMPILED.append(seconds)
    )


def score(study: Study, choice: dict) -> list[dict]:
    """All runs, in an order that gives whole columns of the table early."""
    args, results = study.args, []
    for seed, percent, name, fold in itertools.product(args.seeds, args.labels, args.names, range(args.folds)):
        overrides = choices.overrides_for(name, fold, choice)
        result = study.measure(
            name, f"{name}_{percent}/fold{fold}_seed{seed}", seed=seed, overrides=overrides,
            train=study.training_part({fold}, percent, seed), val=study.of_folds({fold}),
        )  # fmt: skip
        if result:
            results.append({**result, "fold": fold, "percent": percent})
    return results


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments; what is wrong with them ends the program with one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument("--data", required=True, type=pathlib.Path)
    parser.add_argument("--teacher", required=True, type=pathlib.Path, help="weights, as config.weights.teacher")
    parser.add_argument("--output", required=True, type=pathlib.Path)
    parser.add_argument("--dataset", default="l8_biome", help="whose classes they are")
    parser.add_argument("--names", default=list(NAMES), type=lambda text: text.split(","), help=", ".join(NAMES))
    parser.add_argument("--labels", default=[100], type=numbers, help="per cent of the training tiles: 25,50,100")
    parser.add_argument("--seeds", default=[0, 1], type=numbers)
    parser.add_argument("--folds", default=4, type=int)
    parser.add_argument("--published", action="store_true", help="the published sizes, for an accelerator")
    parser.add_argument("--set", default=[], action="append", metavar="KEY=VALUE", help="for all: total_steps=300")
    parser.add_argument("--choose", action="store_true", help="choose hyper-parameters instead of scoring")
    parser.add_argument(
        "--candidates", default=choices.CANDIDATES, type=json.loads, help='of --choose: {"full": [{"KEY": VALUE}]}'
    )
    parser.add_argument("--inner", default=1, type=int, help="of --choose: inner folds per scored one")
    parser.add_argument("--collect", action="store_true", help="table and figure of what is finished; runs nothing")
    parser.add_argument("--keep_checkpoints", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(NAMES):
        sys.exit(f"error: --names={','.join(sorted(unknown))} is unknown; known: {', '.join(NAMES)}")
    if args.choose and (without := set(args.names) - set(args.candidates)):
        sys.exit(f"error: --choose has no candidates for {', '.join(sorted(without))}; give --candidates")
    if args.folds < 2 + args.choose or not 1 <= args.inner < args.folds:
        sys.exit(f"error: --folds={args.folds} --inner={args.inner}; give at least 2 folds, 3 to --choose, fewer inner")
    if not args.teacher.exists():
        sys.exit(f"error: no --teacher={args.teacher}; make it as benchmarks/evidence/LANDSAT24.md says")
    settings = {}
    for setting in args.set:
        key, sign, value = setting.partition("=")
        if not sign:
            sys.exit(f"error: --set={setting} is not KEY=VALUE")
        try:
            settings[key] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            settings[key] = value
    for name in set(args.names) & set(ABLATIONS["ABLATIONS"]):
        about = ABLATIONS["ABLATIONS"][name]
        if clash := sorted(key for key in settings.keys() & about.keys() if settings[key] != about[key]):
            sys.exit(f"error: --set={clash[0]} is what the ablation {name} is about; leave one of them out")
    args.set = settings
    args.output = args.output.absolute()
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    from absl import logging

    from ktda_jax.config.workdir import write_json

    logging.set_verbosity(logging.WARNING)
    _prepare_jax(args.output)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        study = Study(args)
        write_json(args.output / "folds.json", study.fold_of)
        path = args.output / CHOICE
        choice = choices.read(path, study.terms)
        if args.choose:
            chosen = choices.choose(study)
            # Read again: meanwhile another process may have chosen for other names.
            write_json(path, {"made_for": study.terms, "chosen": {**choices.read(path, study.terms), **chosen}})
            print(f"the choice is in {path}")
            return
        results = score(study, choice)
        if not results:
            sys.exit(f"error: no finished run in {args.output}")
        from benchmarks.evidence import table

        table.write(results, args.output, study.classes, command=" ".join(["python", *sys.argv]))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except (Stopped, KeyboardInterrupt):
        sys.exit("error: stopped; the same command goes on")


if __name__ == "__main__":
    main(sys.argv[1:])
