"""The tiles that a config names: which source, checked, and this process's share of the batches."""

import pathlib
from typing import Any

import jax
from jax.experimental import multihost_utils

from ktda_jax import UserError
from ktda_jax.config.settings import Data, StoredTaps
from ktda_jax.data import classes, images, pipeline, reading
from ktda_jax.data.check import SplitSummary, check_split
from ktda_jax.data.paths import expand
from ktda_jax.data.sources import FolderSource, Source, labels_are
from ktda_jax.data.teacher_features import TeacherFeatures


def open_source(data: Data, split: str, *, build: bool = True) -> Source:
    """The tiles of a split, from TFDS array_records, which `build` makes where they can be, or from a folder."""
    num_classes = data.info.num_classes
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


def eval_source(data: Data, split: str, batch_size: int) -> tuple[Any, SplitSummary, list[str]]:
    """Batches of a split for evaluation, what was found in it, and what makes one doubt its labels."""
    source = open_source(data, split)
    summary = check_split(source, num_threads=data.num_threads)
    batches = pipeline.eval_batches(source, crop=data.crop, batch_size=batch_size, **processes(data.num_threads))
    return batches, summary, doubts(data, source, split, summary)


def holds_jpeg(source: Source) -> bool:
    """Whether images are JPEGs, which versions of GDAL do not decode alike."""
    return any(path.lower().endswith((".jpg", ".jpeg")) for path in getattr(source, "image_paths", ()))


def may_hide(source: Source) -> bool:
    """Whether alpha bands or masks may say where images have no data: former versions took some of these for data."""
    plain = not isinstance(source, FolderSource) or source.plain
    return not plain and any(map(images.may_hide, source.image_paths))


def doubts(data: Data, source: Source, split: str, summary: SplitSummary) -> list[str]:
    """What would train or score as silent garbage, one line each."""
    trained = split == data.train_split
    return classes.doubts(
        summary.pixels, summary.ignored, data.info.classes, split=split, trained=trained, made=labels_are(source)
    )


def features_folder(stored: StoredTaps, data: Data) -> pathlib.Path:
    """Where the teacher's precomputed features of the training split are."""
    return expand(stored.features or f"features/{data.name.replace('/', '_')}")


def open_features(folder: pathlib.Path, identity: dict[str, Any], split: str, fingerprint: str) -> TeacherFeatures:
    """A split's teacher features, checked against teacher (`config.model.teacher_identity`) and tiles."""
    if identity["sha256"] is None:  # not named: then it is the one that made the features
        identity = identity | {"seed": None, "sha256": None}
    return TeacherFeatures(folder, {"split": split, "tiles": fingerprint, **identity, "teacher": None})


def processes(num_threads: int | None) -> dict[str, Any]:
    return dict(
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=num_threads,
    )
