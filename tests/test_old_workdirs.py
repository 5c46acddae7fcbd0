"""A training that an older version began (goldens/workdir_c7d256a.tar.xz): it goes on, maps and reports.

Its config.json has no version and lacks every setting that came later; what those then mean is `absent` in settings.py.
"""

import json
import tarfile

import numpy as np
import pytest
import runs

import ktda_jax
from ktda_jax import UserError, report
from ktda_jax.config import workdir as records
from ktda_jax.config.fields import flat
from ktda_jax.config.settings import VERSION, Settings
from ktda_jax.training import loop

STORED = runs.REPOSITORY / "tests" / "goldens" / "workdir_c7d256a.tar.xz"


@pytest.fixture
def stored(tmp_path):
    """(workdir stopped at step 2 of 4, its config with tiles, what the old version wrote when it went on)."""
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    workdir = tmp_path / "workdir"
    config = json.loads((workdir / "config.json").read_text())
    config["data"]["root"], config["mesh"]["data"] = str(runs.make_tiles(tmp_path / "tiles")), 1
    finished = [json.loads(line) for line in (tmp_path / "finished.jsonl").read_text().splitlines()]
    return workdir, config, finished


@pytest.mark.slow
def test_it_goes_on_as_it_would_have(stored):
    workdir, config, finished = stored
    assert ktda_jax.load_pretrained(workdir).predict(np.zeros((64, 64, 3), np.uint8)).labels.shape == (64, 64)
    loop.train_and_evaluate(config, workdir)
    rows = runs.rows(workdir)
    assert [row["step"] for row in rows] == [row["step"] for row in finished] and rows[-1]["step"] == 4
    for ours, theirs in zip(rows, finished, strict=True):
        assert ours.pop("split", None) == theirs.pop("split", None)
        # A score in percent of five tiles jumps by a few thousandths where another JAX rounds a pixel the other way.
        scores = {key for key in theirs if key.startswith(("val/", "final/"))}
        assert all(key.startswith("final/") for key in ours.keys() - theirs.keys())  # newer versions tell more
        ours = {key: ours[key] for key in theirs}
        assert {k: ours.pop(k) for k in scores} == pytest.approx({k: theirs.pop(k) for k in scores}, abs=0.5)
        assert ours == pytest.approx(theirs, rel=1e-3)
    assert json.loads((workdir / "config.json").read_text())["version"] == VERSION
    assert report.run([str(workdir)], root=config["data"]["root"]).stat().st_size > 10_000


def test_other_settings_are_refused(stored):
    workdir, config, _ = stored
    config["model"]["teacher"]["taps"] = [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"another config: model.teacher.taps \(saved None, now \[1, 2, 3, 4\]\)"):
        loop.train_and_evaluate(config, workdir)


def test_what_is_written_is_read(tmp_path):
    settings = runs.settings(tmp_path, {"model.teacher.taps": (1, None, 2, 4), "clip_norm": 0.5})
    records.write(tmp_path, settings)
    assert records.read(tmp_path) == settings and flat(settings)["model.teacher.taps"] == [1, None, 2, 4]


def test_a_newer_workdir_is_told_from_a_broken_one(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"version": VERSION + 1}))
    with pytest.raises(UserError, match=r"settings of version 2, but this program knows 1; take a newer one"):
        records.read(tmp_path)
    with pytest.raises(UserError, match=r"config.sed is not a setting; known: seed"):
        Settings.of({"sed": 1})
    with pytest.raises(UserError, match=r"config.seed is missing; from which everything random comes"):
        Settings.of({})
