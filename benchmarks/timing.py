"""What both sides of a comparison are timed by; imports neither JAX nor torch, whose memory would count."""

import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable


def timed(function: Callable, count: int) -> list[float]:
    """Seconds of each of `count` calls; `function` itself waits for the device."""
    times = []
    for _ in range(count):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return times


def summary(times: list[float], batch: int) -> dict:
    """Median and extremes of the seconds that a batch takes, and images per second by the median."""
    median = statistics.median(times)
    return {"median_s": median, "spread_s": [min(times), max(times)], "images_per_s": batch / median, "n": len(times)}


def resident_peak() -> int:
    """Bytes of this process's largest resident set. On Linux getrusage's may be that of its parent, if larger."""
    if sys.platform == "linux":
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
