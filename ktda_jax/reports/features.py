"""Teacher and student in the same colours: the three main directions of the teacher's features, level by level."""

import dataclasses

import jax
import numpy as np

from ktda_jax.data.teacher_features import TeacherFeatures
from ktda_jax.models import flat
from ktda_jax.reports.trained import Trained
from ktda_jax.training import program


@dataclasses.dataclass(frozen=True)
class Level:
    """Of one tile at one level: maps of colours, uint8 (h, w, 3), and the mean cosine of the two at a patch."""

    teacher: np.ndarray
    student: np.ndarray
    cosine: float


@dataclasses.dataclass(frozen=True)
class FeatureMaps:
    names: list[str]
    images: list[np.ndarray]  # uint8 (H, W, bands)
    levels: list[list[Level]]  # by tile, then by level
    teacher: str  # which one, in words


def computed(trained: Trained, path: str | None, seed: int, names: list[str], images: list[np.ndarray]) -> FeatureMaps:
    """With the frozen teacher of config.weights.teacher, `path`, or of `seed`; UserError if it cannot be had."""
    graphdef, _, place = program.frozen_teacher(path, seed, trained.model, trained.dtype, trained.mesh)
    which = path or "random weights, as config.weights.teacher was not set"
    arrays = place()

    @jax.jit
    def run(params, stats, teacher, image):
        outputs = flat.merge(trained.graphdef, params, stats)(image, teacher=flat.merge(graphdef, teacher, {}))
        return outputs.student, outputs.taps

    pairs = []
    for image in images:
        student, teacher = jax.device_get(run(trained.params, trained.stats, arrays, image[None]))
        pairs.append([(t[0], s[0]) for t, s in zip(teacher, student, strict=True) if t is not None])
    return FeatureMaps(names, images, _levels(pairs), which)


def precomputed(trained: Trained, features: TeacherFeatures, source, count: int) -> FeatureMaps:
    """With the features on disk, which are those of the training split's tiles, `source`."""

    @jax.jit
    def run(params, stats, image, taps):
        model = flat.merge(trained.graphdef, params, stats)
        return model(image).student, model.scaled(taps)

    pairs, names, images = [], [], []
    for index in np.unique(np.linspace(0, len(source) - 1, count).round().astype(int)).tolist():
        tile, stored = source[index], features.read(index, False)
        taps = [None if k is None else stored[k] for k in features.levels]
        student, teacher = jax.device_get(run(trained.params, trained.stats, tile["image"][None], taps))
        pairs.append([(t, s[0]) for t, s in zip(teacher, student, strict=True) if t is not None])
        names.append(tile["name"])
        images.append(tile["image"])
    which = f"precomputed, made by {features.source or 'a random teacher'}; tiles of the training split"
    return FeatureMaps(names, images, _levels(pairs), which)


def _levels(pairs: list[list[tuple[np.ndarray, np.ndarray]]]) -> list[list[Level]]:
    """pairs: by tile, then by level, teacher's and student's maps (h, w, C)."""
    by_level = [_colours(list(level)) for level in zip(*pairs, strict=True)]
    return [list(tile) for tile in zip(*by_level, strict=True)]


def _colours(pairs: list[tuple[np.ndarray, np.ndarray]]) -> list[Level]:
    """One level of all tiles. The teacher's middle 98 % of each direction become 0..255, for the student too."""
    pairs = [tuple(np.asarray(x, np.float64) for x in pair) for pair in pairs]
    tokens = np.concatenate([teacher.reshape(-1, teacher.shape[-1]) for teacher, _ in pairs])
    mean = tokens.mean(0)
    _, vectors = np.linalg.eigh(np.cov(tokens - mean, rowvar=False).reshape(len(mean), len(mean)))
    basis = vectors[:, ::-1][:, :3]
    basis = basis * np.sign(basis[np.abs(basis).argmax(0), np.arange(basis.shape[1])])  # eigh's signs are arbitrary
    low, high = np.percentile((tokens - mean) @ basis, (1, 99), axis=0)
    levels = []
    for teacher, student in pairs:
        painted = []
        for x in (teacher, student):
            scaled = ((x - mean) @ basis - low) / np.maximum(high - low, 1e-12)
            painted.append((255 * np.clip(scaled, 0, 1)).round().astype(np.uint8))
        norms = np.linalg.norm(teacher, axis=-1) * np.linalg.norm(student, axis=-1)
        cosine = float(((teacher * student).sum(-1) / np.maximum(norms, 1e-12)).mean())
        levels.append(Level(*painted, cosine))
    return levels
