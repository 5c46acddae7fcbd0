"""The training step compiled for a TPU slice that is not there: what one chip holds, computes and exchanges."""

import copy
import importlib.util
import math
import os
import re

# Before jax is imported: libtpu would otherwise look for a machine that hands it a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # several may compile at a time, since no chip is taken

import jax
from jax.experimental import topologies
from ml_collections import ConfigDict

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config.model import compute_dtype, model_of
from ktda_jax.models import flat
from ktda_jax.plan import breakdown, flops, kernels, slices
from ktda_jax.plan.slices import ACCELERATOR, CHIPS, SLICES
from ktda_jax.training.program import build

_COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(")
_SHAPE = re.compile(r"\b([a-z]+\d+|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=\{?((?:%[\w.-]+(?:, )?)+)")


class TooLarge(RuntimeError):
    """The compiler found no way to hold the program in a chip's memory; what it said."""


def compile_for(config: ConfigDict, topology: str) -> dict:
    """Compiles the training step for `topology` (such as v5e:4x4): per chip, bytes by kind, operations, collectives.

    TooLarge where the compiler gives up; UserError for what cannot be compiled at all.
    """
    devices = _devices(topology)
    if config.dtype == "auto":  # which would be that of this machine
        config.dtype = "bfloat16"
    settings = checks.resolve(config)
    program = build(settings, devices=devices)
    mesh, model, crop = program.mesh, model_of(settings), settings.data.crop
    try:
        step = program.train_step
        traced = step.func.trace(*program.arguments, **step.keywords)
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        said = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" in said:
            raise TooLarge(f"does not fit: {said.partition(': ')[2]}") from error
        raise UserError(f"cannot compile for {topology}: {said}") from error
    memory, accumulate, text = compiled.memory_analysis(), settings.grad_accum, compiled.as_text()
    parameters, fsdp = flat.count(program.abstract.params), mesh.shape["fsdp"]
    # XLA counts the bytes of a loop's body once. Around that of the micro-batches is only the optimiser, with four
    # float32 arrays to read and three to write for each parameter.
    touched, update = compiled.cost_analysis()["bytes accessed"], 28 * parameters / fsdp
    touched += (accumulate - 1) * max(touched - update, 0)
    in_kernels = kernels.touched(traced.jaxpr.jaxpr)
    touched += flops.repeated_bytes(traced.jaxpr.jaxpr, accumulate) / mesh.size + in_kernels
    model_flops = flops.of_model(model, crop, distill=bool(program.arguments[2]))["training"] * settings.batch_size
    return {
        "config": settings.data.name,
        "crop": crop,
        "topology": topology,
        "parameters": parameters,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "batch_size": settings.batch_size,
        "grad_accum": accumulate,
        "remat": {"student": settings.model.student.remat, "fmm": settings.model.fmm.remat},
        "state_gb": memory.argument_size_in_bytes / 1e9,
        "new_outputs_gb": (memory.output_size_in_bytes - memory.alias_size_in_bytes) / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "program_gb": memory.generated_code_size_in_bytes / 1e9,
        "model_tflop": model_flops / mesh.size / 1e12,
        "tflop": flops.of_jaxpr(traced.jaxpr.jaxpr) / mesh.size / 1e12,
        "touched_gb": touched / 1e9,
        "kernel_gb": in_kernels / 1e9,
        "gradient_gb": parameters / fsdp * compute_dtype(settings.dtype).itemsize / 1e9,
        "collective_gb": collective_bytes(text, accumulate, mesh.size),
        "moved_gb": [[*key, size] for key, size in breakdown.touched(text).items()],
    }


def _devices(topology: str):
    kind, _, shape = topology.partition(":")
    fits = kind in CHIPS and re.fullmatch(r"\d+(x\d+)+", shape)
    if not fits or len(slices.sides(shape)) != CHIPS[kind].dimensions:
        raise UserError(
            f"--topology is {topology!r}; give one such as {', '.join(f'{k}:{v[3]}' for k, v in SLICES.items())}"
        )
    chips = slices.chips_of(shape)
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", f"{ACCELERATOR[kind]}-{chips}")
    options = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
    if kind == "v4":
        options["chip_config_name"] = "megacore"  # one device per chip
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    except Exception as error:
        text = " ".join(str(error).split())
        missing = importlib.util.find_spec("libtpu") is None
        advice = "pip install -e '.[tpu]'" if missing else f"there are {', '.join(SLICES[kind])} and larger ones"
        raise UserError(f"cannot compile for --topology={topology}: {text}; {advice}") from error


def collective_bytes(text: str, trips: int = 1, group: int = 1) -> dict[str, float]:
    """GB of the whole arrays of all collectives in a compiled program, by kind; those in a loop count `trips` times.

    Only the loop over micro-batches has any. A collective that is spread over several fusions, so that it runs beside
    them, stands in each of them with the same channel. `group`: chips among which a scattered result is split.
    """
    found, calls, bodies, here = {}, {}, set(), None
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            here = header[1]
            continue
        if collective := _COLLECTIVE.search(line):
            shapes, kind, started = collective.groups()
            arrays = _arrays(shapes, kind, started=bool(started))
            size = sum(math.prod(dims) * bits for dims, bits in arrays) / 8e9
            if kind == "reduce-scatter":
                size *= group
            elif kind == "all-reduce" and here.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"  # as libtpu writes it: a fusion that keeps its part of the sum
            channel = _CHANNEL.search(line)
            key = (channel[1], kind, *arrays) if channel else line
            found.setdefault(key, (kind, size, set()))[2].add(here)
        called = [name.strip(" %") for names in _CALLED.findall(line) for name in names.split(",") if name.strip()]
        calls.setdefault(here, set()).update(called)
        if " while(" in line:
            bodies.update(called)
    looped, new = set(), bodies
    while new:
        looped |= new
        new = {name for caller in new for name in calls.get(caller, ())} - looped
    total = {}
    for kind, size, places in found.values():
        total[kind] = total.get(kind, 0.0) + size * (trips if places & looped else 1)
    return total


def _arrays(shapes: str, kind: str, *, started: bool) -> list[tuple[tuple[int, ...], int]]:
    """Dimensions and bits per element of a collective's results, as the text before its name lists them."""
    arrays = [
        (tuple(int(n) for n in dims.split(",") if n), 8 if dtype == "pred" else int(_BITS.search(dtype)[0]))
        for dtype, dims in _SHAPE.findall(shapes)
    ]
    if started and kind == "all-gather":  # inputs, then as many outputs
        return arrays[len(arrays) // 2 :]
    if started and kind == "collective-permute":  # input, output, and two words of context
        return arrays[1:2]
    return arrays


def text_of(report: dict) -> str:
    """What was compiled, how it scales at the same batch per chip, and the smallest slices for the whole batch."""
    kind, _, shape = report["topology"].partition(":")
    chip, held = CHIPS[kind], slices.held_gb(report)
    verdict = "fits" if held <= chip.usable_gb else "does not fit"
    collectives = ", ".join(f"{k} {v:.3f}" for k, v in report["collective_gb"].items()) or "none"
    seconds = slices.seconds(report, chip, shape)
    lines = [
        f"{report['topology']}, {report['chips']} chips, global batch {report['batch_size']}: {verdict}: {held:.2f} of "
        f"{chip.usable_gb:.2f} GB a chip",
        f"GB a chip: state and batch {report['state_gb']:.2f}, temporaries {report['temporary_gb']:.2f}, "
        f"program {report['program_gb']:.2f}, further outputs {report['new_outputs_gb']:.2f}",
        f"a chip and step: {report['model_tflop']:.2f} TFLOP of the model, {report['tflop']:.2f} with what is computed "
        f"again; {report['touched_gb']:.1f} GB touched, {report['kernel_gb']:.1f} of them in fused attention",
        f"collectives in GB: {collectives}",
        f"estimated ms: products {1e3 * seconds['compute']:.1f}, memory {1e3 * seconds['memory']:.1f}, links "
        f"{1e3 * seconds['links']:.1f}",
        "",
        breakdown.table({(kind, place): size for kind, place, size in report["moved_gb"]}),
        "",
        "estimated at this batch a chip; efficiency against no collectives at all, weak scaling against the first line",
        f"{'slice':12}{'chips':>6}{'batch':>7}{'fits':>6}{'step ms':>9}{'images/s':>10}{'efficiency':>12}{'weak':>9}",
    ]
    for row in slices.scaling(report):
        lines.append(
            f"{row['slice']:12}{row['chips']:6}{row['batch']:7g}{'yes' if row['fits'] else 'no':>6}"
            f"{1e3 * row['step_s']:9.1f}{row['images_per_s']:10.0f}"
            f"{100 * row['efficiency']:11.1f}%{100 * row['weak']:8.1f}%"
        )
    listed = ", ".join(slices.smallest(report)) or "none with whole images on every chip"
    lines.append(f"smallest slices for a global batch of {report['batch_size']} at these settings: {listed}")
    return "\n".join(lines)


def search(config: ConfigDict, topology: str) -> dict:
    """`compile_for` with the first settings that fit, which it prints as flags; TooLarge where none does."""
    kind, _, shape = topology.partition(":")
    _devices(topology)  # complains of it, if need be
    for settings in ({}, *slices.next_settings(config, slices.chips_of(shape))):
        changed = copy.deepcopy(config)
        changed.update_from_flattened_dict(settings)
        shown = " ".join(f"--config.{k}={v}" for k, v in settings.items()) or "as configured"
        try:
            report = compile_for(changed, topology)
        except TooLarge as error:
            failed = error
        else:
            held, usable = slices.held_gb(report), CHIPS[kind].usable_gb
            if held <= usable:
                print(f"{shown}: fits\n", flush=True)
                return report
            failed = TooLarge(f"does not fit: {held:.2f} GB, and a chip offers {usable:.2f}")
        print(f"{shown}: {failed}", flush=True)
    raise failed
