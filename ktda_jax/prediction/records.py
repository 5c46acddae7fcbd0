"""What each of several processes has mapped: a file beside the maps for each, and one summary of all by the first.

A record is written anew every half minute, so that process 0, when it has mapped its own scenes, knows who is still at
work and who is dead. Nobody else reads them, and nobody waits while there is something to map.
"""

import contextlib
import itertools
import json
import os
import pathlib
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.prediction.outputs import TOKEN, remove_temporaries
from ktda_jax.training import lock

OFTEN = 1.0, 5.0  # seconds between two records of a process that maps many small scenes; in a bucket
LOOK = 0.5, 5.0  # seconds between two looks at the others; in a bucket
LAUNCH = "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"


class Record:
    """This process's own, as a context while it maps `scenes`; `failures` is the list that others append to."""

    def __init__(
        self, folder: pathlib.PurePath, index: int, count: int, *, scenes: int, skipped: int, failures: list[UserError],
        dealt: int, coordinator: str | None,
    ):  # fmt: skip
        """dealt: a checksum of the list of scenes, which must be the same in all processes."""
        self.folder, self.index, self.count, self._failures = folder, index, count, failures
        self.began, self._said = time.monotonic(), 0.0
        self.values = {
            **lock.this_process(), "token": TOKEN, "began": time.time(), "count": count, "dealt": dealt,
            "launch": [coordinator, *map(os.environ.get, LAUNCH)], "scenes": scenes, "skipped": skipped, "mapped": 0,
            "pixels": 0, "seconds": 0.0, "failures": [], "error": None, "ended": False,
        }  # fmt: skip
        self._before = _read(self.path(index))  # of a process that was killed, perhaps
        self._ended, self._writing = threading.Event(), threading.Lock()
        self._beating = threading.Thread(target=self._beat, name="record", daemon=True)

    def path(self, process: int) -> pathlib.PurePath:
        return self.folder / f".predict-{process:05}-of-{self.count:05}.json"

    @property
    def left(self) -> int:
        return _left(self.values | {"failures": self._failures})

    def mapped(self, pixels: int) -> None:
        """One more scene is."""
        self.values["mapped"] += 1
        self.values["pixels"] += pixels
        if time.monotonic() - self._said > OFTEN[buckets.is_remote(self.folder)]:
            self._said = time.monotonic()
            self.write()

    def write(self) -> None:
        with self._writing, contextlib.suppress(OSError):  # next time, perhaps
            if not self.values["ended"]:
                self.values["seconds"] = time.monotonic() - self.began
            found = self.values | {"failures": list(map(str, self._failures)), "beat": time.time()}
            if buckets.is_remote(self.folder):
                buckets.write_text(self.path(self.index), json.dumps(found))
                return
            temporary = self.folder / f".{TOKEN}.record.tmp"
            temporary.write_text(json.dumps(found))
            os.replace(temporary, self.path(self.index))

    def _beat(self) -> None:
        while not self._ended.wait(lock.HEARTBEAT):
            self.write()

    def __enter__(self) -> "Record":
        self.write()
        self._beating.start()
        return self

    def __exit__(self, kind, error, stack) -> None:
        self._ended.set()
        self._beating.join()
        self.values |= {
            "seconds": time.monotonic() - self.began, "error": str(error) if isinstance(error, UserError) else None,
            "ended": True,
        }  # fmt: skip
        self.write()
        if self._before and not self._before.get("ended") and lock.has_ended(self._before):
            remove_temporaries(self.folder, self._before.get("token"))


def _left(found: dict) -> int:
    return found["scenes"] - found["skipped"] - found["mapped"] - len(found["failures"])


def _read(path: pathlib.PurePath) -> dict[str, Any] | None:
    try:
        return json.loads(buckets.read_text(path))
    except (OSError, ValueError):
        return None


