"""Weights of anything that holds some, a training's workdir too: for prediction, conversion and further training."""

import pathlib

from flax import nnx

from ktda_jax import UserError
from ktda_jax.config import checks
from ktda_jax.config import workdir as records
from ktda_jax.config.model import model_of, teacher_arrays
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.models.vit import ViT
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.trust import read_temperature
from ktda_jax.weights import loading
from ktda_jax.weights.folder import READING, Weights


def read(path: str | pathlib.Path, *, teacher_heads: int | None = None, fmm_heads: int | None = None) -> Weights:
    """The best checkpoint of a workdir, or what `loading.read` knows; UserError says in a line what is wrong.

    The numbers of heads are for files that do not tell them.
    """
    if (workdir := records.workdir_at(path)) is not None:
        return from_workdir(workdir)
    return loading.read(path, teacher_heads=teacher_heads, fmm_heads=fmm_heads)


def from_workdir(workdir: pathlib.Path) -> Weights:
    """The best checkpoint of a training (the latest, if none was validated), with what its config says of the data.

    Of several processes each may call it: all read, and none writes.
    """
    settings = records.read(workdir)
    try:
        checks.check(settings)
        model, info = model_of(settings), settings.data.info
    except UserError as error:
        raise UserError(f"{workdir / records.CONFIG} does not describe a training of ours: {error}") from error
    _, params, stats = flat.abstract(lambda: KTDA(model, rngs=nnx.Rngs(0)))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        step = checkpoints.best_step()
        if step is None:
            raise UserError(f"no checkpoint in {workdir / 'checkpoints'}; train first")
        params, stats = checkpoints.restore_model(step, params, stats)
    if model.encoder == "teacher":
        params = {**params, **_encoder(workdir, settings.weights.teacher, model)}
    return Weights(
        kind="ktda", config=model, arrays={**params, **stats}, source={"workdir": str(workdir), "step": step},
        classes=info.classes, palette=info.palette,
        data={name: getattr(settings.data, name) for name in READING}, temperature=read_temperature(workdir, step),
    )  # fmt: skip


def _encoder(workdir: pathlib.Path, path: str | None, model: KTDAConfig) -> flat.Arrays:
    """The frozen encoder's arrays under 'teacher/', from where training had them: no checkpoint holds them."""
    if path is None:
        raise UserError(f"{workdir}: its encoder is a teacher that was random (config.weights.teacher was unset)")
    _, expected, _ = flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))
    try:
        arrays = teacher_arrays(path, expected, model)
    except (UserError, OSError) as error:
        raise UserError(f"{workdir}: its frozen encoder cannot be read: {error}") from error
    return {f"teacher/{k}": v for k, v in arrays.items()}
