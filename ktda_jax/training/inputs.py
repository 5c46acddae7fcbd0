"""The images that a config names: which sources, checked, and this process's share of the batches."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from ktda_jax import UserError
from ktda_jax.config.checks import TEACHERS
from ktda_jax.config.data import Data, listed
from ktda_jax.config.foreign import UNLABELLED, features_folder
from ktda_jax.config.model import model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.config.workdir import READING
from ktda_jax.data import buckets, classes, folds, images, pipeline, reading, staging, unlabelled
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.check import SplitSummary
from ktda_jax.data.foreign_features import ForeignFeatures
from ktda_jax.data.geometry import Rare
from ktda_jax.data.mixture import Mixture
from ktda_jax.data.paths import place
from ktda_jax.data.remembered import Checks
from ktda_jax.data.sources import IMAGE_DIR, LABEL_DIR, FolderSource, Source, labels_are, read_tile
from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.data.unlabelled import UnlabelledSource, UnlabelledSummary
from ktda_jax.training import foreign

CAPTURED = 0.9  # of the rare crops, by one class
SAMPLED = 64  # tiles whose values are compared with those of images without labels
HELD_OUT = 512  # windows; of many scenes a tenth would take longer to score than to train on the rest


def open_source(data: Data, split: str, *, build: bool = True) -> Source:
    """The tiles of a split, from TFDS array_records, which `build` makes where they can be, or from a folder.

    With config.data.folds `data.validation` is the area of the training split that is held out, and the training split
    the others.
    """
    if data.folds is None or split not in (data.train_split, data.validation):
        return _open_whole(data, split, build)
    whole, held_out = _open_whole(data, data.train_split, build), split == data.validation
    return folds.part(whole, data.folds, data.fold, held_out=held_out, num_threads=data.num_threads)


def _open_whole(data: Data, split: str, build: bool) -> Source:
    num_classes = data.info.num_classes
    if data.source == "folder":
        if data.root is None:
            raise UserError("config.data.root is not set; give the folder that holds img_dir/ and ann_dir/")
        raw = dict(bands=data.bands, scale=data.scale, nodata=data.nodata, label_map=reading.label_map_of(data))
        return FolderSource(_staged(data.root, split), split, num_classes=num_classes, **raw)
    from ktda_jax.data import tfds_source

    if data.root is not None and buckets.is_remote(data.root):  # built elsewhere
        built = tfds_source.find_built(data.name, place(data.root))
        return tfds_source.TfdsSource(staging.staged(place(built), _say), split, num_classes=num_classes)
    if build and jax.process_index() == 0:
        tfds_source.prepare(data.name, data.root, data.manual_dir)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data set prepared")
    return tfds_source.TfdsSource(data.name, split, data_dir=data.root, num_classes=num_classes)


def _staged(root: str, split: str) -> str | pathlib.Path:
    """A local root with the split's tiles."""
    if not buckets.is_remote(root):
        return root
    images, _ = (staging.staged(place(root) / kind / split, _say) for kind in (IMAGE_DIR, LABEL_DIR))
    return images.parent.parent


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def checks_of(workdir: pathlib.Path) -> Checks:
    """The checks of tiles that commands in this workdir have made."""
    return Checks(workdir / "checked.json", reading=READING)


def eval_source(
    data: Data, split: str, batch_size: int, known: Checks | None = None
) -> tuple[Any, SplitSummary, list[str]]:
    """A split for evaluation, what was found in it, and what makes one doubt its labels."""
    source = open_source(data, split)
    summary = (known or Checks()).split(source, num_threads=data.num_threads)
    return to_evaluate(data, source, batch_size), summary, doubts(data, source, split, summary)


def to_evaluate(data: Data, source: Source, batch_size: int) -> pipeline.EvalTiles | pipeline.EvalBatches:
    """This process's tiles as they are, or batches of them squeezed to the crop."""
    if data.eval_scale == "native":
        return pipeline.EvalTiles(source, **processes(data.num_threads))
    return pipeline.eval_batches(source, crop=data.crop, batch_size=batch_size, **processes(data.num_threads))


