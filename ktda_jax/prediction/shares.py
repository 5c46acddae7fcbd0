"""Which scenes one of several processes maps: dealt out by size, alike in all of them.

They do not meet by `jax.distributed`, which ends all when it misses one. Each is a JAX program of its own on its own
devices and waits for no other, so that nothing but the scenes of a host that dies is left undone.
"""

import heapq
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from ktda_jax import UserError
from ktda_jax.data.gdal import dataset

READERS = 16  # files whose headers are read at once: of a shared folder each takes its time
# What keeps libtpu from waiting for the other hosts of a slice, whose hosts have four chips each if they are several.
OWN_CHIPS = {
    "TPU_PROCESS_BOUNDS": "1,1,1",
    "TPU_CHIPS_PER_PROCESS_BOUNDS": "2,2,1",
    "TPU_VISIBLE_DEVICES": "0,1,2,3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "CLOUD_TPU_TASK_ID": "0",
}


def by_cluster() -> tuple[int, int]:
    """(index, count) of this process as Slurm or GKE's TPU slices tell, and only its own devices for JAX.

    Call it before JAX looks for devices. UserError where nothing tells.
    """
    told = os.environ
    if "SLURM_PROCID" in told and "SLURM_NTASKS" in told:
        # As jax.distributed does it: a GPU for each task, or those that slurm.sh names.
        own = told.get("JAX_LOCAL_DEVICE_IDS") or told.get("SLURM_LOCALID", "0")
        jax.config.update("jax_cuda_visible_devices", own)
        return int(told["SLURM_PROCID"]), int(told["SLURM_NTASKS"])
    if "TPU_WORKER_ID" in told and "TPU_WORKER_HOSTNAMES" in told:
        index, hosts = int(told["TPU_WORKER_ID"]), len(told["TPU_WORKER_HOSTNAMES"].split(","))
        if hosts > 1:
            told.update(OWN_CHIPS)
        return index + int(told.get("MEGASCALE_SLICE_ID", 0)) * hosts, int(told.get("MEGASCALE_NUM_SLICES", 1)) * hosts
    raise UserError(
        "--coordinator=auto: neither Slurm nor a TPU slice in GKE tells which process this is; "
        "give --num_processes and --process_id"
    )


def sizes(paths: Sequence[os.PathLike]) -> list[int]:
    """The pixels of each raster by its header; 0 where it cannot be opened, of which whoever gets it will tell."""

    def pixels(path) -> int:
        try:
            with dataset(path) as file:
                return file.height * file.width
        except UserError:
            return 0

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(pixels, paths))


def deal(sizes: Sequence[int], count: int) -> list[list[int]]:
    """The places of `count` shares, each ascending: the largest first, always to whoever has least."""
    shares = [[] for _ in range(count)]
    loads = [(0, 0, process) for process in range(count)]  # a heap: pixels, scenes
    for place in sorted(range(len(sizes)), key=lambda k: (-sizes[k], k)):
        pixels, scenes, process = heapq.heappop(loads)
        shares[process].append(place)
        heapq.heappush(loads, (pixels + sizes[place], scenes + 1, process))
    return [sorted(share) for share in shares]
