"""benchmarks/evidence/students.py: rows that cannot be are named and the others run; the table's numbers by hand."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import runs

from benchmarks.evidence import students
from ktda_jax.weights import folder

TINY = {
    "student.preset": "None", "student.depths": (0, 0, 0, 1), "student.channels": (8, 8, 16, 16), "teacher.patch": 16,
    "teacher.preset": "None", "teacher.width": 16, "teacher.depth": 4, "teacher.heads": 2, "teacher.rope": True,
    "neck_channels": 16, "head_channels": 16, "aux_channels": 0, "fmm.form": "mlp", "fmm.blocks": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


def call(tiles, output, *flags, **settings):
    size = {"data.crop": (64, 64), "model.teacher.image_size": (64, 64), **{f"model.{k}": v for k, v in TINY.items()}}
    changes = [f"--set={key}={value}" for key, value in {**size, "batch_size": 4, "mesh.data": 1, **settings}.items()]
    command = [sys.executable, "benchmarks/evidence/students.py", f"--data={tiles}", f"--output={output}"]
    command += ["--classes=a,b,c,d,e", "--seeds=0", *flags, *changes]
    return subprocess.run(command, cwd=runs.REPOSITORY, capture_output=True, text=True, env=dict(os.environ))


def test_what_cannot_be_had_stands_in_the_table(tiles, tmp_path):
    (tmp_path / "empty").mkdir()
    done = call(
        tiles, tmp_path / "out", "--starts=imagenet,dinov3", "--rows=student,distilled,frozen", "--steps=2",
        "--imagenet=/nowhere", f"--dinov3={tmp_path / 'empty'}", f"--teacher={tmp_path / 'gone.pth'}",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    lines = (tmp_path / "out" / "table.md").read_text().splitlines()[2:]
    assert len(lines) == 5 and all("not run: config.weights." in line for line in lines), lines
    assert "no file or folder /nowhere" in lines[0] and "gone.pth" in lines[-1]


def test_mistyped_rows():
    done = subprocess.run(
        [sys.executable, "benchmarks/evidence/students.py", "--data=x", "--classes=a", "--rows=studnet"],
        cwd=runs.REPOSITORY, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "studnet; known: student, ktda, distilled, frozen" in done.stderr


def test_the_table_pairs_by_seed():
    def row(start, name, seed, score):
        return {"start": start, "row": name, "seed": seed, "mIoU": score}

    rows = [row("nothing", "student", seed, 10.0 + seed) for seed in range(3)]
    rows += [row("dinov3", "student", seed, 20.0) for seed in range(3)]
    rows += [row("dinov3", "ktda", seed, 21.0 + seed) for seed in (1, 2)] + [row("teacher", "frozen", 0, 30.0)]
    lines = students.table(rows, {("imagenet", "ktda"): "no such file"}).splitlines()[2:]
    se = np.std([2.0, 3.0], ddof=1) / np.sqrt(2)
    assert lines == [
        f"| nothing | student | 3 | 11.00 ± {1 / np.sqrt(3):.2f} |  |  |",
        "| imagenet | ktda | 0 | not run: no such file | | |",
        f"| dinov3 | student | 3 | 20.00 ± 0.00 |  | +9.00 ± {1 / np.sqrt(3):.2f} |",
        f"| dinov3 | ktda | 2 | 22.50 ± {se:.2f} | +2.50 ± {se:.2f} | +11.00 ± 0.00 |",
        "| the teacher, frozen | frozen | 1 | 30.00 |  | +20.00 |",
    ]


@pytest.mark.slow
def test_rows_are_trained_and_left_alone(tiles, tmp_path):
    """A teacher of random weights stands in for DINOv3: the numbers mean nothing, the rows do."""
    settings = runs.settings(tiles, {f"model.{k}": None if v == "None" else v for k, v in TINY.items()})
    arrays = runs.random_teacher(runs.config(tiles, {f"model.{k}": v for k, v in TINY.items() if v != "None"}))
    from ktda_jax.config.model import model_of

    teacher = model_of(settings).teacher
    folder.save(tmp_path / "teacher", folder.Weights("teacher", teacher, arrays, {}))
    flags = ("--starts=nothing", f"--teacher={tmp_path / 'teacher'}", "--steps=2", "--distill_steps=2")
    done = call(tiles, tmp_path / "out", *flags)
    assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert sorted(found) == ["nothing_distilled_0", "nothing_ktda_0", "nothing_student_0", "teacher_frozen_0"]
    assert all(np.isfinite(row["mIoU"]) and len(row["IoU"]) == 5 for row in found.values())
    again = call(tiles, tmp_path / "out", *flags)
    other = call(tiles, tmp_path / "out", *flags, batch_size=2)
    assert other.returncode == 1 and "was made with other settings" in other.stderr and "Traceback" not in other.stderr
    assert again.returncode == 0 and "seed 0" not in again.stdout and "| nothing | distilled | 1 |" in again.stdout
