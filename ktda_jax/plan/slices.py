"""TPU slices: what their chips have, and what a step that was compiled for one slice would take on others.

The time is a roofline of our own, since the compiler's estimate goes wrong where the program has loops: every product,
those that are computed again too, at the chip's dense bfloat16 peak, or all bytes that the program touches at the
memory's bandwidth, whichever takes longer; then the collectives as rings over the links that the slice has, nothing
overlapped. It leaves out input, host, kernels below the peak, the latency of each collective (synchronised BatchNorm
has dozens of small ones), contention, and networks between slices. Measured steps are slower, so it is for comparing.
"""

import dataclasses
import math

from ktda_jax.config.fields import flat
from ktda_jax.config.settings import Settings


@dataclasses.dataclass(frozen=True)
class Chip:
    """What libtpu 0.0.42 offers a program, and what the maker states."""

    offered: float  # memory in GiB, from libtpu's message about a program that is too large
    tflops: float  # dense bfloat16
    memory_bandwidth: float  # GB/s
    link_bandwidth: float  # GB/s of all links together
    dimensions: int  # of the torus
    closes: int  # the side from which an axis is a ring; of cubes, all sides must be multiples of it

    @property
    def usable_gb(self) -> float:
        """GB (1e9 bytes) for a program."""
        return self.offered * 2**30 / 1e9


CHIPS = {
    "v5e": Chip(15.75, 197, 819, 200, 2, 16),
    "v6e": Chip(31.25, 918, 1640, 448, 2, 16),
    "v5p": Chip(95.74, 459, 2765, 600, 3, 4),
    "v4": Chip(30.75, 275, 1228, 300, 3, 4),
}
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8")
SLICES = {"v5e": FLAT, "v6e": FLAT, "v5p": DEEP, "v4": DEEP}
SHOWN = {"2x2", "4x4", "8x8", "16x16", "2x2x1", "2x2x4", "4x4x4", "4x8x8"}  # of the scaling table
ACCELERATOR = {"v5e": "v5litepod", "v6e": "v6e", "v5p": "v5p", "v4": "v4"}  # as Cloud TPU's names have them


def sides(shape: str) -> list[int]:
    """'4x8' -> [4, 8]."""
    return [int(side) for side in shape.split("x")]


def chips_of(shape: str) -> int:
    return math.prod(sides(shape))


def bandwidth(chip: Chip, shape: str) -> float:
    """GB/s of the links of a corner of the slice, which the slowest ring has to go through.

    A chip in the middle of a long axis has two links along it, one at the end of an axis that does not close only one.
    """
    lengths = sides(shape)
    cube = all(side % chip.closes == 0 for side in lengths)
    rings = [cube if chip.dimensions == 3 else side == chip.closes for side in lengths]
    links = sum(0 if side == 1 else 2 if ring else 1 for side, ring in zip(lengths, rings, strict=True))
    return chip.link_bandwidth * links / (2 * chip.dimensions)


def seconds(report: dict, chip: Chip, shape: str) -> dict[str, float]:
    """Roofline of one step at `report`'s load per chip on a slice of `shape`."""
    chips, moved = chips_of(shape), dict(report["collective_gb"])
    if report["mesh"]["data"] == 1 < report["chips"] < chips:  # copies of a split model sum their gradients as well
        moved["all-reduce"] = moved.get("all-reduce", 0.0) + report["gradient_gb"]
    compute, memory = report["tflop"] / chip.tflops, report["touched_gb"] / chip.memory_bandwidth
    # A ring moves an all-reduced array twice, and everything else once.
    size = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in moved.items())
    links = size * (chips - 1) / chips / bandwidth(chip, shape) if chips > 1 else 0.0
    return {"compute": compute, "memory": memory, "links": links, "step": max(compute, memory) + links}


def held_gb(report: dict, rows: float | None = None) -> float:
    """GB on a chip at `report`'s settings, or at most that with `rows` images a chip.

    Temporaries have a part that does not grow with the batch, so that growing all of them in proportion is an upper
    bound for more rows, and leaving them as they are one for fewer.
    """
    more = 1.0 if rows is None else max(1.0, rows * report["chips"] / report["batch_size"])
    fixed = sum(report[k] for k in ("state_gb", "new_outputs_gb", "program_gb"))
    return fixed + more * report["temporary_gb"]


def _holds_the_mesh(report: dict, chips: int) -> bool:
    """Split parameters are split over as many chips as they were compiled for, so that a chip holds as much."""
    return chips % report["mesh"]["fsdp"] == 0


def smallest(report: dict) -> list[str]:
    """Of each kind, the smallest slice that holds `report`'s global batch at its settings, by `held_gb`."""
    found, batch = [], report["batch_size"]
    for kind, shapes in SLICES.items():
        for shape in shapes:
            chips = chips_of(shape)
            whole = batch % (chips * report["grad_accum"]) == 0 and _holds_the_mesh(report, chips)
            if whole and held_gb(report, batch / chips) <= CHIPS[kind].usable_gb:
                found.append(f"{kind}:{shape}")
                break
    return found


def scaling(report: dict) -> list[dict]:
    """Slices at `report`'s batch a chip: chips, global batch, whether it fits, seconds, images/s, and efficiencies.

    `efficiency` is against the same step without collectives, `weak` against the kind's smallest slice here.
    """
    rows, per_chip = [], report["batch_size"] / report["chips"]
    for kind, shapes in SLICES.items():
        chip, first = CHIPS[kind], None
        for shape in shapes:
            chips = chips_of(shape)
            if shape not in SHOWN or not _holds_the_mesh(report, chips):
                continue
            found = seconds(report, chip, shape)
            first = first or found["step"]
            rows.append({
                "slice": f"{kind}:{shape}", "chips": chips, "batch": per_chip * chips,
                "fits": held_gb(report) <= chip.usable_gb, "step_s": found["step"],
                "images_per_s": per_chip * chips / found["step"],
                "efficiency": 1 - found["links"] / found["step"], "weak": first / found["step"],
            })  # fmt: skip
    return rows


def next_settings(config, chips: int) -> list[dict]:
    """Settings to try where a step does not fit, by what they cost in speed, cheapest first.

    Accumulation costs next to nothing as long as a chip's share of the batch stays large; recomputation a forward
    pass more; split parameters the collectives that gather them.
    """
    share, fsdp = config.batch_size // chips, {"mesh.data": 1, "mesh.fsdp": chips}
    accumulated = [n for n in range(config.grad_accum + 1, share + 1) if share % n == 0]
    remat = {"model.student.remat": True, "model.fmm.remat": True}
    most = {"grad_accum": max([config.grad_accum, *accumulated])}
    tries = [{"grad_accum": n} for n in accumulated if n & (n - 1) == 0 or n == share]
    tries += [remat, remat | most, fsdp, fsdp | remat | most]
    current, new = flat(Settings.of(config)), []
    for settings in tries:
        changed = {k: v for k, v in settings.items() if current[k] != v}
        if changed and changed not in new:
            new.append(changed)
    return new
