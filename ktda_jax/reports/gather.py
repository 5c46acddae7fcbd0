"""From workdirs to all that a page shows: reads them, and runs their models where checkpoint and tiles can be had."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence

import jax
import numpy as np

from ktda_jax import UserError
from ktda_jax.config.model import teacher_identity
from ktda_jax.data.check import SplitSummary, check_split
from ktda_jax.data.paths import absolute
from ktda_jax.reports import features, tiles, trained, workdir
from ktda_jax.reports.workdir import Run
from ktda_jax.training import foreign
from ktda_jax.training.inputs import features_folder, open_features, open_source
from ktda_jax.training.predicted import how

FEATURE_TILES = 3


def gather(paths: Sequence[pathlib.Path], *, root: str | None, keep: int, say: Callable = print) -> list[Run]:
    """UserError for what is no workdir. `keep`: best and worst tiles each; 0 runs no model and reads no tiles."""
    runs = [workdir.read(path, name) for path, name in zip(paths, _names(paths), strict=True)]
    leaders = {}  # tiles and classes -> the run whose best and worst tiles stand for all with the same
    for run in runs:
        for section in ("tiles", "features", "shares"):
            if not keep:
                run.missing[section] = "left out by --tiles=0"
            elif "config" in run.missing:
                run.missing[section] = f"needs the config, but {run.missing['config']}"
        if keep and "config" not in run.missing:
            _look(run, root, keep, leaders, lambda text, run=run: say(f"{run.name}: {text}"))
    return runs


def _names(paths: Sequence[pathlib.Path]) -> list[str]:
    """The folders' names, or the paths as they were given where these are the same."""
    names = [absolute(path).name for path in paths]
    return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _look(run: Run, root: str | None, keep: int, leaders: dict, say) -> None:
    """Evaluates the run's split again; whatever cannot be had is said in one line in its place."""
    if root:
        run.settings = dataclasses.replace(run.settings, data=dataclasses.replace(run.settings.data, root=root))
    settings = run.settings
    hint = ""
    try:
        model = trained.load(run.path, settings)
        hint = "" if root else "; --root=... says where the data are now"
        source, summary = _open(run, run.split)
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        hint = hint if isinstance(error, UserError) else ""
        for section in ("tiles", "features", "shares"):
            run.missing[section] = _line(error) + hint
        return
    say(f"evaluating the {len(source)} tiles of {run.split} with the checkpoint of step {model.step}")
    key = (summary.labels, tuple(run.classes))  # other bands or another crop are other pixels of the same tiles
    leader = leaders.get(key)
    wanted = [tile.name for tile in leader.worst + leader.best] if leader else []
    try:
        scored = tiles.score(
            model,
            source,
            settings.data,
            settings.eval_batch_size,
            keep=0 if leader else keep,
            names=set(wanted),
            say=say,
        )  # fmt: skip
    except (UserError, jax.errors.JaxRuntimeError) as error:
        for section in ("tiles", "features", "shares"):
            run.missing[section] = _line(error)
        return
    run.confusion = scored.confusion
    run.scored = (
        f"the {len(source):,} tiles of {run.split} with the checkpoint of step {model.step:,}, {how(settings.data)}"
    )
    role = "test" if run.split == settings.data.test_split != settings.data.validation else "val"
    if run.environment.get("data", {}).get(role, summary.fingerprint) != summary.fingerprint:
        run.scored += ", which are not the tiles that training scored"
    run.missing.pop("scores", None)
    if leader:
        run.followed = leader.name
        run.worst, run.best = ([scored.named[t.name] for t in group] for group in (leader.worst, leader.best))
    else:
        leaders[key] = run
        run.worst, run.best = scored.worst, scored.best
    if not run.worst:
        run.missing["tiles"] = f"no tile of {run.split} has a labelled pixel"
    opened = {run.split: (source, summary)}
    _count_shares(run, model, opened, say)
    _compare_features(run, model, opened, say)


def _open(run: Run, split: str) -> tuple[object, SplitSummary]:
    source = open_source(run.settings.data, split, build=False)
    data = run.settings.data
    skip = data.on_corrupt if split == data.train_split else "stop"
    return source, check_split(source, on_corrupt=skip, num_threads=data.num_threads)


def _count_shares(run: Run, model, opened: dict, say) -> None:
    data = run.settings.data
    for split in dict.fromkeys(filter(None, (data.train_split, data.validation, data.test_split))):
        try:
            if split not in opened:
                opened[split] = _open(run, split)
            source, summary = opened[split]
            if split == run.split:
                predictions, predicted = run.confusion.sum(0), len(source)
            else:
                some = tiles.Some(source, tiles.PREDICTED, skip=bool(summary.unreadable))
                say(f"predicting {len(some)} of the {len(source)} tiles of {split}")
                predictions = tiles.score(model, some, data, run.settings.eval_batch_size, say=say).confusion.sum(0)
                predicted = len(some)
        except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
            run.missing["shares"] = f"{split}: {_line(error)}"
            continue
        run.shares[split] = tiles.Shares(
            summary.pixels, summary.ignored, np.asarray(predictions), summary.tiles - len(summary.unreadable), predicted
        )


def _compare_features(run: Run, model, opened: dict, say) -> None:
    settings, train = run.settings, run.settings.data.train_split
    stored = settings.teacher.mode == "precomputed" and settings.weights.teacher is None
    reason = None
    if not settings.distill:
        reason = "trained without distillation (config.distill=False), so there is no teacher to compare with"
    elif stored and train not in opened:
        reason = f"the teacher's precomputed features need the tiles of {train}, which cannot be read"
    if reason is not None:
        run.missing["features"] = reason
        return
    say("features of teacher and student")
    try:
        if stored:
            source, summary = opened[train]
            if settings.model.teacher.foreign is not None:
                found, _ = foreign.features_of(settings, source, summary)
                run.features = features.precomputed(model, found, source, FEATURE_TILES)
                return
            identity = teacher_identity(None, settings.seed, model.model)
            folder = features_folder(settings.teacher, settings.data)
            found = open_features(folder, identity, train, summary.fingerprint)
            run.features = features.precomputed(model, found, source, FEATURE_TILES)
            return
        some = (run.worst[:2] + run.best[:1])[:FEATURE_TILES]
        names, images = [tile.name for tile in some], [tile.image for tile in some]
        if images:
            run.features = features.computed(model, settings.weights.teacher, settings.seed, names, images)
        else:
            run.missing["features"] = run.missing["tiles"]
    except (UserError, OSError, jax.errors.JaxRuntimeError) as error:
        run.missing["features"] = _line(error)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:600]
