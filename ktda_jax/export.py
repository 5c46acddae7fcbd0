"""`python -m ktda_jax.export --checkpoint=... --format=stablehlo|onnx|hub --output=...`: a model to hand on.

    python -m ktda_jax.export --checkpoint=runs/grass --format=stablehlo --output=grass.stablehlo
    python -m ktda_jax.export --checkpoint=weights/grass --size=256 --format=onnx --output=grass.onnx
    python -m ktda_jax.export --checkpoint=runs/grass --format=hub --license=apache-2.0 --output=grass

The last one writes a folder with a model card, which `hf upload ORG/NAME grass` takes as it is and
`ktda_jax.load_pretrained("hf://ORG/NAME")` reads back. The others are for use without this project: their file holds
the weights, the normalisation and the argmax; no auxiliary head, and a teacher only where that is the encoder.
FILE.json beside it says what goes in and what comes out. StableHLO runs on CPU, CUDA and TPU with nothing but jax and
flatbuffers:

    import numpy as np
    from jax import export, jit

    run = jit(export.deserialize(open("grass.stablehlo", "rb").read()).call)
    images = np.zeros((2, 256, 256, 3), np.uint8)  # any number of images; size, bands and stretch as in the .json
    labels = run(images)["labels"]  # uint8 (2, 256, 256); "probabilities": float32 (2, 256, 256, classes)

and ONNX anywhere that ONNX does:

    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession("grass.onnx")
    images = np.zeros((2, 256, 256, 3), np.uint8)  # any number of images; size, bands and stretch as in the .json
    (labels,) = session.run(["labels"], {"images": images})  # uint8 (2, 256, 256); or "probabilities"

Height and width are fixed: the matrices that resize feature maps are computed from them when the model is traced. The
probabilities are always there, since they cost a softmax, and leave the device only where they are asked for.
"""

import sys

from absl import flags

from ktda_jax import UserError, cli

if __name__ == "__main__":  # flags are one namespace for all that is imported, and other verbs have the same ones
    flags.DEFINE_string("checkpoint", None, "The workdir of a training, a folder of ktda_jax.convert, or a .pth file.")
    flags.DEFINE_string("format", None, "stablehlo (for JAX on any device), onnx, or hub (for Hugging Face's).")
    flags.DEFINE_string("output", None, "The file to write; of hub the folder.")
    flags.DEFINE_string("license", None, "Of hub: the weights' licence as the hub names it, apache-2.0 or cc-by-4.0.")
    flags.DEFINE_string("size", None, "Height and width in pixels: 256, or 256x512; default the crop of the training.")
    flags.DEFINE_string("dtype", "float32", "What it computes in: float32, or, for stablehlo, bfloat16.")
    cli.define_heads()
    PARSE = cli.parsed(cli.parser("checkpoint", "format", "output"))  # before the imports below, which take seconds

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from importlib import metadata

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging as absl_logging
from flax import nnx
from jax import export as jax_export

from ktda_jax.config.workdir import write_json
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.paths import expand
from ktda_jax.models import flat
from ktda_jax.models.convnext import Block
from ktda_jax.models.ktda import KTDA
from ktda_jax.models.vit import Attention
from ktda_jax.prediction import segmenter
from ktda_jax.reports import hub
from ktda_jax.weights.folder import Weights, check_free

FORMATS = ("stablehlo", "onnx")  # of one file
DTYPES = ("float32", "bfloat16")
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST_FILE = 2**31 - 2**24  # both formats address 2 GiB; the program besides the weights is a few MB


