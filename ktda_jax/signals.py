"""SIGINT and SIGTERM end a verb in one line, whatever it is doing."""

import contextlib
import functools
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar, NoReturn


class Signals:
    """SIGINT and SIGTERM end a verb in one line, with status 128 + their number (or --stopped_status).

    Python calls handlers between two steps of the main thread, which for a compilation is minutes. So a thread hears
    of signals, too, and ends the process at once where nothing is to be cleaned up. Where something is
    (`stop_cleanly`), the handler raises KeyboardInterrupt, and the thread ends the process if that is not heard in
    time, or if somebody insists. StopSignal has its own handlers; of those the thread only counts ctrl-c.

    A signal that comes just before the main thread begins to wait, or to another thread, interrupts no waiting: so
    the thread sends it again. It counts its own turns, not seconds, in which the whole process may have stood still.
    """

    WORDS: ClassVar = {signal.SIGINT: "stopped from the keyboard", signal.SIGTERM: "stopped by a signal"}
    GRACE = 0.2, 15  # seconds to the next reminder, and how many the main thread is given to hear
    APART = 0.5  # seconds; two signals that are closer, from a terminal and a wrapper, say, are one

    def __init__(self, status: Callable[[], int | None]):
        """status: what the process is to end with instead of 128 + the signal's number, if it knows."""
        self.cleanly, self.raised = False, None
        self._status, self._ending = status, threading.Lock()
        self._wakeup = None
        self._ours = 0  # signals that this process sent itself, and whose byte is still to come

    def hear(self) -> None:
        """From now on, and again after something else took the signals."""
        for number in self.WORDS:
            signal.signal(number, self._handle)
        if self._wakeup is None:
            reading, self._wakeup = os.pipe()
            os.set_blocking(self._wakeup, False)
            signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reading,), name="signals", daemon=True).start()
            sys.unraisablehook = functools.partial(self._again, sys.unraisablehook)

    def _handle(self, number, frame) -> None:
        if self.cleanly and not self.raised:
            self.raised = number
            raise KeyboardInterrupt(number)

    def _watch(self, reading: int) -> None:
        first, last, interrupts = None, 0.0, 0
        seconds, reminders = self.GRACE
        while True:
            waiting = first is not None and not self.raised
            if not select.select([reading], [], [], seconds if waiting else None)[0]:
                if not self.raised:
                    if not reminders:
                        self.end(first)
                    reminders -= 1
                    if not self._ours:  # several that wait for a stopped process would come as one
                        self._send(first)
                continue
            number, now = os.read(reading, 1)[0], time.monotonic()
            if self._ours:
                self._ours -= 1
                continue
            if number not in self.WORDS or now - last < self.APART:
                continue
            last, interrupts = now, interrupts + (number == signal.SIGINT)
            if interrupts > 2:
                self.end(number)
            if signal.getsignal(number) == self._handle:
                if first is not None or not self.cleanly:
                    self.end(number)
                first = number

    def _again(self, before: Callable, unraisable) -> None:
        """What is raised within a destructor or a callback of the garbage collector gets lost: raises it again."""
        error = unraisable.exc_value
        if not isinstance(error, KeyboardInterrupt):
            return before(unraisable)
        number, self.raised = next(iter(error.args), signal.SIGINT), None
        threading.Timer(0.01, self._send, (number,)).start()

    def _send(self, number: int) -> None:
        """To the main thread, which stops waiting for it."""
        self._ours += 1
        signal.pthread_kill(threading.main_thread().ident, number)

    def end(self, number: int) -> NoReturn:
        """The end of this process at once: no thread is waited for, nor the other processes."""
        status = self._status()
        with contextlib.suppress(Exception):
            if threading.current_thread() is threading.main_thread():  # which may just hold what others would wait for
                sys.stdout.flush()
        self._ending.acquire()  # for good: one line
        with contextlib.suppress(OSError):
            os.write(2, f"error: {self.WORDS[number]}\n".encode())
        os._exit(128 + number if status is None else status)
