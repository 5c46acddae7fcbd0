"""One process at a time in a folder: a second one is told who the first is, and whoever died is in nobody's way.

There are two guards. `flock` ends with its process, whatever ends that; but some file systems do not have it, and on
others that machines share it may hold on each machine alone. So there is a record, too, of who holds the folder:

    from this machine       dead as soon as that process is gone; its number alone says nothing, for numbers come again
    from anywhere else      dead when its heartbeat has stood still for two minutes, for which whoever is next waits

Another container of this machine is elsewhere, too: process numbers mean other processes there. Of those that take a
dead one's place at the same moment the last one to write the record has it, and the others give way: after a second,
or, should that have been too short, when they check, before they write.

A folder in a bucket has the record alone: an object that only one of several can create.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from ktda_jax import UserError
from ktda_jax.data import buckets

RECORD = "lock.json"
HEARTBEAT, DEAD = 30.0, 120.0  # seconds: between two heartbeats, and without one
SETTLED = 1.0  # seconds, in which the last of those that take a dead one's place at once has written
FORGOTTEN = 3600.0  # seconds since a heartbeat by the clocks of two machines, which do not differ as much


@contextlib.contextmanager
def hold(
    folder: pathlib.PurePath, *, place: str, claim: str, remedy: str, record: pathlib.PurePath | None = None,
    say: Callable[[str], None] = print,
) -> Iterator[Callable[[], None]]:  # fmt: skip
    """The folder, which is made, is this process's within the `with`; what it gives raises UserError if that is lost.

    UserError: "{claim} by process 7 on host since ...; {remedy}", or that one "cannot write to {place}".
    """
    path = record or folder / RECORD
    mine = {**this_process(), "token": uuid.uuid4().hex, "since": time.strftime("%Y-%m-%d %H:%M:%S")}

    def refuse(found: dict) -> UserError:
        who = f"process {found.get('pid')} on {found.get('host')} since {found.get('since')}" if found else "another"
        return UserError(f"{claim} by {who}; {remedy}")

    def check() -> None:
        found = _read(path)
        if found and found.get("token") != mine["token"]:
            raise refuse(found)

    remote = buckets.is_remote(folder)
    made, locked = not remote and not folder.exists(), None
    ended = threading.Event()
    beating = threading.Thread(target=_beat, args=(path, mine, ended), name="heartbeat", daemon=True)
    try:
        try:
            if not remote:
                folder.mkdir(parents=True, exist_ok=True)
                locked = _flock(folder)
            _take(path, mine, refuse, say, flocked=locked is not None)
        except BlockingIOError as error:
            made = False  # it is the other's now
            raise refuse(_read(path)) from error
        except UserError:
            made = False
            raise
        except OSError as error:
            raise UserError(f"cannot write to {place}: {error.strerror or error}") from error
        beating.start()
        yield check
    finally:
        ended.set()
        if beating.is_alive():
            beating.join()
        with contextlib.suppress(OSError):
            if (_read(path) or {}).get("token") == mine["token"]:
                buckets.remove(path) if remote else path.unlink()
        if made:
            with contextlib.suppress(OSError):  # not empty: something came of it
                folder.rmdir()
        if locked is not None:
            os.close(locked)


def _flock(folder: pathlib.Path) -> int | None:
    """The open folder, locked until it is closed; None where there is no flock. BlockingIOError: another has it."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(opened)
        if isinstance(error, BlockingIOError):
            raise
        return None  # ENOTSUP, ENOLCK, EINVAL; EBADF of a folder by NFS
    return opened


