"""Starting from a student that was distilled on images without labels (configs/distill.py): its FAM comes along."""

from collections.abc import Mapping

import numpy as np

from ktda_jax import UserError
from ktda_jax.config import workdir as records
from ktda_jax.config.model import teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDAConfig
from ktda_jax.weights.folder import Weights


def fam_of(
    found: Weights, settings: Settings, model: KTDAConfig, shapes: Mapping[str, flat.Arrays]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The FAM and the taps' statistics of a distilled workdir, where the model has such, and what to say of that.

    shapes: the model's parameters and statistics. UserError where the distillation would go on with another teacher.
    """
    path, theirs = settings.weights.student, found.config
    if found.kind != "ktda" or theirs.decoder:
        return {}, []
    fam = {k: v for k, v in found.arrays.items() if k.startswith(("fam/", "taps/"))}
    ours = {k for k in shapes if k.startswith(("fam/", "taps/"))}
    if any(k.startswith("fam/") and (k not in ours or fam[k].shape != shapes[k].shape) for k in fam):
        have, want = ((m.teacher.width, m.align_grid) for m in (theirs, model))
        what = f"for width {want[0]} with align_grid={want[1]}" if model.fam else "none"
        return {}, [
            f"the student comes from {path}; its FAM, for a teacher of width {have[0]} with align_grid={have[1]}, does "
            f"not: this model's is {what}"
        ]
    notes = _same_teacher(found, settings, model) if settings.distill else []
    taken = {k: v for k, v in fam.items() if k in ours}
    with_them = " with the taps' statistics" if "taps/mean" in taken else ""
    return taken, [f"student and FAM{with_them} come from {path}", *notes]


def read_otherwise(found: Weights, settings: Settings, bands: int) -> list[str]:
    """A warning if the student has learnt from images of as many `bands` whose values meant something else."""
    if found.kind != "ktda" or not found.data or found.config.student.bands != bands:
        return []
    was, now = found.data.get("scale"), settings.data.scale
    if was == now:
        return []
    return [f"warning: {settings.weights.student} was trained with config.data.scale={was}, now it is {now}"]


def _same_teacher(found: Weights, settings: Settings, model: KTDAConfig) -> list[str]:
    """UserError unless the teacher of the distillation goes on to teach; or a warning where that cannot be told."""
    path, theirs = settings.weights.student, found.config
    named = f"config.weights.student: {path} was distilled"
    for name, was, now in (
        ("config.model.teacher.taps", theirs.teacher.tapped, model.teacher.tapped),
        ("config.model.standardize_taps", theirs.standardize_taps, model.standardize_taps),
        ("config.model.tap_scales", theirs.tap_scales, model.tap_scales),
        ("config.model.teacher.foreign", theirs.teacher.foreign, model.teacher.foreign),
        ("config.teacher.bands (their positions)", theirs.teacher_bands, model.teacher_bands),
    ):
        if was != now:
            if name.endswith("taps") and isinstance(was, list | tuple):  # layers, which settings count from 1
                was, now = (tuple(None if k is None else k + 1 for k in layers) for layers in (was, now))
            raise UserError(f"{named} with {name}={was}, now it is {now}; set it as it was, or config.distill=False")
    workdir = records.workdir_at(path)
    before = None if workdir is None else records.read(workdir).weights.teacher
    now, stored = settings.weights.teacher, settings.teacher.mode == "precomputed"
    if now is None and not stored:
        raise UserError(
            f"{named} from a teacher ({before or 'which it does not name'}); give it as config.weights.teacher"
        )
    if workdir is None or now is None:
        return [f"warning: nothing tells whether {path} was distilled from this teacher; taken to be so"]
    if before == now:
        return []
    try:
        was = teacher_identity(before, 0, theirs)["sha256"]
    except UserError:
        return [f"warning: {path} was distilled from {before}, which cannot be read any more; taken to be {now}"]
    if was != teacher_identity(now, 0, model)["sha256"]:
        raise UserError(
            f"{named} from the teacher {before}, now config.weights.teacher is {now}, which is another; give the "
            "former, or set config.distill=False"
        )
    return []
