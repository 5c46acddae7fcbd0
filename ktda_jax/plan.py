"""`python -m ktda_jax.plan --config=... --topology=v5e:4x4`: does the training step fit on a TPU slice?

Compiles the real step for the slice without having it (libtpu from `pip install -e '.[tpu]'`), prints what one chip
holds, and estimates the time of a step. Two cores need minutes for the base model's compilation.

The estimate is a roofline of our own, since the compiler's goes wrong where the program has loops: every product at
the chip's dense bfloat16 peak, or all bytes that the program touches at the memory's bandwidth, whichever takes longer;
then the collectives at the links' bandwidth, as a ring, nothing overlapped. It leaves out input, host, kernels below
the peak, and contention; loop bodies' bytes count once. Measured steps are slower, so use it to compare.
"""

import dataclasses
import json
import math
import os
import re
import sys

# Before jax is imported: libtpu would otherwise look for a machine that hands it a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax.experimental import topologies

from ktda_jax import config as configs
from ktda_jax import flops, sharding, state
from ktda_jax import main as command  # its flags, and its one-line errors
from ktda_jax.config import ConfigError
from ktda_jax.models.vit import ViT
from ktda_jax.program import build, model_config_of


@dataclasses.dataclass(frozen=True)
class Chip:
    """As its maker states them: memory in GB, TFLOP/s in dense bfloat16, and GB/s of memory and of all links."""

    memory: float
    tflops: float
    memory_bandwidth: float
    link_bandwidth: float


CHIPS = {
    "v5e": Chip(16, 197, 819, 200),
    "v5p": Chip(95, 459, 2765, 600),
    "v6e": Chip(32, 918, 1640, 448),
    "v4": Chip(32, 275, 1228, 300),
}
SLICES = {
    "v5e": ("2x2", "4x4", "8x8", "16x16"), "v6e": ("2x2", "4x4", "8x8", "16x16"),
    "v5p": ("2x2x1", "2x2x4", "4x4x4", "4x8x8"), "v4": ("2x2x1", "2x2x4", "4x4x4", "4x8x8"),
}  # fmt: skip
_ACCELERATOR = {"v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e", "v4": "v4"}
_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def compile_for(config, topology: str) -> dict:
    """Compiles the training step for `topology` (such as v5e:4x4): per chip, bytes by kind, operations, collectives."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise ConfigError(f"--topology is {topology!r}; give KIND:SHAPE such as v5e:4x4, KIND of {', '.join(CHIPS)}")
    chips = math.prod(int(side) for side in shape.split("x"))
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{_ACCELERATOR[kind]}-{chips}")
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        text = " ".join(str(error).split())
        missing = "libtpu" in text or "not installed" in text
        advice = "pip install -e '.[tpu]'" if missing else "give another --topology"
        raise ConfigError(f"cannot compile for {topology}: {text}; {advice}") from error
    if config.dtype == "auto":  # which would be that of this machine
        config.dtype = "bfloat16"
    program = build(config, devices=devices)
    mesh, model, crop = program.mesh, model_config_of(config), tuple(config.data.crop)

    def placed(tree, shardings):
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((config.batch_size, *crop, model.student.bands), np.uint8, sharding=rows),
        "label": jax.ShapeDtypeStruct((config.batch_size, *crop), np.uint8, sharding=rows),
    }
    teacher = {}
    if config.distill and config.teacher.mode == "computed":
        teacher = state.abstract(lambda: ViT(model.teacher, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))[1]
        teacher = placed(teacher, sharding.tree_shardings(mesh, teacher))
    compiled = program.train_step.lower(placed(program.abstract, program.shardings), batch, teacher).compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    operations = flops.of_model(model, crop, distill=bool(teacher))["training"] * config.batch_size
    return {
        "topology": topology,
        "chips": mesh.size,
        "batch_size": config.batch_size,
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "new_outputs_gb": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "program_gb": memory.generated_code_size_in_bytes / 1e9,
        "tflop": operations / mesh.size / 1e12,
        "touched_gb": cost["bytes accessed"] / 1e9,
        "collective_gb": collective_bytes(compiled.as_text()),
    }


def collective_bytes(text: str) -> dict[str, float]:
    """GB of the results of all collectives in a compiled program, by kind; those in loops count once."""
    found = {}
    for shapes, kind in _COLLECTIVE.findall(text):
        if shapes.startswith("(") and kind == "all-gather":  # started: inputs and outputs
            shapes = shapes[len(shapes) // 2 :]
        size = sum(
            math.prod(int(n) for n in dims.split(",") if n)
            * (int(_BITS.search(dtype)[0]) if dtype != "pred" else 8)
            / 8
            for dtype, dims in _SHAPE.findall(shapes)
        )
        found[kind] = found.get(kind, 0.0) + size / 1e9
    return found


def step_seconds(report: dict, chip: Chip, chips: int) -> dict[str, float]:
    """Roofline of one step at `report`'s load per chip on `chips` chips."""
    compute, memory = report["tflop"] / chip.tflops, report["touched_gb"] / chip.memory_bandwidth
    ring = (chips - 1) / chips
    # A ring moves an all-reduced array twice, and everything else once.
    links = sum(size * (2 if kind == "all-reduce" else 1) for kind, size in report["collective_gb"].items())
    links *= ring / chip.link_bandwidth
    return {"compute": compute, "memory": memory, "links": links, "step": max(compute, memory) + links}