def holds_jpeg(source: Source) -> bool:
    """Whether images are JPEGs, which versions of GDAL do not decode alike."""
    return any(path.lower().endswith((".jpg", ".jpeg")) for path in getattr(source, "image_paths", ()))


def may_hide(source: Source | None) -> bool:
    """Whether alpha bands or masks may say where images have no data: former versions took some of these for data."""
    plain = not isinstance(source, FolderSource) or source.plain
    return source is not None and not plain and any(map(images.may_hide, source.image_paths))


def doubts(data: Data, source: Source, split: str, summary: SplitSummary) -> list[str]:
    """What would train or score as silent garbage, one line each."""
    trained = split == data.train_split
    return classes.doubts(
        summary.pixels, summary.ignored, data.info.classes, split=split, trained=trained, made=labels_are(source)
    )


def open_windows(
    data: Data, tiles: Source | None, *, held_out: bool | None
) -> tuple[UnlabelledSource, UnlabelledSummary, list[str]]:
    """Windows of the unlabelled images, what was found in them, and what makes one doubt that they fit the `tiles`.

    `held_out`: those that score (True), those that do not (False), or all.
    """
    paths, setting, others = data.unlabelled, unlabelled.SETTING, ()
    if held_out is not None and data.unlabelled_val:
        if held_out:
            paths, setting = data.unlabelled_val, f"{setting}_val"
        else:
            others = listed(data.unlabelled_val)
        held_out = None
    source, summary = unlabelled.open_unlabelled(
        listed(paths), crop=data.crop, bands=data.bands, scale=data.scale, nodata=data.nodata, held_out=held_out,
        on_corrupt=data.on_corrupt, num_threads=data.num_threads, setting=setting,
        leave_out=others,
    )  # fmt: skip
    found = list(summary.warnings)
    if tiles is not None:
        found += unlabelled.compare(summary, *_statistics(tiles))
    return source, summary, found


def _statistics(tiles: Source) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and deviation of some tiles' bands, float64 (bands,), and the share of values at 0 or 255."""
    count, sums, squares, saturated = 0, 0.0, 0.0, 0.0
    for index in np.unique(np.linspace(0, len(tiles) - 1, SAMPLED).round().astype(int)).tolist():
        try:
            values = read_tile(tiles, index)["image"].reshape(-1, tiles.bands).astype(np.float64)
        except UserError:  # the check has told of it
            continue
        count, sums, squares = count + len(values), sums + values.sum(0), squares + np.square(values).sum(0)
        saturated += np.isin(values, (0, 255)).mean(1).sum()
    mean = sums / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0)), saturated / count


def held_out_batches(data: Data, batch_size: int) -> tuple[Any, UnlabelledSummary]:
    """Batches of the unlabelled images that score a distillation: at most `HELD_OUT` windows, evenly spread."""
    source, summary, _ = open_windows(data, None, held_out=True)
    if len(source) > HELD_OUT:
        source = source.only(np.linspace(0, len(source) - 1, HELD_OUT).round().astype(int).tolist())
        summary = dataclasses.replace(summary, windows=HELD_OUT)
    batches = pipeline.eval_batches(source, crop=None, batch_size=batch_size, **processes(data.num_threads))
    return batches, summary


def _captured(data: Data, rare: Rare, summary: SplitSummary) -> list[str]:
    """Of a class so rare that nearly all rare crops would be of it, a few wrongly labelled pixels for one: a line."""
    chosen = int(rare.shares.argmax())
    pixels, tiles = int(summary.pixels[chosen]), len(rare.tiles[chosen])
    if rare.shares[chosen] < CAPTURED or pixels > summary.pixels.sum() / 1e4:
        return []
    return [
        f"{100 * rare.shares[chosen]:.4g} % of config.data.rare_crops lie around {data.info.classes[chosen]!r}, "
        f"{pixels} pixels in {tiles} tile(s); are they right?"
    ]


def augmentation(data: Data) -> Augmentation:
    return Augmentation(**{field.name: getattr(data, field.name) for field in dataclasses.fields(Augmentation)})


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


