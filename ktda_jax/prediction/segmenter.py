"""A trained model for prediction in Python: `ktda_jax.load_pretrained`."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import nnx

from ktda_jax import UserError
from ktda_jax.data.images import read_image
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDA, full_size
from ktda_jax.models.layers import at_least_float32
from ktda_jax.training import trained
from ktda_jax.weights import folder, loading

LARGEST = 2048  # pixels a side: attention over the whole image


@dataclasses.dataclass(frozen=True)
class Prediction:
    labels: np.ndarray  # uint8 (H, W), or (B, H, W)
    probabilities: np.ndarray  # float32 (H, W, classes), or (B, H, W, classes)


class Segmenter:
    """A KTDA model with its weights. `classes` and `palette` are None where the weights came without names."""

    def __init__(self, found: folder.Weights, dtype=jnp.float32):
        if found.kind != "ktda":
            raise UserError(f"these weights are a {found.kind}; prediction needs a whole KTDA model")
        self.config, self.classes, self.palette, self.source = found.config, found.classes, found.palette, found.source
        self.temperature = found.temperature
        self.data = found.data  # how training read its images, where that is known
        graphdef, params, stats = flat.abstract(
            lambda: KTDA(found.config, own_encoder=True, dtype=dtype, rngs=nnx.Rngs(0))
        )
        ours = {k: v for k, v in found.arrays.items() if k in params or k in stats}
        flat.check_shapes(ours, {**params, **stats}, "the weights")
        self.graphdef = graphdef
        self.params = {k: jnp.asarray(ours[k], v.dtype) for k, v in params.items()}
        self.stats = {k: jnp.asarray(ours[k], v.dtype) for k, v in stats.items()}
        self._run = jax.jit(functools.partial(infer, graphdef, found.temperature))

    def logits(self, images: np.ndarray) -> jax.Array:
        """images: uint8 or float 0..255 (B, H, W, 3) -> float32 (B, h, w, classes) at the head's resolution."""
        return self._run(self.params, self.stats, images)[0]

    def predict(self, image: np.ndarray | str | pathlib.Path) -> Prediction:
        """image: 8-bit RGB, an array (H, W, 3) or (B, H, W, 3) or an image file -> labels and probabilities.

        UserError names what does not fit. Up to 2048 px a side, seen as one, which is slow where the FMM is a
        transformer (time grows with the square of the pixels); `python -m ktda_jax.predict` maps scenes in windows.
        """
        if isinstance(image, str | pathlib.Path):
            if self.config.student.bands != 3:
                raise UserError(
                    f"the model takes {self.config.student.bands} bands; give them as an array, uint8 (H, W, bands), "
                    "scaled as in training, instead of a file"
                )
            image = read_image(str(image))
        image = np.asarray(image)
        bands = self.config.student.bands
        if image.dtype != np.uint8 or image.ndim not in (3, 4) or image.shape[-1] != bands or not len(image):
            raise UserError(
                f"the image is {image.dtype} of shape {image.shape}; give uint8 (H, W, {bands}) or (B, H, W, {bands})"
            )
        if not 32 <= min(image.shape[-3:-1]) <= max(image.shape[-3:-1]) <= LARGEST:
            raise UserError(f"the image is {image.shape[-3]} x {image.shape[-2]} pixels; give 32 to {LARGEST} a side")
        batch = image if image.ndim == 4 else image[None]
        labels, probabilities = jax.device_get(self._run(self.params, self.stats, batch)[1:])
        return Prediction(labels, probabilities) if image.ndim == 4 else Prediction(labels[0], probabilities[0])


def infer(graphdef, temperature: float, params, stats, images):
    """images: uint8 (B, H, W, bands) -> logits (B, h, w, classes), labels uint8 (B, H, W), probabilities float32.

    temperature: by which the logits are divided for the probabilities, where that is not 1.
    """
    logits = at_least_float32(flat.merge(graphdef, params, stats)(images).logits)
    full = full_size(logits, images.shape[1:3])
    return (
        logits,
        jnp.argmax(full, -1).astype(jnp.uint8),
        jax.nn.softmax(full if temperature == 1 else full / temperature, -1),
    )


def load_pretrained(
    path: str | pathlib.Path, *, dtype=jnp.float32, teacher_heads: int | None = None, fmm_heads: int | None = None,
    say: Callable[[str], None] = logging.warning,
) -> Segmenter:  # fmt: skip
    """See `ktda_jax.load_pretrained`; for `say` see `find`."""
    return Segmenter(find(path, teacher_heads=teacher_heads, fmm_heads=fmm_heads, say=say), dtype)


def find(
    path: str | pathlib.Path, *, teacher_heads: int | None = None, fmm_heads: int | None = None,
    say: Callable[[str], None] = logging.warning,
) -> folder.Weights:  # fmt: skip
    """The weights of anything that `load_pretrained` takes; UserError says in a line what is wrong.

    `say` gets a line on what was assumed of them, if anything was.
    """
    heads = dict(teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    found = trained.read(path, **heads)
    if found.kind == "ktda" and not found.config.decoder:
        raise UserError(
            f"{path} holds a student that was distilled without labels, so it has no decoder; train one on labelled "
            f"tiles with --config.weights.student={path}"
        )
    loading.check_heads(path, found, **heads)
    if line := loading.assumptions(path, found):
        say(line)
    return found
