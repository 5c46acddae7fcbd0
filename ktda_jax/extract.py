"""`python -m ktda_jax.extract --config=...`: the frozen teacher's features of the training images, once and for all.

Runs the teacher over every training tile and its mirror image, or with config.data.rotate over all eight views of it,
sharded over all devices, into config.teacher.features; and over a fixed grid of windows of the images without labels,
config.data.unlabelled, into a folder beside it. Training with --config.teacher.mode=precomputed then reads them in step
with the tiles. Of several processes each writes files of its own, so that all must see the folder. What was killed or
stopped goes on from the last part that was complete, if there are as many processes again.
"""

from ktda_jax import cli

if __name__ == "__main__":
    cli.define_config()
    cli.define_processes()
    PARSE = cli.parsed(cli.parse_config)  # before the imports below, which take seconds

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from ktda_jax import UserError, sharding
from ktda_jax.config import checks
from ktda_jax.config.model import compute_dtype, model_of, teacher_identity
from ktda_jax.config.settings import Settings
from ktda_jax.config.workdir import write_json
from ktda_jax.data import foreign_features, pipeline
from ktda_jax.data.check import check_split
from ktda_jax.data.geometry import VIEWS
from ktda_jax.data.teacher_features import (
    DTYPES,
    MANIFEST,
    PADDING,
    RECORDS,
    FeatureWriter,
    check,
    read_manifest,
    stored_layers,
    views_of,
)
from ktda_jax.models import flat
from ktda_jax.models.ktda import KTDAConfig, teacher_images
from ktda_jax.training import lock
from ktda_jax.training.inputs import UNLABELLED, features_folder, open_source, open_windows, processes
from ktda_jax.training.program import frozen_teacher

PART = 1024  # tiles that are lost at most when an extraction is killed
SHARD = ".array_record"
BEGUN = "begun.json"  # what an unfinished extraction was made from, and how it was dealt out


def run(config: ConfigDict) -> pathlib.Path:
    """Extracts what training needs, unless it is there; returns the folder. UserError if it cannot be done.

    Every tile must be readable, whatever config.data.on_corrupt says.
    """
    settings = checks.resolve(config)
    data, stored, chosen = settings.data, settings.teacher, settings.weights.teacher
    if settings.model.teacher.foreign is not None or foreign_features.are_there(features_folder(stored, data)):
        raise UserError(
            f"{features_folder(stored, data)} holds features of a teacher that is not ours; choose another "
            "config.teacher.features"
        )
    model, dtype = model_of(settings), compute_dtype(settings.dtype)
    mesh = sharding.make_mesh(**dataclasses.asdict(settings.mesh))
    sharding.check_batch_size(mesh, settings.eval_batch_size, "config.eval_batch_size")
    identity = teacher_identity(chosen, settings.seed, model)
    graphdef, _, place = frozen_teacher(chosen, settings.seed, model, dtype, mesh)
    jobs, tiles = [], None
    if settings.supervised:
        tiles = open_source(data, data.train_split)
        summary = check_split(tiles, crop=data.crop, num_threads=data.num_threads)
        made_from = {"split": data.train_split, "tiles": summary.fingerprint, **identity}
        jobs.append((features_folder(stored, data), tiles, made_from))
    if data.unlabelled and chosen is None:
        raise UserError(f"config.data.unlabelled would teach what a random teacher says; {checks.TEACHERS}")
    if data.unlabelled:
        windows, found, _ = open_windows(
            dataclasses.replace(data, on_corrupt="stop"), tiles, held_out=None if settings.supervised else False
        )
        made_from = {"split": UNLABELLED, "tiles": found.fingerprint, **identity}
        jobs.append((features_folder(stored, data, of_windows=True), windows, made_from))
    views = VIEWS if data.rotate else 2
    jobs = [job for job in jobs if not _there(job[0], job[2], stored.dtype, views)]
    if chosen is None and jobs:
        _say("warning: the teacher is random; set config.weights.teacher")
    step = _step(graphdef, model, dtype, DTYPES[stored.dtype], mesh, views)
    for folder, source, made_from in jobs:
        _extract(folder, source, made_from, settings, model, step, place, mesh, views)
    return features_folder(stored, data)


