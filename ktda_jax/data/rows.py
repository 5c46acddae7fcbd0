"""The rows of training batches: tiles and windows of images, drawn, cropped, mirrored and distorted by their number."""

import functools
import threading
from collections.abc import Callable

import numpy as np
from absl import logging

from ktda_jax import UserError
from ktda_jax.data import augment
from ktda_jax.data.mixture import Mixture
from ktda_jax.data.sources import Source, Tile, read_tile, tile_name
from ktda_jax.data.teacher_features import TeacherFeatures


class Shuffled:
    """Tiles in an endless order, each once an epoch.

    It shuffles by itself because Grain's `shuffle` costs about 4 ms per draw on a set of three tiles, several
    times what reading and augmenting one takes.
    """

    def __init__(self, source, features: TeacherFeatures | None, seed: int, skip: bool, order: tuple[int, ...] = ()):
        self.source, self.features, self._skip = source, features, skip
        self._key = [seed, *order]
        self._order = functools.lru_cache(maxsize=4)(self._permutation)  # neighbouring epochs overlap in a batch
        self._reported, self._lock = set(), threading.Lock()

    def __repr__(self) -> str:
        return repr(self.source)

    def tile(self, number: int) -> int:
        """The index of tile `number` of the endless sequence."""
        epoch, place = divmod(number, len(self.source))
        return int(self._order(epoch)[place])

    def _permutation(self, epoch: int) -> np.ndarray:
        """The order of one epoch; a whole permutation takes less than decoding one tile."""
        return np.random.default_rng([self._key[0], epoch, *self._key[1:]]).permutation(len(self.source))

    def read(self, index: int, get: Callable[[Source, int], Tile] = read_tile) -> tuple[Tile, int]:
        """Tile `index`, or in skip mode the next one that can be read; and which one it is."""
        for step in range(len(self.source)):
            candidate = (index + step) % len(self.source)
            try:
                return get(self.source, candidate), candidate
            except UserError as error:
                if not self._skip:
                    raise UserError(f"{error}; repair or remove the tile, or train with on_corrupt='skip'") from error
                self._warn_once(candidate, error)
        raise UserError(f"no readable tile in {self.source!r}")

    def _warn_once(self, index: int, error: UserError) -> None:
        with self._lock:
            new = index not in self._reported
            self._reported.add(index)
        if new:
            logging.warning("skipping tile %s: %s", tile_name(self.source, index), error)


class TrainRows:
    """The endless sequence of augmented training rows, by position; a Grain random access source."""

    def __init__(
        self, labelled: Shuffled | None, unlabelled: Shuffled | None, mixture: Mixture | None, *, seed: int,
        crop: tuple[int, int], flip: float, photometric: bool, first_row: int,
    ):  # fmt: skip
        self._labelled, self._unlabelled, self._mixture = labelled, unlabelled, mixture
        self._first_row, self._seed, self._crop = first_row, seed, crop
        self._flip, self._photometric = flip, photometric

    def __len__(self) -> int:
        return 2**60  # endless; Grain counts batches in floats, which rounds sys.maxsize up

    def __repr__(self) -> str:
        tiles = ", ".join(repr(tiles) for tiles in (self._labelled, self._unlabelled) if tiles is not None)
        return f"TrainRows({tiles}, seed={self._seed})"

    def __getitem__(self, position: int) -> dict:
        """Row number `position`, counted from the start of the run over the rows of all processes."""
        position += self._first_row
        with_label, number = self._labelled is not None, position
        if self._mixture is not None:
            with_label, number = self._mixture.place(position)
        rng = np.random.Generator(np.random.Philox(key=np.array([self._seed, position], np.uint64)))
        image, label, row = self._of_tile(number, rng) if with_label else self._of_image(number, rng)
        if self._photometric:
            image = augment.photometric_distortion(image, rng)
        return {"image": image, "label": label, **row}

    def _of_tile(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """Cropped and mirrored image and label of the labelled tile `number`."""
        tiles = self._labelled
        wanted = tiles.tile(number)
        tile, index = tiles.read(wanted)
        row = {"skipped": index != wanted}
        if tiles.features is None:
            try:
                image, label = augment.random_crop(tile["image"], tile["label"], self._crop, rng)
            except ValueError as error:
                raise UserError(f"tile {tile['name']}: {error}") from error
            image, label = augment.random_flip(image, label, rng, self._flip)
        else:
            image, label, row["taps"] = self._aligned(tiles.features, tile, index, rng)
        return image, label, row

    def _of_image(self, number: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, dict]:
        """A window of an unlabelled image at a random place; or, with features, one of the fixed grid they are of."""
        windows = self._unlabelled
        wanted = windows.tile(number)
        if windows.features is None:
            window, index = windows.read(wanted, lambda source, index: source.draw(index, rng))
            image, label = augment.random_flip(window["image"], window["label"], rng, self._flip)
            return image, label, {"skipped": index != wanted}
        window, index = windows.read(wanted)
        image, label, taps = self._aligned(windows.features, window, index, rng)
        return image, label, {"skipped": index != wanted, "taps": taps}

    def _aligned(self, features: TeacherFeatures, tile: dict, index: int, rng: np.random.Generator):
        """Crop and flip at the teacher's patches: image, label and the tap (h, w, C) of each level, or None."""
        patch, (height, width) = features.patch, self._crop
        top, left, mirrored = augment.draw_aligned(tile["label"].shape, self._crop, patch, rng, self._flip)
        image, label = tile["image"], tile["label"]
        if mirrored:  # before the cut: the mirror image's patches begin at its own left edge
            image, label = augment.mirror(image, label)
        window = np.s_[top : top + height, left : left + width]
        first, second = top // patch, left // patch
        taps = features.read(index, mirrored)
        taps = taps[:, first : first - (-height // patch), second : second - (-width // patch)]
        return image[window], label[window], [None if k is None else taps[k] for k in features.levels]