def _take(path: pathlib.PurePath, mine: dict, refuse: Callable, say: Callable[[str], None], *, flocked: bool) -> None:
    """Writes the record; UserError if another that may live has one."""
    while True:
        found = _read(path)
        if found is None:
            if _create(path, mine):
                return
            continue  # another was quicker
        if found.get("token") == mine["token"]:  # whose creation was answered late, and repeated
            return
        dead = _is_dead(found, flocked=flocked)
        if dead is None:
            who = f"process {found.get('pid')} on {found.get('host')}" if found else "another process"
            say(f"{path}: {who} held this folder; waiting up to {DEAD:.0f} s for a sign of life")
            later = _watch(path, found)
            if later is None:
                continue  # it has ended
            found, dead = later, later == found
        if not dead:
            raise refuse(found)
        if _read(path) != found:
            continue
        _write(path, mine)
        time.sleep(SETTLED)  # others may have come to the same end at the same moment
        later = _read(path)
        if later and later.get("token") != mine["token"]:
            raise refuse(later)
        return


def _is_dead(found: dict, *, flocked: bool) -> bool | None:
    """Whether the process of a record is gone; None: only its heartbeat can tell."""
    here = this_process()
    if all(found.get(key) == here[key] for key in ("machine", "namespace")):
        if found.get("started") is not None:
            return _started(found.get("pid")) != found["started"]
        if flocked and here["namespace"] is None:  # macOS, which has no /proc but flock
            return True
    last = found.get("beat")
    return True if isinstance(last, float) and time.time() - last > FORGOTTEN else None


def has_ended(found: dict) -> bool:
    """Whether the process of a record is gone for certain, which of another machine's nobody knows for an hour."""
    return bool(_is_dead(found, flocked=False))


def _watch(path: pathlib.PurePath, found: dict) -> dict | None:
    """The record as soon as it is another, or after DEAD seconds."""
    end = time.monotonic() + DEAD
    while time.monotonic() < end:
        time.sleep(DEAD / 60)
        later = _read(path)
        if later != found:
            return later
    return found


def _beat(path: pathlib.PurePath, mine: dict, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with contextlib.suppress(OSError):  # next time, perhaps
            found = _read(path)
            if found is None:
                _create(path, mine)
            elif found.get("token") == mine["token"]:
                _write(path, mine)


def this_process() -> dict[str, Any]:
    """Who we are: `machine` until it is started again, and the namespace in which our number means something."""
    host = socket.gethostname()
    namespace = None
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")
    machine = _text("/proc/sys/kernel/random/boot_id").strip() or host
    number = os.getpid()
    return {"host": host, "machine": machine, "namespace": namespace, "pid": number, "started": _started(number)}


def _started(number: int | None) -> str | None:
    """When a process of this machine was started, in its clock's ticks; None: there is none, or nobody tells."""
    fields = _text(f"/proc/{number}/stat").rpartition(")")[2].split()
    return fields[19] if len(fields) > 19 and fields[0] not in "ZX" else None  # a zombie writes nothing more


def _text(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def _read(path: pathlib.PurePath) -> dict | None:
    """None without a record; empty while one is being written."""
    try:
        found = json.loads(buckets.read_text(path))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _create(path: pathlib.PurePath, mine: dict) -> bool:
    """False if there is one already."""
    if buckets.is_remote(path):
        return buckets.create(path, _now(mine))
    temporary = _aside(path, mine)
    try:
        os.link(temporary, path)  # whole at once, and never over another
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        return _create_in_place(path, temporary.read_text())
    finally:
        temporary.unlink()
    return True


def _create_in_place(path: pathlib.Path, text: str) -> bool:
    try:
        file = open(path, "x")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except BaseException:  # a full disk, a signal
        path.unlink()
        raise
    return True


def _write(path: pathlib.PurePath, mine: dict) -> None:
    if buckets.is_remote(path):
        buckets.write_text(path, _now(mine))
    else:
        os.replace(_aside(path, mine), path)


def _now(mine: dict) -> str:
    return json.dumps(mine | {"beat": time.time()})


def _aside(path: pathlib.Path, mine: dict) -> pathlib.Path:
    """The record with this moment's heartbeat, under another name."""
    temporary = path.with_name(f".{path.name}.{mine['token']}.tmp")
    try:
        temporary.write_text(_now(mine))
    except BaseException:  # a full disk, a signal
        temporary.unlink(missing_ok=True)
        raise
    return temporary
