"""The tiles that a config names: which source, checked, and this process's share of the batches."""

import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils

from ktda_jax import UserError
from ktda_jax import config as configs
from ktda_jax.data import pipeline, reading
from ktda_jax.data.check import check_split
from ktda_jax.data.sources import FolderSource
from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.training.program import model_config_of, teacher_identity


def open_source(config, split: str, *, build: bool = True):
    """The tiles of a split, from TFDS array_records, which `build` makes where they can be, or from a folder."""
    data, num_classes = config.data, len(configs.classes_of(config).classes)
    if data.source == "folder":
        if data.root is None:
            raise UserError("config.data.root is not set; give the folder that holds img_dir/ and ann_dir/")
        raw = dict(bands=data.bands, scale=data.scale, nodata=data.nodata, label_map=reading.label_map_of(data))
        return FolderSource(data.root, split, num_classes=num_classes, **raw)
    from ktda_jax.data import tfds_source

    if build and jax.process_index() == 0:
        tfds_source.prepare(data.name, data.root, data.manual_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data set prepared")
    return tfds_source.TfdsSource(data.name, split, data_dir=data.root, num_classes=num_classes)


def eval_source(config, split: str):
    """Batches of a split for evaluation, and the checked split's fingerprint."""
    source = open_source(config, split)
    summary = check_split(source, num_threads=config.data.num_threads)
    batches = pipeline.eval_batches(
        source, crop=tuple(config.data.crop), batch_size=config.eval_batch_size, **processes(config)
    )
    return batches, summary.fingerprint


def features_folder(config) -> pathlib.Path:
    """Where the teacher's precomputed features of the training split are."""
    return pathlib.Path(config.teacher.features or f"features/{config.data.name.replace('/', '_')}")


def open_features(config, fingerprint: str) -> TeacherFeatures | None:
    """The training split's teacher features if config.teacher wants them, checked against teacher and tiles."""
    if not config.distill or config.teacher.mode != "precomputed":
        return None
    identity = teacher_identity(config, model_config_of(config))
    if identity["sha256"] is None:  # not named: then it is the one that made the features
        identity |= {"seed": None, "sha256": None}
    wanted = {"split": config.data.train_split, "tiles": fingerprint, **identity, "teacher": None}
    return TeacherFeatures(features_folder(config), wanted)


def processes(config) -> dict[str, Any]:
    return dict(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.num_threads,
    )
