"""The features of a teacher that is not ours, for the training tiles of a config: checked before the first step."""

import jax
import numpy as np

from ktda_jax import UserError, sharding
from ktda_jax.config.foreign import features_folder
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.data.check import SplitSummary
from ktda_jax.data.foreign_features import ForeignFeatures
from ktda_jax.data.remembered import Checks
from ktda_jax.data.sources import Source, label_sizes, read_tile


def features_of(settings: Settings, source: Source, summary: SplitSummary) -> tuple[ForeignFeatures, str]:
    """Of the tiles that were found (`summary`), and a digest of them.

    UserError where tiles lack features, or these are not what the settings say, or not of these tiles by their shapes.
    """
    data, known = settings.data, settings.model.teacher
    bad = _unreadable(source, summary)
    names = [None if index in bad else name for index, name in enumerate(source.names)]
    found = ForeignFeatures(features_folder(settings.teacher, data), names, model_of(settings).teacher.tapped)
    told = found.manifest
    for what, ours, theirs in (
        ("name", known.foreign, told.name),
        ("width", known.width, told.width),
        ("patch", known.patch, told.patch),
        ("taps", known.depth, len(told.taps)),
        ("dtype", settings.teacher.dtype, told.dtype),
    ):
        if ours != theirs:
            raise UserError(f"the teacher features in {found.folder} are of {what} {theirs}, wanted {ours}; give those")
    if told.patch is None and (others := summary.sizes - {tuple(data.crop)}):
        height, width = max(others)
        raise UserError(
            f"the teacher features in {found.folder} have no patch, so that only whole tiles can be trained on; set "
            f"config.data.crop={height, width}, if that is the size of all"
        )
    readable = source.only([index for index in range(len(source)) if index not in bad]) if bad else source
    sizes = label_sizes(readable, num_threads=data.num_threads)
    return found, found.check(sizes, num_threads=data.num_threads)


def _unreadable(source: Source, summary: SplitSummary) -> set[int]:
    """The tiles that training will skip (config.data.on_corrupt), of which nobody has features."""
    bad = set()
    for index in np.flatnonzero(summary.by_tile.sum(1) == 0).tolist() if summary.unreadable else ():
        try:
            read_tile(source, index)
        except UserError:
            bad.add(index)
    return bad


def open_features(
    settings: Settings, source: Source, summary: SplitSummary, known: Checks
) -> tuple[ForeignFeatures, str, list[str]]:
    """Features whose files are whole, a digest of them, and what is to be doubted.

    All values are read once, by several processes each a part of the files; unless that is `known`.
    """
    threads, share, error = settings.data.num_threads, (jax.process_index(), jax.process_count()), None
    try:
        found, digest = features_of(settings, source, summary)
        known.features(found.folder, repr((digest, share)), lambda: found.read_all(share, num_threads=threads), threads)
    except UserError as raised:
        error = raised
    if sharding.any_process(error is not None):
        raise error or UserError("another process cannot use the teacher's features; its message says why")
    return found, digest, _doubts(settings, found)


def _doubts(settings: Settings, found: ForeignFeatures) -> list[str]:
    """Where a view is made of another, which is not quite what the teacher would say of it."""
    data = settings.data
    if found.manifest.views > 1 or not (data.flip or data.rotate):
        return []
    how = "mirrored and turned" if data.rotate else "mirrored"
    return [
        f"the features in {found.folder} are of one view of each tile, and {how} with it: of a {how} image the teacher "
        "itself would say something slightly else"
    ]
