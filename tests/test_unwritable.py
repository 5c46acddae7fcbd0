"""Workdirs that cannot be made or written to, and full disks: one line, and what can be done all the same is done."""

import errno
import os
import pathlib
import tempfile

import pytest
import runs

from ktda_jax import UserError
from ktda_jax.training import loop


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


def test_a_workdir_that_cannot_be_made_is_one_line(toy, tiles, tmp_path):
    toy()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir=.*file: File exists"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "file")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("")
    with pytest.raises(UserError, match="cannot write to --workdir=.*run/checkpoints: Not a directory"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")


def test_a_workdir_that_can_be_written_no_more_is_one_line_before_anything_else(toy, tiles, tmp_path, monkeypatch):
    def refuse(**_):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(loop, "build", pytest.fail)
    with pytest.raises(UserError, match="cannot write to --workdir=.*: Read-only file system"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path)


@pytest.mark.parametrize("locked", ["run", "run/figures", "run/metrics.jsonl"])
def test_what_cannot_be_written_to_is_evaluated_all_the_same(toy, tiles, tmp_path, monkeypatch, capsys, locked):
    """Somebody else's workdir, say: that nothing will be written is said at once, and the scores are printed."""
    toy(figures=True)
    loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}

    def only_elsewhere(original):
        def make(*arguments, dir=None, **options):
            if tmp_path / locked in (dir, *arguments):
                raise OSError(errno.EROFS, "Read-only file system")
            return original(*arguments, **({"dir": dir} if dir else {}), **options)

        return make

    with monkeypatch.context() as patch:  # root may write where others may not
        patch.setattr(tempfile, "TemporaryFile", only_elsewhere(tempfile.TemporaryFile))
        patch.setattr(pathlib.Path, "open", only_elsewhere(pathlib.Path.open))
        result = loop.evaluate_workdir(runs.config(tiles, {"data.test_split": "train"}), tmp_path / "run")
    said = capsys.readouterr().out
    line = f"warning: cannot write to {tmp_path / locked}: Read-only file system; the scores are printed, and nothing"
    _, scores = said.split(line)
    assert "train split, step 6:" in scores and f"mIoU {result.metrics.summary['mIoU']:.2f}" in scores
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}


@pytest.mark.parametrize("file", ["config.json", "run.json", "metrics.jsonl", "val_confusion.png", "val.json"])
def test_a_full_disk_is_one_line(toy, tiles, tmp_path, monkeypatch, file):
    """Nothing half-written stays, and the same command goes on."""

    def full(original):
        def replace(source, target, *arguments):
            if str(target).endswith(file):
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(source, target, *arguments)

        return replace

    toy(figures=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full(os.replace))
        if file == "metrics.jsonl":
            patch.setattr(loop.Writer, "_open", lambda self: full(open)(None, self._rows_path))
        with pytest.raises(
            UserError, match=r"cannot write .*: No space left on device; make room, and the same command"
        ):
            loop.train_and_evaluate(runs.config(tiles), tmp_path)
    toy(figures=True)
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    assert (tmp_path / "figures" / "val.json").exists() and not list(tmp_path.glob("*.tmp"))
