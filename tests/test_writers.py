"""The record of a run survives kills and resumes; the bar fits its terminal and stays out of log files."""

import errno
import io
import json
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboardX import record_writer
from tensorboardX.proto.event_pb2 import Event, SessionLog

from ktda_jax import UserError
from ktda_jax.training import writers


class Terminal(io.StringIO):
    """A stream that says it is a terminal, and `screen`: what one would show (carriage returns applied)."""

    def isatty(self):
        return True

    def screen(self):
        lines = []
        for line in self.getvalue().split("\n"):
            cells = ""
            for part in line.split("\r"):
                cells = part + cells[len(part) :]
            lines.append(cells.rstrip())
        return lines


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves by hand: `clock[0]` in seconds."""
    now = [100.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    return now


def strict_rows(path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def events(workdir):
    """All events in the workdir's event files, in TFRecord framing: length, crc, payload, crc."""
    for path in sorted(workdir.glob("events.*")):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def test_rows_are_strict_json_and_on_disk_at_once(tmp_path):
    with writers.Writer(tmp_path / "new", total_steps=9, stream=io.StringIO()) as writer:
        writer.write(1, {"train/loss": np.float32(0.5), "train/aux": float("nan"), "lr": np.inf})
        writer.write(2, {"train/loss": 1})
        rows = strict_rows(tmp_path / "new" / "metrics.jsonl")  # not closed yet
    first, second = rows
    assert first == {"step": 1, "train/loss": 0.5, "train/aux": None, "lr": None}
    assert second == {"step": 2, "train/loss": 1.0}


def test_step_is_no_scalar_name(tmp_path):
    with writers.Writer(tmp_path, total_steps=9) as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 3})


def test_tensorboard_events(tmp_path):
    with writers.Writer(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        writer.write(3, {"val/mIoU": 51.5, "val/mAcc": float("nan")})
    found = [(e.step, v.tag, v.simple_value) for e in events(tmp_path) for v in e.summary.value]
    assert found == [(3, "val/mIoU", 51.5)]


@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 5, "loss": 1}'])
def test_resume_drops_what_the_killed_run_reported_after_its_checkpoint(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {step}, "loss": 0.1}}\n' for step in (1, 2, 3, 4)) + tail)
    with writers.Writer(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
        assert writer.resume(2) == 2 + bool(tail)
        assert [row["step"] for row in strict_rows(path)] == [1, 2]
        writer.write(3, {"loss": 7.0})
        with pytest.raises(RuntimeError, match="before the first write"):
            writer.resume(2)
    assert [row["step"] for row in strict_rows(path)] == [1, 2, 3]
    names = sorted(p.name.split(".")[0] for p in tmp_path.iterdir())
    assert names == ["events", "metrics"]  # nothing temporary
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert starts == [3]  # TensorBoard hides older events from step 3 on


def test_resume_leaves_a_good_file_untouched_and_needs_none(tmp_path):
    writer = writers.Writer(tmp_path, total_steps=9)
    assert writer.resume(4) == 0
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 4, "loss": 0.1}\n')
    before = path.stat()
    assert writer.resume(4) == 0
    assert path.stat().st_ino == before.st_ino and path.stat().st_mtime_ns == before.st_mtime_ns


def test_writing_after_a_line_cut_short_without_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    with writers.Writer(tmp_path, total_steps=9) as writer:
        writer.write(2, {"loss": 1.0})
    assert [row["step"] for row in strict_rows(path)] == [1, 2]


def test_other_processes_write_nothing(tmp_path):
    stream = Terminal()
    with writers.Writer(tmp_path, total_steps=9, enabled=False, stream=stream) as writer:
        writer.resume(0)
        writer.write(1, {"loss": 1.0})
        writer.progress(1, {"loss": 1.0})
        writer.pause()
        writer.message("hello")
    assert not list(tmp_path.iterdir()) and not stream.getvalue()