def _there(folder: pathlib.Path, made_from: dict, dtype: str, views: int) -> bool:
    """Whether a folder holds these features already; UserError for others."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / MANIFEST).exists():
        raise UserError(f"config.teacher.features={folder} exists and holds no teacher features; choose another")
    manifest = read_manifest(folder)
    check(folder, manifest, made_from)
    if manifest["dtype"] != dtype:
        raise UserError(
            f"the teacher features in {folder} are there, but as {manifest['dtype']}, not {dtype}; "
            "choose another config.teacher.features, or remove them"
        )
    if views_of(manifest) < views:
        raise UserError(
            f"the teacher features in {folder} are there, but of {views_of(manifest)} views of each tile, and "
            f"config.data.rotate needs {views}; choose another config.teacher.features, or remove them"
        )
    _say(f"the features are in {folder} already")
    return True


def _extract(
    folder, source, made_from: dict, settings: Settings, model: KTDAConfig, step, place, mesh, views: int
) -> None:  # fmt: skip
    """The features of one source's tiles into `folder`."""
    stored = settings.teacher
    rows = dict(crop=None, batch_size=settings.eval_batch_size, **processes(settings.data.num_threads))
    batches = pipeline.eval_batches(source, **rows)
    parts = _parts(batches)
    records, filled = _records(batches, parts, model, jax.process_count())
    itemsize = DTYPES[stored.dtype].itemsize * len(stored_layers(model.teacher.tapped))
    size = sum(views * h * w * model.teacher.width * itemsize for *_, h, w in records)
    what = "and their mirror images" if views == 2 else f"in {views} views each"
    _say(f"{len(source)} tiles {what}, {size / 1e9:.2f} GB of {stored.dtype} before compression")
    manifest = {
        "format": 1 if views == 2 else 2,
        "made_from": made_from,
        "padding": PADDING,
        "computed_in": str(compute_dtype(settings.dtype)),
        "dtype": stored.dtype,
        "views": views,
    }
    temporary, names = folder.with_name(f".{folder.name}.tmp"), _shards(len(parts) * jax.process_count())
    begun = json.dumps({**manifest, "shards": names, "batch_size": settings.eval_batch_size}, sort_keys=True)
    with _claim(temporary, folder, begun) if jax.process_index() == 0 else contextlib.nullcontext():
        _meet("folder made")
        left = _left(temporary, names, parts)
        tiles = sum(int((batches.plan[part] >= 0).sum()) for part in left)
        if len(left) < len(parts):
            _say(f"going on: {len(source) - tiles:,} of {len(source):,} tiles are there")
        _check_space(folder, size * tiles // len(source) // jax.process_count())
        _write(temporary, names, parts, left, stored.dtype, step, place(), batches, mesh)
        _meet("shards written")
        if jax.process_index() == 0:
            manifest["shards"] = {names[k]: (temporary / names[k]).stat().st_size for k in filled}
            np.save(temporary / RECORDS, np.array(records, np.int64))
            write_json(temporary / MANIFEST, manifest)
            (temporary / BEGUN).unlink()
            os.replace(temporary, folder)
    _meet("done")


@contextlib.contextmanager
def _claim(temporary: pathlib.Path, folder: pathlib.Path, begun: str = "") -> Iterator[None]:
    """The folder, with the shards that a killed extraction left if it had `begun` the same, and not a living one's."""
    place, beside = f"config.teacher.features={folder}", folder.with_name(f".{folder.name}.{lock.RECORD}")
    claim, remedy = f"{place} is being extracted", "wait for it, or choose another"
    with lock.hold(temporary, place=place, claim=claim, remedy=remedy, record=beside, say=_say):
        if folder.exists() and any(folder.iterdir()):
            raise UserError(
                f"{place} was extracted by another process meanwhile; the same command looks whether it fits"
            )
        told = temporary / BEGUN
        try:
            same = told.exists() and told.read_text() == begun
            for left in temporary.iterdir():
                if not (same and (left == told or left.suffix == SHARD)):
                    left.unlink()
            told.write_text(begun)
            yield
        finally:
            if not any(temporary.glob(f"*{SHARD}")):
                shutil.rmtree(temporary, ignore_errors=True)


def _parts(batches: pipeline.EvalBatches) -> list[slice]:
    """The batches that are written before the next shards are begun."""
    count = max(PART // batches.plan.shape[1], 1)
    return [slice(start, min(start + count, len(batches))) for start in range(0, len(batches), count)]


def _shards(count: int) -> list[str]:
    """By part, and of each part by process."""
    return [f"features-{k:05}-of-{count:05}{SHARD}" for k in range(count)]


def _left(temporary: pathlib.Path, names: list[str], parts: list[slice]) -> list[slice]:
    """The parts of which a shard is lacking, as process 0 sees it."""
    count, lacking = jax.process_count(), np.zeros(len(parts), np.int64)
    if jax.process_index() == 0:
        there = np.array([(temporary / name).exists() for name in names])
        lacking[:] = ~there.reshape(len(parts), count).all(1)
    return [part for part, lacks in zip(parts, sharding.sum_of_processes(lacking), strict=True) if lacks]


def _records(
    batches: pipeline.EvalBatches, parts: list[slice], model: KTDAConfig, count: int
) -> tuple[list[list[int]], list[int]]:
    """By tile: its shard among those that hold any, the place in it and the grid (h, w); and which shards hold any."""
    rows = batches.plan.shape[1] // count
    records, per_shard = [None] * int((batches.plan >= 0).sum()), [0] * (len(parts) * count)
    for number, part in enumerate(parts):
        for indices, size in zip(batches.plan[part], batches.batch_sizes[part], strict=True):
            for row, index in enumerate(indices.tolist()):
                if index >= 0:
                    shard = number * count + row // rows
                    records[index] = [shard, per_shard[shard], *model.teacher.grid_of(*size)]
                    per_shard[shard] += 1
    filled = [shard for shard, tiles in enumerate(per_shard) if tiles]
    position = {shard: k for k, shard in enumerate(filled)}
    return [[position[shard], *rest] for shard, *rest in records], filled


def _step(graphdef, model: KTDAConfig, dtype, stored: np.dtype, mesh, views: int):
    """(teacher, images (B, H, W, bands)) -> taps of each view of the images, (B, n, h, w, C)."""

    def taps(teacher, images):
        seen = teacher_images(images, model.seen, model.teacher, dtype)
        vit, tapped = flat.merge(graphdef, teacher, {}), model.teacher.tapped
        levels = [tapped.index(layer) for layer in stored_layers(tapped)]
        found = []
        for number in range(views):  # as geometry.view makes them
            mirrored = seen[:, :, ::-1] if number % 2 else seen
            found.append(vit(jnp.rot90(mirrored, number // 2, axes=(1, 2))))
        return tuple(jnp.stack([each[k] for k in levels], 1).astype(stored) for each in found)

    return jax.jit(sharding.on_mesh(mesh, taps), out_shardings=(sharding.batch_sharding(mesh),) * views)


def _write(
    temporary: pathlib.Path, names: list[str], parts: list[slice], left: list[slice], dtype: str, step, teacher,
    batches: pipeline.EvalBatches, mesh,
) -> None:  # fmt: skip
    """This process's tiles, by part: a shard has its name when it is complete."""
    progress = _Progress(sum(int((batches.plan[part] >= 0).sum()) for part in left))
    for part in left:
        path = temporary / names[parts.index(part) * jax.process_count() + jax.process_index()]
        partial = path.with_name(f"{path.name}.tmp")
        writer = FeatureWriter(partial, dtype)
        try:
            _write_part(writer, part, step, teacher, batches, mesh, progress)
        finally:
            writer.close()
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())  # before its name says that it is complete
        os.replace(partial, path)


def _write_part(writer: FeatureWriter, part: slice, step, teacher, batches, mesh, progress: "_Progress") -> None:
    """The device works on one batch while the one before it is written."""
    pending = None

    def write(batch, taps):
        views = [sharding.local_rows(values) for values in taps]
        for row in np.flatnonzero(batch["mask"]):
            writer.write(batch["name"][row], [values[row] for values in views])

    for number, batch in enumerate(batches.between(part.start, part.stop), part.start):
        taps = step(teacher, sharding.to_global(mesh, batch["image"]))
        if pending is not None:
            write(*pending)
        pending = batch, taps
        progress.advance(int((batches.plan[number] >= 0).sum()))
    write(*pending)


class _Progress:
    """A line every ten seconds, and one at the end."""

    def __init__(self, total: int):
        self._total, self._done = total, 0
        self._started = self._said = time.monotonic()

    def advance(self, tiles: int) -> None:
        self._done += tiles
        now = time.monotonic()
        if now - self._said > 10 or self._done == self._total:
            self._said, rate = now, self._done / (now - self._started)
            each = f", {rate / jax.process_count():.1f} of them by each process" if jax.process_count() > 1 else ""
            _say(f"{self._done:,} of {self._total:,} tiles, {rate:.1f} a second{each}")


def _check_space(folder: pathlib.Path, needed: int) -> None:
    existing = next(parent for parent in folder.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"config.teacher.features={folder} needs up to {needed / 1e9:.1f} GB, but {existing} has only "
            f"{free / 1e9:.1f} GB free; choose another place, or config.teacher.mode=computed, which needs none"
        )


def _meet(where: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"extract: {where}")


def _say(text: str) -> None:
    if jax.process_index() == 0:
        print(text, flush=True)


def main(_: list[str]) -> None:
    cli.start()
    cli.stop_cleanly()
    with cli.failing_alone():
        folder = run(cli.config())
    _say(f"done; train with --config.teacher.mode=precomputed --config.teacher.features={folder}")


if __name__ == "__main__":
    cli.run(main, PARSE)