def gather(mine: Record, timeout: float, say: Callable[[str], None]) -> list[dict | None]:
    """The last record of each process, once it has ended or died; None of one that has not begun.

    That is, given no sign of life for `timeout` seconds, or for two minutes. What a process of a former run left undone
    says nothing. Removes all of them, and what the dead have begun to write.
    """
    silence = max(timeout, lock.DEAD)

    def ours(process: int) -> dict | None:
        found = _read(mine.path(process))
        if not found or any(found.get(key) != mine.values[key] for key in ("launch", "count")):
            return None
        lately = found["began"] >= mine.values["began"] - timeout and not found["ended"]
        through = found["ended"] and not _left(found)  # also if it was a former one: its scenes are there
        return found if through or lately or found["beat"] >= mine.values["began"] else None

    found = {process: ours(process) for process in range(1, mine.count)}
    seen = dict.fromkeys(found, time.monotonic())
    waiting, told = set(found), False
    while True:
        for process in sorted(waiting):
            known = found[process]
            # Asked before its last words are read; one that is long dead may be about to be started again.
            dead = known and known["began"] > mine.values["began"] - lock.DEAD and lock.has_ended(known)
            latest, now = ours(process), time.monotonic()
            if latest != found[process]:
                found[process], seen[process], dead = latest, now, False
            silent = now - (seen[process] if latest else mine.began) > silence
            if dead or silent or (latest and latest["ended"]):
                waiting.discard(process)
                if latest and not latest["ended"]:
                    remove_temporaries(mine.folder, latest["token"])
        if not waiting:
            break
        if not told:
            say(f"waiting for process{'es' * (len(waiting) > 1)} {', '.join(map(str, sorted(waiting)))}")
            told = True
        time.sleep(LOOK[buckets.is_remote(mine.folder)])
    for process in range(mine.count):
        with contextlib.suppress(OSError):
            buckets.discard(mine.path(process))
    return [{**mine.values, "failures": list(map(str, mine._failures))}, *found.values()]


def summary(found: Sequence[dict | None], scenes: Sequence[int]) -> list[str]:
    """All together, then host by host. scenes: how many each process was to map."""
    known = [each for each in found if each]
    total = sum(scenes)
    skipped, failed = (sum(map(count, known)) for count in (lambda f: f["skipped"], lambda f: len(f["failures"])))
    left = total - skipped - failed - sum(each["mapped"] for each in known)
    parts = [f"{_work(known)} of {total} scenes", *([f"{skipped} were there"] * bool(skipped)), f"{failed} failed"]
    lines = [f"{len(found)} processes mapped " + ", ".join([*parts, *([f"{left} left"] * bool(left))]) + _rate(known)]
    hosts = itertools.groupby(sorted(enumerate(found), key=_host), key=_host)
    for host, members in hosts:
        numbers, theirs = zip(*members, strict=True)
        theirs = [each for each in theirs if each]
        what = f"{_work(theirs)} mapped, {sum(len(each['failures']) for each in theirs)} failed{_rate(theirs)}"
        lines.append(f"  {host or 'never begun'}, process {', '.join(map(str, numbers))}: {what}")
    return lines


def _host(numbered: tuple[int, dict | None]) -> str:
    return numbered[1]["host"] if numbered[1] else ""


def _work(found: Sequence[dict]) -> int:
    return sum(each["mapped"] for each in found)


def _rate(found: Sequence[dict]) -> str:
    pixels, seconds = sum(each["pixels"] for each in found), max((each["seconds"] for each in found), default=0)
    return f"; {pixels / 1e6:.3g} Mpixel, {pixels / seconds / 1e6:.3g} Mpixel/s" if pixels else ""


def undone(found: Sequence[dict | None], scenes: Sequence[int]) -> list[str]:
    """A line for each process that left some of its scenes undone, or had others in mind."""
    lines = []
    for process, (each, count) in enumerate(zip(found, scenes, strict=True)):
        where = f"process {process}" + (f" on {each['host']}" if each else "")
        left = _left(each) if each else count
        if each and each["dealt"] != found[0]["dealt"]:
            lines.append(f"{where} found other scenes than process 0; some may be left")
        elif left:
            why = each["error"] or ("was stopped" if each["ended"] else "died") if each else "never began"
            lines.append(f"{where}: {why}; {left} of its scenes left")
    return lines