@pytest.mark.parametrize("columns", [200, 100, 60, 40, 12])
def test_bar_fits_the_terminal_and_messages_stand_above_it(tmp_path, monkeypatch, clock, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    with writers.Writer(tmp_path, total_steps=2300, stream=stream) as writer:
        for step in range(1, 24):
            scalars = {"loss": 1.23456 / step, "decode": 1.0, "aux": 2.0, "val/mIoU": 51.239}
            writer.progress(step * 50, scalars)
            clock[0] += 25.0
            if step == 10:
                writer.message("saved a checkpoint")
    screen = stream.screen()
    assert screen[0] == "saved a checkpoint" and len(screen) == 3 and screen[2] == ""
    assert all(len(part) < columns for line in stream.getvalue().split("\n")[1:] for part in line.split("\r"))
    bar = screen[1]
    assert bar.startswith("1150/2300")
    if columns >= 60:
        # 50 steps every 25 s, 1150 steps left; closing counts the 25 s since the last call in.
        assert "[=" in bar and ">" in bar and " 50%" in bar and "2.0 step/s" in bar and "ETA 0:10:" in bar
    assert ("loss 0.05368" in bar) == (columns >= 100) and ("val/mIoU 51.24" in bar) == (columns >= 200)


def test_redraws_are_limited_but_the_last_state_is_shown(tmp_path, clock):
    stream = Terminal()
    with writers.Writer(tmp_path, total_steps=10_000, stream=stream) as writer:
        for step in range(1, 1001):
            clock[0] += 0.001
            writer.progress(step)
    assert stream.screen()[0].startswith(" 1000/10000")
    assert stream.getvalue().count("/10000") < 15


def test_plain_lines_elsewhere(tmp_path, clock):
    """And it is known before which steps are shown: others need no scalars."""
    stream, due = io.StringIO(), []
    with writers.Writer(tmp_path, total_steps=100, stream=stream) as writer:
        for step in range(1, 101):
            due += [step] if writer.due(step) else []
            writer.progress(step, {"loss": 0.5} if writer.due(step) else None)
            clock[0] += 1.0
        writer.message("done")
    assert due == [*range(1, 100, 10), 100] and not writers.Writer(tmp_path, total_steps=9, enabled=False).due(9)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 12  # the first, one every ten seconds, the last, the message
    assert lines[-1] == "done" and "\r" not in stream.getvalue()
    assert lines[3] == " 31/100   31%  1.0 step/s  ETA 0:01:09  loss 0.5"


def test_slow_steps_read_as_seconds_and_pauses_do_not_count(tmp_path, clock):
    stream = io.StringIO()
    writer = writers.Writer(tmp_path, total_steps=100, stream=stream)
    for step in range(1, 4):
        writer.progress(step)
        clock[0] += 40.0
    writer.pause()
    clock[0] += 1000.0
    for step in range(4, 7):
        writer.progress(step)
        clock[0] += 40.0
    assert all("40.0 s/step" in line for line in stream.getvalue().splitlines()[1:])


def test_text_that_the_stream_cannot_encode(tmp_path):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    writers.Writer(tmp_path, total_steps=1, stream=stream).message("prairie élevée")
    assert raw.getvalue() == b"prairie ?lev?e\n"


def test_writing_loads_no_tensorflow(tmp_path):
    code = (
        "import sys; from ktda_jax.training.writers import Writer\n"
        f"with Writer({str(tmp_path)!r}, total_steps=1) as w: w.write(1, {{'a': 1.0}})\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_full_disk_under_tensorboards_thread_is_one_line_too(tmp_path, monkeypatch, capfd):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write():
        with writers.Writer(tmp_path, total_steps=9, stream=io.StringIO()) as writer:
            writer.write(1, {"loss": 1.0})
            monkeypatch.setattr(record_writer.RecordWriter, "write", full)
            for step in range(2, 1000):
                writer.write(step, {"loss": 1.0})
                time.sleep(0.01)

    hook = threading.excepthook
    with pytest.raises(UserError, match=r"cannot write .*events.*: No space left on device; make room"):
        write()
    assert capfd.readouterr().err == "" and threading.excepthook is hook
