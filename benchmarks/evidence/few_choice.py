"""Which rows are run, and which settings they get: written down before areas 3 and 6 are scored.

    python benchmarks/evidence/few_choice.py choose              > choose.txt   # queues for few_gpu.sh
    python benchmarks/evidence/few_choice.py final --rows=DIR    > final.txt

Chosen on 2026-11-27, before anything of areas 3 and 6 was scored: `frozen` with the linear head (34.4, 35.9 and 35.6
on area 4) after the 1,000 steps of configs/distill.py, against the better of the two students. Fine-tuning at a tenth
of the rate gave 25.6 in draw 1 where frozen gave 35.9, and was not followed further. What TRIED lists besides was begun
on a GPU whose time ran out. `published` takes the student's learning rate.

The rule: of each kind of row the settings with the highest mIoU on area 4 in the mean over three draws; and of
all kinds that distil first the best one is compared at 8, 32 and all labels.
"""

import argparse
import json
import pathlib

import numpy as np

CHOOSE_DRAWS, FINAL_DRAWS, OTHER_DRAWS = range(3), range(5), range(3)
LONG = ("distill:total_steps=5000", "distill:eval_every=500", "distill:schedule.warmup=100")
LINEAR = ("model.head=linear", "model.aux_channels=0")
GENTLE = ("optimizer.student_lr_mult=0.1",)
FROZEN = ("optimizer.student_lr_mult=0.0",)

# What is tried: kind: (row, changes) ...
TRIED = {
    "student": [("student", ()), ("student", LINEAR), ("student", ("total_steps=2000",))],
    "published": [("published", ()), ("published", ("optimizer.lr=0.002",))],
    "distilled": [
        ("frozen", (*LINEAR, *LONG)),
        ("frozen", LINEAR),
        ("frozen", LONG),
        ("distilled", (*LINEAR, *GENTLE, *LONG)),
        ("distilled", (*LINEAR, *GENTLE)),
        ("distilled", (*GENTLE, *LONG)),
        ("distilled", ()),
        ("distilled", LONG),
    ],
    "unlabelled": [
        ("unlabelled", (*LINEAR, *GENTLE)),
        ("unlabelled", (*LINEAR, *GENTLE, *LONG)),
        ("unlabelled", (*LINEAR, *LONG)),
        ("unlabelled", LONG),
    ],
    "semi": [("semi", (*LINEAR, *FROZEN, *LONG)), ("semi", (*LINEAR, *GENTLE, *LONG))],
    "labelled": [("labelled", ()), ("labelled", LINEAR)],
    "teacher": [("teacher", ()), ("teacher", LINEAR)],
}
FIRST = ("distilled", "unlabelled", "semi")  # the kinds that distil first


def arguments(name: str, labels: int, draw: int, row: str, changes) -> str:
    return " ".join([f"--set={name} --labels={labels} --draw={draw} --row={row}", *(f"--with={c}" for c in changes)])


def distillations(name: str, changes) -> str:
    changes = [c.removeprefix("distill:") for c in changes if c.startswith("distill:")]
    return arguments(name, 0, 0, "distillation", changes)


def choose() -> list[str]:
    lines = [distillations("choose", LONG), distillations("choose", ()), distillations("final", LONG)]
    alone = [k for k in TRIED if k not in FIRST]
    for kinds in (alone, FIRST):
        for draw in CHOOSE_DRAWS:  # one after the other, so that those of one program do not all compile it
            lines += [arguments("choose", 16, draw, *tried) for kind in kinds for tried in TRIED[kind]]
        lines.append("wait")
    return lines[:-1]


def chosen(rows: pathlib.Path) -> dict[str, tuple[float, str, tuple]]:
    """{kind: (mIoU on area 4, row, changes)} of the best; rows that were not run in every draw do not count."""
    scores = {}
    for path in rows.glob("choose_16_*.json"):
        row = json.loads(path.read_text())
        key = row["row"], tuple(sorted(f"{k}={v}" for k, v in row["changed"].items()))
        scores.setdefault(key, {})[row["draw"]] = row["scores"]["all"]["mIoU"]
    found = {}
    for kind, tried in TRIED.items():
        for row, changes in tried:
            by_draw = scores.get((row, tuple(sorted(changes))), {})
            if set(CHOOSE_DRAWS) <= by_draw.keys():
                mean = float(np.mean([by_draw[d] for d in CHOOSE_DRAWS]))
                found[kind] = max(found.get(kind, (-1.0, "", ())), (mean, row, changes))
    return found


def final(rows: pathlib.Path) -> list[str]:
    best = chosen(rows)
    kinds = [k for k in ("student", "published", "distilled", "unlabelled", "labelled", "teacher") if k in best]
    first = max((k for k in FIRST if k in best), key=lambda k: best[k])
    if first == "semi":
        kinds.append("semi")
    lines = [distillations("final", best[k][2]) for k in dict.fromkeys((*kinds, first)) if k in FIRST]
    lines = [*dict.fromkeys(lines), "wait"]
    pair = ("student", first)
    for draw in FINAL_DRAWS:
        lines += [arguments("final", 16, draw, *best[k][1:]) for k in kinds]
    for draw in OTHER_DRAWS:
        lines += [arguments("final", labels, draw, *best[k][1:]) for labels in (8, 32) for k in pair]
    for kind in pair:
        changes = [c for c in best[kind][2] if not c.startswith("total_steps")]
        lines.append(arguments("final", 0, 0, best[kind][1], (*changes, "total_steps=3000")))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("queue", choices=("choose", "final"))
    parser.add_argument("--rows", type=pathlib.Path, default=pathlib.Path(__file__).parent / "rows")
    args = parser.parse_args()
    print("\n".join(choose() if args.queue == "choose" else final(args.rows)))


if __name__ == "__main__":
    main()
