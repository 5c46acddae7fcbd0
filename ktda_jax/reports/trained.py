"""The model of a workdir on one device, for looking at what it does."""

import dataclasses
import pathlib

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from ktda_jax import UserError, sharding
from ktda_jax.config.model import compute_dtype
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.models.flat import Arrays
from ktda_jax.models.ktda import KTDA, KTDAConfig
from ktda_jax.training import evaluate, predicted, whole
from ktda_jax.training.trained import from_workdir


@dataclasses.dataclass(frozen=True)
class Trained:
    model: KTDAConfig
    step: int  # of the checkpoint
    dtype: jnp.dtype
    mesh: Mesh
    graphdef: nnx.GraphDef
    params: Arrays
    stats: Arrays
    predictor: predicted.Predictor


def load(workdir: pathlib.Path, settings: Settings) -> Trained:
    """The best checkpoint so far; UserError where there is none that fits."""
    if not whole.steps(workdir / "checkpoints"):  # an empty one is said to be damaged
        raise UserError("no checkpoint in the workdir yet")
    dtype = compute_dtype(settings.dtype)
    found = from_workdir(workdir)
    if not found.config.decoder:
        raise UserError("it was distilled without labels, so there is no map to look at")
    graphdef, params, stats = flat.abstract(lambda: KTDA(found.config, own_encoder=True, dtype=dtype, rngs=nnx.Rngs(0)))
    params, stats = ({k: found.arrays[k] for k in names} for names in (params, stats))
    mesh = sharding.make_mesh(1, 1)
    model = predicted.Model(graphdef, None, found.config.num_classes, found.config.student.bands)
    step = evaluate.make_eval_step(graphdef, found.config.num_classes, mesh)
    predictor = predicted.Predictor(model, mesh, tuple(settings.data.crop), settings.eval_batch_size, step)
    return Trained(found.config, found.source["step"], dtype, mesh, graphdef, params, stats, predictor)
