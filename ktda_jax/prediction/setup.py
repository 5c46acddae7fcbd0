"""What `predict` and `evaluate` do alike: a model, scenes as it reads them, the compiled step, and the run itself."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from ktda_jax import UserError
from ktda_jax.data.addresses import Image
from ktda_jax.data.datasets import IGNORE
from ktda_jax.data.raster import Scene
from ktda_jax.prediction import mapping, segmenter
from ktda_jax.prediction.files import Outputs
from ktda_jax.prediction.outputs import Legend
from ktda_jax.tiling import device
from ktda_jax.tiling.windows import usual_overlap


def say(text: str) -> None:
    print(text, flush=True)


def load(checkpoint: str, *, teacher_heads: int | None, fmm_heads: int | None) -> segmenter.Segmenter:
    """In float32 on CPU and bfloat16 elsewhere; UserError says in a line what is wrong."""
    model = segmenter.load_pretrained(
        checkpoint, dtype=jnp.float32 if _on_cpu() else jnp.bfloat16, teacher_heads=teacher_heads, fmm_heads=fmm_heads,
        say=lambda line: say(f"warning: {line}"),
    )  # fmt: skip
    if model.config.num_classes > IGNORE:
        raise UserError(f"the model has {model.config.num_classes} classes; a map holds at most {IGNORE}")
    return model


def _on_cpu() -> bool:
    return jax.default_backend() == "cpu"


def open_scenes(
    model: segmenter.Segmenter, inputs: Sequence[Image], *, bands: Sequence[int] | None,
    scale: Sequence[float] | None, nodata: float | None, polygonize=False, written=True,
    failures: list[UserError] | None = None,
) -> list[Scene]:  # fmt: skip
    """Read as in the model's training, but for what the flags say, of which a warning tells. See `check_scenes`."""
    count, trained = model.config.student.bands, mapping.trained_reading(model.data)
    reading = mapping.asked_reading(trained, count, bands, scale, nodata)
    scenes = mapping.check_scenes(
        inputs, reading, count, say, polygonize=polygonize, written=written, failures=failures
    )  # fmt: skip
    for line in mapping.differences(trained, reading, scenes, count) if model.data is not None else ():
        say(f"warning: {line}")
    return scenes


def step_of(
    model: segmenter.Segmenter, scenes: int, *, tile: int | None, overlap: int | None, batch_size: int | None, tta: bool
) -> tuple[device.Step, int]:  # fmt: skip
    """The program that maps tiles, and by how much they overlap; says so of that many scenes."""
    size = (tile, tile) if tile else tuple((model.data or {}).get("crop") or model.config.teacher.image_size)
    overlap = usual_overlap(size) if overlap is None else overlap
    mapping.check_tiles(size, overlap)
    found = device.of_segmenter(model, tta=tta)
    step = device.Step(found, size, batch_size or (1 if _on_cpu() else 4) * jax.local_device_count())
    say(
        f"{scenes} scene{'s' * (scenes > 1)}, tiles of {size[0]} x {size[1]} overlapping by {overlap}, "
        f"{step.batch_size} at once on {jax.local_device_count()} x {jax.devices()[0].device_kind}"
    )
    return step, overlap


def legend_of(model: segmenter.Segmenter) -> Legend:
    return Legend.of(model.config.num_classes, model.classes, model.palette)


def map_scenes(
    model: segmenter.Segmenter, checkpoint: str, scenes: Sequence[Scene], outputs: Sequence[Outputs | None],
    step: device.Step, *, overlap: int, cog=False, **how,
) -> dict[str, float]:  # fmt: skip
    """`mapping.map_scenes` with what the model says of itself; says how fast it was. UserError if memory is short."""
    tags = {"CHECKPOINT": str(checkpoint), "SOFTWARE": "ktda_jax"}
    if model.temperature != 1 and any(each and (each.probabilities or each.confidence) for each in outputs):
        tags["TEMPERATURE"] = f"{model.temperature:.4g}"
    try:
        used = mapping.map_scenes(
            scenes, outputs, step, legend_of(model), overlap=overlap, rgb=model.config.rgb, cog=cog, tags=tags, say=say,
            temperature=model.temperature, **how,
        )  # fmt: skip
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        words = str(error).strip().partition("\n")[0]
        raise UserError(f"{words or 'out of memory'}; a smaller --batch_size or --tile takes less memory") from error
    rate = used["pixels"] / used["seconds"] / 1e6
    say(f"{used['pixels'] / 1e6:.3g} Mpixel in {used['seconds']:.1f} s, {rate:.3g} Mpixel/s")
    return used