def held_gb(report: dict) -> float:
    return sum(report[k] for k in ("state_gb", "new_outputs_gb", "temporary_gb", "program_gb"))


def text_of(report: dict) -> str:
    """What was compiled, and how it scales at the same batch per chip."""
    kind = report["topology"].partition(":")[0]
    chip, held = CHIPS[kind], held_gb(report)
    fits = f"fits: {held:.2f} of {chip.memory:g} GB" if held <= chip.memory else (
        f"does not fit: {held:.2f} GB on a chip of {chip.memory:g} GB; lower the batch, raise config.grad_accum, set "
        "config.model.student.remat and config.model.fmm.remat, or config.mesh.fsdp above 1"
    )  # fmt: skip
    collectives = ", ".join(f"{k} {v:.3f}" for k, v in report["collective_gb"].items()) or "none"
    lines = [
        f"{report['topology']}, {report['chips']} chips, global batch {report['batch_size']}: {fits}",
        f"GB a chip: state and batch {report['state_gb']:.2f}, temporaries {report['temporary_gb']:.2f}, "
        f"program {report['program_gb']:.2f}, further outputs {report['new_outputs_gb']:.2f}",
        f"a chip and step: {report['tflop']:.2f} TFLOP, {report['touched_gb']:.1f} GB touched; collectives in GB: "
        f"{collectives}",
        "",
        f"{'slice':12}{'chips':>6}{'batch':>7}{'fits':>6}{'step ms':>9}{'images/s':>10}{'efficiency':>11}  (estimated)",
    ]
    per_chip = report["batch_size"] / report["chips"]
    for name, shapes in SLICES.items():
        first = None
        for shape in shapes:
            chips = math.prod(int(side) for side in shape.split("x"))
            seconds = step_seconds(report, CHIPS[name], chips)["step"]
            first = first or seconds
            fits = "yes" if held <= CHIPS[name].memory else "no"
            lines.append(
                f"{name + ':' + shape:12}{chips:6}{per_chip * chips:7g}{fits:>6}"
                f"{1e3 * seconds:9.1f}{per_chip * chips / seconds:10.0f}{100 * first / seconds:10.1f}%"
            )
    fitting = [f"{n}:{s[0]}" for n, s in SLICES.items() if held <= CHIPS[n].memory]
    lines.append(f"smallest slices that fit at this batch a chip: {', '.join(fitting) or 'none'}")
    return "\n".join(lines)


def main(_: list[str]) -> None:
    command.start()
    config, given = command.CONFIG.value, flags.FLAGS
    try:
        configs.check(config)
        with config.unlocked():
            if given.batch:
                config.batch_size = given.batch
            config.eval_batch_size = config.batch_size  # evaluation is not planned; let it divide by the devices
            report = compile_for(config, given.topology)
    except ConfigError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report) if given.json else text_of(report))


if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have flags too
    flags.DEFINE_string("topology", "v5e:2x2", "KIND:SHAPE of the slice to compile for.")
    flags.DEFINE_integer("batch", None, "Global batch; default config.batch_size.")
    flags.DEFINE_bool("json", False, "Print the figures of the compiled program as JSON.")
    app.run(main, flags_parser=command.parse)
