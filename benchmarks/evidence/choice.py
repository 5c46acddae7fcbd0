"""Hyper-parameters of the runs (run.py), chosen for every scored fold on folds that are not scored."""

import itertools
import json
import pathlib

import numpy as np

from benchmarks.evidence.table import miou

CANDIDATES = {
    "student": [{"optimizer.lr": lr} for lr in (3e-4, 1e-3)],
    "scaled": [{"loss.alpha": alpha} for alpha in (0.5, 0.0)],
    "probe": [{"l2": l2} for l2 in (1e-4, 1e-3, 1e-2, 1e-1)],
}


def choose(study) -> dict:
    """{name: {scored fold: {"overrides", "scores"}}}: the best candidate on folds that are not the scored one."""
    args, chosen = study.args, {}
    for name in args.names:
        candidates = args.candidates[name]
        scores = {fold: [[] for _ in candidates] for fold in range(args.folds)}
        # Candidates outermost: XLA's programs are the same for all folds of one.
        for (number, overrides), fold in itertools.product(enumerate(candidates), range(args.folds)):
            for inner in range(1, args.inner + 1):
                held = (fold + inner) % args.folds
                result = study.measure(
                    name, f"choice/{name}/fold{fold}_inner{held}", seed=args.seeds[0], overrides=overrides,
                    train=study.training_part((fold, held), 100, args.seeds[0]), val=study.of_folds({held}),
                )  # fmt: skip
                if result:
                    scores[fold][number].append(miou(result["confusion"]))
        if not all(found for of_fold in scores.values() for found in of_fold):
            raise ValueError(f"the choice of {name} is not complete; leave --collect out")
        chosen[name] = {}
        for fold, found in scores.items():
            means = [float(np.mean(values)) for values in found]
            chosen[name][str(fold)] = {
                "overrides": candidates[int(np.argmax(means))],
                "scores": [{**c, "mIoU": round(m, 2)} for c, m in zip(candidates, means, strict=True)],
            }
    return chosen


def overrides_for(name: str, fold: int, choice: dict) -> dict:
    """The overrides that were chosen, for any probe those of `probe`; none where there was no choice."""
    found = choice.get("probe" if name.startswith("probe") else name)
    return found[str(fold)]["overrides"] if found else {}


def read(path: pathlib.Path, terms: dict) -> dict:
    """What `--choose` wrote; ValueError if for other folds, tiles or settings, where it may have seen scored tiles."""
    if not path.exists():
        return {}
    saved = json.loads(path.read_text())
    if different := [key for key in terms if saved["made_for"].get(key) != terms[key]]:
        raise ValueError(f"{path} was made for other {', '.join(different)}; take another --output, or remove it")
    return saved["chosen"]