class Inputs(NamedTuple):
    batches: Any  # an iterator over the training batches, with get_state and set_state
    what: str  # is trained on, in words
    val_batches: Any  # to go through from the start each time
    fingerprints: dict[str, str]  # of the splits and of precomputed features
    counts: dict[str, int]  # tiles, or windows, of the splits
    features: TeacherFeatures | ForeignFeatures | None
    doubtful: list[str]  # what may be wrong with the tiles
    jpeg: bool  # whether they are JPEGs
    may_hide: Callable[[], bool]  # see the function


def open_inputs(settings: Settings, mixture: Mixture | None, first_row: int = 0, known: Checks | None = None) -> Inputs:
    """Makes the tiles where they can be made, and checks all of them, but for what is `known`.

    `first_row`: see pipeline.train_iterator.
    """
    data, size, known = settings.data, settings.eval_batch_size, known or Checks()
    source = windows = features = window_features = None
    fingerprints, counts, doubtful, what = {}, {}, [], []
    if settings.supervised:
        source = open_source(data, data.train_split)
        summary = known.split(source, crop=data.crop, on_corrupt=data.on_corrupt, num_threads=data.num_threads)
        doubtful += doubts(data, source, data.train_split, summary)
        val_batches, val, found = eval_source(data, data.validation, size, known)
        fingerprints |= {"train": summary.fingerprint, "val": val.fingerprint}
        counts |= {"train": len(source), "val": val.tiles}
        doubtful += found
        what.append(f"{len(source)} training tiles" + (f" ({source.fold})" if source.fold else ""))
        if data.test_split not in (None, data.validation):  # what is wrong with it must not wait for the end
            _, test, found = eval_source(data, data.test_split, size, known)
            fingerprints["test"], counts["test"], doubtful = test.fingerprint, test.tiles, doubtful + found
    if data.unlabelled:
        windows, seen, doubtful_images = open_windows(data, source, held_out=None if settings.supervised else False)
        fingerprints["unlabelled"], doubtful = seen.fingerprint, doubtful + doubtful_images
        counts["unlabelled"] = seen.windows
        what.append(f"{seen.windows:,} windows of {seen.files:,} unlabelled images")
    if not settings.supervised:
        val_batches, held_out = held_out_batches(data, size)
        fingerprints["held out"], counts["held out"] = held_out.fingerprint, held_out.windows
        what.append(f"{held_out.windows:,} windows held out")
    if settings.distill and settings.model.teacher.foreign is not None:
        features, digest, found = foreign.open_features(settings, source, summary, known)
        fingerprints["teacher features"], doubtful = digest, doubtful + found
    elif settings.distill and settings.teacher.mode == "precomputed":
        identity = teacher_identity(settings.weights.teacher, settings.seed, model_of(settings))
        if source is not None:
            folder = features_folder(settings.teacher, data)
            features = open_features(folder, identity, data.train_split, summary.fingerprint)
            fingerprints["teacher features"] = features.fingerprint
        if windows is not None:
            folder = features_folder(settings.teacher, data, of_windows=True)
            window_features = open_features(folder, identity, UNLABELLED, seen.fingerprint)
            if window_features.source is None:
                raise UserError(
                    f"the teacher features in {folder} are of a random teacher, which knows nothing; {TEACHERS}"
                )
            fingerprints["unlabelled teacher features"] = window_features.fingerprint
    rare = Rare.of(summary.by_tile) if data.rare_crops else None
    if rare is not None:
        doubtful += _captured(data, rare, summary)
    batches = pipeline.train_iterator(
        source, augmentation=augmentation(data), batch_size=settings.batch_size, seed=settings.seed,
        rare=rare, on_corrupt=data.on_corrupt, features=features,
        first_row=first_row, unlabelled=windows, unlabelled_features=window_features, mixture=mixture,
        **processes(data.num_threads),
    )  # fmt: skip
    jpeg = any(holds_jpeg(tiles) for tiles in (source, windows) if tiles is not None)
    return Inputs(
        batches, ", ".join(what), val_batches, fingerprints, counts, features or window_features,
        list(dict.fromkeys(doubtful)), jpeg, functools.partial(may_hide, source),
    )  # fmt: skip