def run(
    checkpoint: str, output: str | pathlib.Path, *, format: str, size: tuple[int, int] | None = None,
    dtype: str = "float32", teacher_heads: int | None = None, fmm_heads: int | None = None,
) -> dict:  # fmt: skip
    """Writes `output` and `output`.json, and returns what the latter says; UserError or OSError if it cannot be done.

    size: (height, width) in pixels; None: the crop of the training.
    """
    if format not in FORMATS:
        raise UserError(f"--format is {format!r}; choose {', '.join(FORMATS)} or hub")
    if dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}; choose {' or '.join(DTYPES)}")
    if (format, dtype) == ("onnx", "bfloat16"):
        raise UserError("--dtype=bfloat16 is for stablehlo; most ONNX runtimes convolve in float32 alone")
    output = expand(output)
    beside = output.with_name(output.name + ".json")
    check_free(output)
    check_free(beside)
    convert = _importable(format)
    found = hub.whole_model(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    if found.config.num_classes > IGNORE:
        raise UserError(f"{checkpoint} has {found.config.num_classes} classes; 8-bit labels hold at most {IGNORE}")
    height, width = size = _size(found, size)
    shape = (height, width, found.config.student.bands)
    infer, arrays = _inference(found, jnp.dtype(dtype), for_onnx=format == "onnx")
    flat.check_finite(arrays, f"{checkpoint} in {dtype}")
    needed = sum(array.nbytes for array in arrays.values())
    if needed > LARGEST_FILE:
        hint = "; --dtype=bfloat16 halves them" if (format, dtype) == ("stablehlo", "float32") else ""
        holds = f"a {format} file holds {LARGEST_FILE / 1e9:.2f}"
        raise UserError(f"the weights take {needed / 1e9:.2f} GB, and {holds}{hint}")
    output.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output.parent).free
    if needed > free:
        raise UserError(f"{output} needs {needed / 1e9:.2f} GB, but {output.parent} has only {free / 1e9:.2f} GB free")

    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        temporary.touch()  # a place that will not do is said before minutes are spent
        content = convert(infer, shape)
        description = _describe(found, arrays, size, format, dtype)
        description |= {"file": output.name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        temporary.write_bytes(content)
        write_json(beside, description)
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
        if not output.exists():
            beside.unlink(missing_ok=True)
    return description


def _importable(format: str) -> Callable:
    """The converter, once what it needs besides JAX is known to be there."""
    try:
        if format == "onnx":
            import jax2onnx  # noqa: F401

            return _to_onnx
        import flatbuffers  # noqa: F401

        return _to_stablehlo
    except ImportError as error:
        raise UserError(f"--format={format} needs {error.name}: pip install -e '.[export]'") from error


def _size(found: Weights, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is None and found.data is None:
        raise UserError("these weights do not say how large their training tiles were; give --size, such as 256")
    size = tuple(size or found.data["crop"])
    if not 32 <= min(size) <= max(size) <= segmenter.LARGEST:
        raise UserError(f"--size is {size[0]}x{size[1]}; give 32 to {segmenter.LARGEST} pixels a side")
    return size


def _inference(found: Weights, dtype, *, for_onnx: bool) -> tuple[Callable, Mapping[str, jax.Array]]:
    """images (B, H, W, bands) uint8 -> labels and probabilities; and the arrays that this holds, by our paths."""
    config = dataclasses.replace(found.config, aux_channels=0)  # the auxiliary head shapes the loss alone

    def build():
        model = KTDA(config, own_encoder=True, dtype=dtype, rngs=nnx.Rngs(0))
        for _, module in nnx.iter_modules(model):
            # By default attention goes by this process's device, and cuDNN's is for one GPU and one batch size. ONNX
            # knows neither branches by platform nor our loops.
            if isinstance(module, Attention):
                module.implementation = "unrolled" if for_onnx else "xla"
            if isinstance(module, Block):
                module.implementation = "conv" if for_onnx else None
        return model

    graphdef, params, stats = flat.abstract(build)
    ours = {k: v for k, v in found.arrays.items() if k in params or k in stats}
    flat.check_shapes(ours, {**params, **stats}, "the weights")
    # Kernels are converted before each product anyway, vectors are used in float32: the result is the same.
    params = {k: jnp.asarray(ours[k], dtype if v.ndim > 1 else v.dtype) for k, v in params.items()}
    stats = {k: jnp.asarray(ours[k], v.dtype) for k, v in stats.items()}

    def infer(images):
        _, labels, probabilities = segmenter.infer(graphdef, found.temperature, params, stats, images)
        return {"labels": labels, "probabilities": probabilities}

    return infer, {**params, **stats}


def _images(shape: tuple[int, int, int]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((*jax_export.symbolic_shape("batch"), *shape), np.uint8)


def _to_stablehlo(infer: Callable, shape: tuple[int, int, int]) -> bytes:
    """Lowered for every platform; lax.platform_dependent keeps a branch for each."""
    return bytes(jax_export.export(jax.jit(infer), platforms=PLATFORMS)(_images(shape)).serialize())


def _to_onnx(infer: Callable, shape: tuple[int, int, int]) -> bytes:
    import jax2onnx

    # Warnings for each shape that is left out, and stacks for plugins of other libraries that do not import.
    for name in ("onnx_ir", "jax2onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names = dict(input_names=["images"], output_names=["labels", "probabilities"])
    # jax2onnx writes the body of an inner jit in its place, but asks JAX's private modules how to; JAX 0.12 no longer
    # has what 0.13.0 to 0.17.1 ask for (2026-11-26). Traced without jit there is nothing to ask, and the graph
    # is the same.
    with jax.disable_jit():
        return jax2onnx.to_onnx(infer, [_images(shape)], model_name="ktda", **names).SerializeToString()


def _describe(found: Weights, arrays, size: tuple[int, int], format: str, dtype: str) -> dict:
    config, data = found.config, found.data or {}
    shape = ["batch", *size]
    packages = ("ktda-jax", "jax", "flax") + (("jax2onnx", "onnx") if format == "onnx" else ())
    described = {
        "format": format,
        "dtype": dtype,
        "input": {
            "name": "images",
            "dtype": "uint8",
            "shape": [*shape, config.student.bands],
            "bands": data.get("bands") or (["red", "green", "blue"] if config.student.bands == 3 else None),
            "rgb": list(config.rgb),  # positions among the bands
            "scale": data.get("scale"),  # what became 0 and 255; None: 8-bit values as they are stored
            "nodata": data.get("nodata"),
            "trained_on": data.get("name"),
        },
        "outputs": {
            "labels": {"dtype": "uint8", "shape": shape},
            "probabilities": {"dtype": "float32", "shape": [*shape, config.num_classes]},
        },
        "temperature": found.temperature,  # that the probabilities have been made with
        "classes": found.classes,
        "palette": found.palette,
        "nodata": IGNORE,
        "source": {**found.source, "parameters": flat.count(arrays), "parameters_sha256": _fingerprint(found, arrays)},
        "versions": {name: _version(name) for name in packages},
    }
    return described | ({"platforms": list(PLATFORMS)} if format == "stablehlo" else {})


def _fingerprint(found: Weights, names) -> str:
    """sha256 of the source's arrays, float32 in the order of their names: the same for every dtype and format."""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(found.arrays[name], np.float32))
    return digest.hexdigest()


def _version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def main(_: list[str]) -> None:
    given, start = flags.FLAGS, time.monotonic()
    if given.size and not re.fullmatch(r"\d+(x\d+)?", given.size):
        sys.exit(f"error: --size is {given.size!r}; give 256, or 256x512 for height and width")
    absl_logging.set_verbosity(absl_logging.WARNING)
    cli.stop_cleanly()
    if given.format == "hub" and (given.size or given.dtype != "float32"):
        sys.exit("error: --size and --dtype are for stablehlo and onnx; the hub's folder has the weights as they are")
    if given.format != "hub" and given.license:
        sys.exit("error: --license is for --format=hub, which writes a model card")
    sides = [int(side) for side in given.size.split("x")] if given.size else []
    try:
        if given.format == "hub":
            heads = dict(teacher_heads=given.teacher_heads, fmm_heads=given.fmm_heads)
            found = hub.publish(given.checkpoint, given.output, licence=given.license, **heads)
            print(
                f"{given.output}: {flat.count(found.arrays) / 1e6:.1f} M values and README.md, the card to read and to "
                f"fill in; `hf upload ORG/NAME {given.output}` publishes it"
            )
            return
        made = run(
            given.checkpoint, given.output, format=given.format, dtype=given.dtype,
            size=(sides[0], sides[-1]) if sides else None, teacher_heads=given.teacher_heads, fmm_heads=given.fmm_heads,
        )  # fmt: skip
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        sys.exit(f"error: cannot write --output={given.output}: {error.strerror or error}{where}")
    print(
        f"{given.output}: {made['bytes'] / 1e6:.1f} MB, images {json.dumps(made['input']['shape'])} "
        f"({time.monotonic() - start:.0f} s); {made['file']}.json says what goes in and what comes out"
    )


if __name__ == "__main__":
    cli.run(main, PARSE)
