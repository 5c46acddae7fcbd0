"""A model for Hugging Face's hub: our folder of weights with a model card, as `hf upload ORG/NAME FOLDER` takes it."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping

from ktda_jax import UserError
from ktda_jax.config.workdir import workdir_at
from ktda_jax.data.paths import absolute, expand, place
from ktda_jax.prediction import segmenter
from ktda_jax.reports import card
from ktda_jax.weights import files, folder
from ktda_jax.weights.folder import Weights


def publish(
    checkpoint: str, output: str | pathlib.Path, *, licence: str | None = None, teacher_heads: int | None = None,
    fmm_heads: int | None = None,
) -> Weights:  # fmt: skip
    """Writes the folder `output`, and returns what it holds. UserError or OSError if it cannot be done.

    The frozen teacher stays here, unless it is the encoder: it is its authors' to publish. So do the paths of this
    machine. licence: as the hub names it; None: the card says that it is to be filled in.
    """
    if licence is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", licence):
        raise UserError(f"--license is {licence!r}; give the hub's word for it, such as apache-2.0, mit or cc-by-4.0")
    output = expand(output)
    folder.check_free(output)
    found = whole_model(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    kept = {k: v for k, v in found.arrays.items() if found.config.encoder == "teacher" or not k.startswith("teacher/")}
    found = dataclasses.replace(found, arrays=kept, source=_without_paths(found.source))
    workdir, name = workdir_at(checkpoint), str(checkpoint).removeprefix(files.HUB)
    if name == str(checkpoint):
        name = absolute(place(checkpoint)).name.removesuffix(".pth")
    trained = None if workdir is None else card.training(workdir, found.source["step"])
    folder.save(output, found, {"README.md": card.render(found, name, trained, licence)})
    return found


def whole_model(checkpoint: str, *, teacher_heads: int | None = None, fmm_heads: int | None = None) -> Weights:
    """Of anything that `load_pretrained` takes; UserError for less than a whole KTDA model."""
    try:
        found = segmenter.find(checkpoint, teacher_heads=teacher_heads, fmm_heads=fmm_heads)
    except OSError as error:
        raise UserError(f"cannot read --checkpoint={checkpoint}: {error}") from error
    if found.kind != "ktda":
        raise UserError(f"{checkpoint} holds a {found.kind}; an export needs a whole KTDA model")
    return found


def _without_paths(source: Mapping) -> dict:
    """Where weights came from, without this machine's folders."""
    shown = {}
    for key, value in source.items():
        if isinstance(value, Mapping):
            shown[key] = _without_paths(value)
        else:
            shown[key] = card.told(value) if key in ("workdir", "path") else value
    return shown
