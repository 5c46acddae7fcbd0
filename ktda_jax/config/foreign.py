"""A teacher that is not ours (data/foreign_writer.py): the model's settings follow the manifest of its features.

What is found is kept in config.json, so that the model is known where the features are not.
"""

import dataclasses
import pathlib

from ktda_jax import UserError
from ktda_jax.config import workdir as records
from ktda_jax.config.data import Data
from ktda_jax.config.settings import Settings, StoredTaps, Teacher
from ktda_jax.data import foreign_features
from ktda_jax.data.foreign_features import AGAIN, Manifest
from ktda_jax.data.paths import expand

UNLABELLED = "unlabelled"  # the split that images without labels stand for


def features_folder(stored: StoredTaps, data: Data, *, of_windows: bool = False) -> pathlib.Path:
    """Where the teacher's precomputed features of the training split are; or those `of_windows` without labels."""
    folder = expand(stored.features or f"features/{data.name.replace('/', '_')}")
    return folder.with_name(f"{folder.name}_{UNLABELLED}") if of_windows else folder


def resolved(settings: Settings) -> Settings:
    """The settings with width, patch or grid, and taps of the teacher whose features are asked for, if it is not ours.

    UserError for settings that it cannot serve.
    """
    if not _asked(settings) or settings.model.teacher.foreign is not None:
        return settings
    folder = features_folder(settings.teacher, settings.data)
    if not foreign_features.are_there(folder):
        return settings
    told = foreign_features.read_manifest(folder)
    _check(settings, told, folder)
    count = len(told.taps)
    taps = settings.model.teacher.taps or tuple(-(-(level + 1) * count // 4) for level in range(4))
    if len(taps) != 4 or not any(taps) or not all(tap is None or 1 <= tap <= count for tap in taps):
        listed = ", ".join(told.taps)
        raise UserError(
            f"config.model.teacher.taps is {taps}, and the features in {folder} are of {count} tap(s), {listed}; give "
            f"four numbers from 1 to {count}, one for each level, or None, which spreads them evenly"
        )
    nothing = {field.name: None for field in dataclasses.fields(Teacher)}
    found = {"foreign": told.name, "width": told.width, "patch": told.patch, "depth": count, "heads": 1, "taps": taps}
    grid = settings.model.grid if told.patch is not None else told.grid
    model = dataclasses.replace(settings.model, teacher=Teacher(**{**nothing, **found}), grid=grid)
    return dataclasses.replace(settings, model=model, teacher=dataclasses.replace(settings.teacher, dtype=told.dtype))


def as_begun(workdir: pathlib.PurePath, settings: Settings) -> Settings:
    """The same for a training of which there is a workdir, but the features no more: its config.json knows the teacher.

    So it can be evaluated; to go on it needs them.
    """
    if not _asked(settings) or settings.model.teacher.foreign is not None or not (workdir / records.CONFIG).exists():
        return settings
    folder = features_folder(settings.teacher, settings.data)
    saved = records.read(workdir)
    if saved.model.teacher.foreign is None or folder.exists():
        return settings
    model = dataclasses.replace(settings.model, teacher=saved.model.teacher, grid=saved.model.grid)
    stored = dataclasses.replace(settings.teacher, dtype=saved.teacher.dtype)
    return dataclasses.replace(settings, model=model, teacher=stored)


def _asked(settings: Settings) -> bool:
    return settings.distill and settings.teacher.mode == "precomputed"


def check(settings: Settings) -> None:
    """Settings that need the teacher itself, of one of which there are features alone."""
    name = settings.model.teacher.foreign
    if name is None:
        return
    whose = f"the teacher is {name}, of which there are features alone"
    if settings.distill and settings.teacher.mode != "precomputed":
        raise UserError(f"{whose}; set config.teacher.mode='precomputed'")
    if settings.encodes:
        raise UserError(f"{whose}, and config.model.encoder='teacher' has to run it; leave that out")
    if settings.distill and settings.weights.teacher is not None:
        raise UserError(f"{whose}; leave config.weights.teacher out, or give another config.teacher.features")
    if settings.teacher.bands is not None:
        raise UserError(f"{whose}; leave config.teacher.bands out, which chooses what a teacher of ours sees")
    if settings.distill and (settings.data.unlabelled or not settings.supervised):
        raise UserError(
            f"{whose}, of tiles with labels; images without labels (config.data.unlabelled, config.supervised=False) "
            "take a teacher of ours"
        )


def _check(settings: Settings, told: Manifest, folder: pathlib.Path) -> None:
    data, model = settings.data, settings.model
    if data.rotate and told.views == 2:
        raise UserError(
            f"the features in {folder} are of 2 views of each tile, and config.data.rotate needs 8 (or 1, which is "
            f"turned with the tile): {AGAIN}"
        )
    if told.patch is not None:
        return
    whole = f"the features in {folder} are of {told.grid[0]}x{told.grid[1]} tokens for a whole tile, without a patch"
    if data.cutmix:
        raise UserError(f"{whole}, and config.data.cutmix pastes whole patches; set it to 0")
    if model.align_grid:
        raise UserError(f"{whole}, on which config.model.align_grid cannot put the student's; set it to False")
    if model.grid not in (None, told.grid):
        raise UserError(f"{whole}, and config.model.grid is {model.grid}; leave it None")
    if data.rotate and told.grid[0] != told.grid[1]:
        raise UserError(f"{whole}, which config.data.rotate would turn; set it to False")
