"""TPU slices: what a chip of each kind has, and what a step that was compiled for one slice would take on others.

The time is a roofline of our own, since the compiler's estimate goes wrong where the program has loops: every product
at the chip's dense bfloat16 peak, or all bytes that the program touches at the memory's bandwidth, whichever takes
longer; then the collectives at the bandwidth of a chip's links, as a ring, nothing overlapped. It leaves out input,
host, kernels below the peak, latency and contention. Measured steps are slower, so it is for comparing.
"""

import dataclasses
import math

RESERVED = 0.3  # GB of a chip that the runtime keeps to itself (libtpu offers a program 15.75 of v5e's 16 GiB)


@dataclasses.dataclass(frozen=True)
class Chip:
    """As its maker states them: memory in GiB, TFLOP/s in dense bfloat16, and GB/s of memory and of all links."""

    memory: float
    tflops: float
    memory_bandwidth: float
    link_bandwidth: float

    @property
    def usable_gb(self) -> float:
        """GB (1e9 bytes) for a program."""
        return self.memory * 2**30 / 1e9 - RESERVED


CHIPS = {
    "v5e": Chip(16, 197, 819, 200),
    "v6e": Chip(32, 918, 1640, 448),
    "v5p": Chip(95, 459, 2765, 600),
    "v4": Chip(32, 275, 1228, 300),
}
SLICES = {
    "v5e": ("2x2", "4x4", "8x8", "16x16"), "v6e": ("2x2", "4x4", "8x8", "16x16"),
    "v5p": ("2x2x1", "2x2x4", "4x4x4", "4x8x8"), "v4": ("2x2x1", "2x2x4", "4x4x4", "4x8x8"),
}  # fmt: skip
ACCELERATOR = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "v4": "v4"}  # as Cloud TPU's names have them


def chips_of(shape: str) -> int:
    """'4x4' -> 16."""
    return math.prod(int(side) for side in shape.split("x"))


def seconds(report: dict, chip: Chip, chips: int) -> dict[str, float]:
    """Roofline of one step at `report`'s load per chip on `chips` chips."""
    compute, memory = report["tflop"] / chip.tflops, report["touched_gb"] / chip.memory_bandwidth
    ring = (chips - 1) / chips
    # A ring moves an all-reduced array twice, and everything else once.
    links = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in report["collective_gb"].items())
    links *= ring / chip.link_bandwidth
    return {"compute": compute, "memory": memory, "links": links, "step": max(compute, memory) + links}


def held_gb(report: dict, rows: float | None = None) -> float:
    """GB on a chip at `report`'s settings, or at most that with `rows` images a chip.

    Temporaries have a part that does not grow with the batch, so that growing all of them in proportion is an upper
    bound for more rows, and leaving them as they are one for fewer.
    """
    more = 1.0 if rows is None else max(1.0, rows * report["chips"] / report["batch_size"])
    fixed = sum(report[k] for k in ("state_gb", "new_outputs_gb", "program_gb"))
    return fixed + more * report["temporary_gb"]


def smallest(report: dict) -> list[str]:
    """Of each kind, the smallest slice that holds `report`'s global batch at its settings, by `held_gb`."""
    found, batch = [], report["batch_size"]
    for kind, shapes in SLICES.items():
        for shape in shapes:
            chips = chips_of(shape)
            if batch % (chips * report["grad_accum"]) == 0 and held_gb(report, batch / chips) <= CHIPS[kind].usable_gb:
                found.append(f"{kind}:{shape}")
                break
    return found


def scaling(report: dict) -> list[dict]:
    """Each slice at `report`'s batch a chip: chips, global batch, whether it fits, seconds, images/s, and efficiency.

    Efficiency is images/s a chip against those of the kind's smallest slice here (weak scaling).
    """
    rows, per_chip = [], report["batch_size"] / report["chips"]
    for kind, shapes in SLICES.items():
        first = None
        for shape in shapes:
            chips = chips_of(shape)
            step = seconds(report, CHIPS[kind], chips)["step"]
            first = first or step
            rows.append({
                "slice": f"{kind}:{shape}", "chips": chips, "batch": per_chip * chips,
                "fits": held_gb(report) <= CHIPS[kind].usable_gb, "step_s": step,
                "images_per_s": per_chip * chips / step, "efficiency": first / step,
            })  # fmt: skip
    return rows


def next_settings(config, chips: int) -> list[dict]:
    """Settings to try where a step does not fit, by what they cost in speed, cheapest first.

    Accumulation costs next to nothing as long as a chip's share of the batch stays large; recomputation a forward
    pass more; split parameters the collectives that gather them.
    """
    share, fsdp = config.batch_size // chips, {"mesh.data": 1, "mesh.fsdp": chips}
    accumulated = [n for n in range(2, share + 1) if share % n == 0 and n > config.grad_accum]
    remat = {"model.student.remat": True, "model.fmm.remat": True}
    most = {"grad_accum": max([config.grad_accum, *accumulated])}
    tries = [{"grad_accum": n} for n in accumulated if n & (n - 1) == 0 or n == share]
    tries += [remat, remat | most, fsdp, fsdp | remat | most]
    return [t for i, t in enumerate(tries) if t not in tries[:i]]
