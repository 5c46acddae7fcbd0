"""The rows of training batches: tiles and windows of images, drawn, cropped, mirrored and distorted by their number."""

import functools
import threading
from collections.abc import Callable

import numpy as np
from absl import logging

from ktda_jax import UserError
from ktda_jax.data import augment, geometry
from ktda_jax.data.augment import Augmentation
from ktda_jax.data.foreign_features import ForeignFeatures
from ktda_jax.data.geometry import Rare
from ktda_jax.data.mixture import Mixture
from ktda_jax.data.sources import Source, Tile, read_tile, tile_name
from ktda_jax.data.teacher_features import TeacherFeatures

Features = TeacherFeatures | ForeignFeatures


class Shuffled:
    """Tiles in an endless order, each once an epoch.

    It shuffles by itself because Grain's `shuffle` costs about 4 ms per draw on a set of three tiles, several
    times what reading and augmenting one takes.
    """

    def __init__(self, source, features: Features | None, seed: int, skip: bool, order: tuple[int, ...] = ()):
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
        augmentation: Augmentation, rare: Rare | None = None, first_row: int = 0,
    ):  # fmt: skip
        self._labelled, self._unlabelled, self._mixture = labelled, unlabelled, mixture
        self._first_row, self._seed = first_row, seed
        self._augmentation, self._rare = augmentation, rare

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
        return self.of_tile(self._labelled.tile(number), rng) if with_label else self._of_image(number, rng)

    def of_tile(self, index: int, rng: np.random.Generator) -> dict:
        """A row of the labelled tile `index`, unless it is to show a rare class, perhaps with a part of another."""
        how = self._augmentation
        row = self._crop(index, rng)
        if how.cutmix and rng.random() < how.cutmix:
            self._paste(row, self._crop(int(rng.integers(len(self._labelled.source))), rng), rng)
        return self._distorted(row, rng)

    def _distorted(self, row: dict, rng: np.random.Generator) -> dict:
        if self._augmentation.photometric:
            row["image"] = augment.photometric_distortion(row["image"], rng)
        return row

    def _crop(self, index: int, rng: np.random.Generator) -> dict:
        """Crop and view of a labelled tile."""
        how, tiles, chosen = self._augmentation, self._labelled, None
        if how.rare_crops and rng.random() < how.rare_crops:
            chosen, index = self._rare.draw(rng)
        tile, found = tiles.read(index)
        skipped = found != index
        if tiles.features is not None:
            return {**self._aligned(tiles.features, tile, found, rng, chosen), "skipped": skipped}
        turns = self._turns(rng)
        size = geometry.draw_size(tile["label"].shape, how.crop, how.zoom, rng)
        corner = None if chosen is None else geometry.around(tile["label"], chosen, size, rng)
        try:
            if corner is None:
                image, label = augment.random_crop(tile["image"], tile["label"], size, rng)
            else:
                window = tuple(slice(first, first + side) for first, side in zip(corner, size, strict=True))
                image, label = tile["image"][window], tile["label"][window]
        except ValueError as error:
            raise UserError(f"tile {tile['name']}: {error}") from error
        image, label = geometry.resized(image, label, how.crop)
        return {**self._viewed(image, label, turns, rng), "skipped": skipped}

    def _of_image(self, number: int, rng: np.random.Generator) -> dict:
        """A window of an unlabelled image at a random place; or, with features, one of the fixed grid they are of."""
        windows = self._unlabelled
        wanted = windows.tile(number)
        if windows.features is None:
            turns = self._turns(rng)
            window, index = windows.read(wanted, lambda source, index: source.draw(index, rng))
            row = self._viewed(window["image"], window["label"], turns, rng)
        else:
            window, index = windows.read(wanted)
            row = self._aligned(windows.features, window, index, rng)
        return self._distorted({**row, "skipped": index != wanted}, rng)

    def _turns(self, rng: np.random.Generator) -> int:
        """The number of a view that is turned but not mirrored. Drawn first, with features and without alike."""
        return 2 * int(rng.integers(4)) if self._augmentation.rotate else 0

    def _viewed(self, image: np.ndarray, label: np.ndarray, turns: int, rng: np.random.Generator) -> dict:
        """Mirrored by chance, then turned."""
        image, label = augment.random_flip(image, label, rng, self._augmentation.flip)
        if turns:
            image, label = geometry.view(image, turns), geometry.view(label, turns)
        return {"image": image, "label": label}

    def _aligned(
        self, features: Features, tile: dict, index: int, rng: np.random.Generator, chosen: int | None = None
    ) -> dict:
        """The same at the teacher's patches, with the tap (h, w, C) of each level, or None.

        The teacher has seen each view of the whole tile, whose patches begin at its own upper left corner: so the tile
        is turned before it is cut.
        """
        how, turns = self._augmentation, self._turns(rng)
        size = tile["label"].shape[::-1] if geometry.turned(turns) else tile["label"].shape
        patch = features.patch or max(size)  # None: a foreign teacher's features of whole tiles, which are never cut
        corner = [patch * int(rng.integers((a - b) // patch + 1)) for a, b in zip(size, how.crop, strict=True)]
        number = turns + (rng.random() < how.flip)
        image, label = tile["image"], tile["label"]
        if number:
            image, label = geometry.view(image, number), geometry.view(label, number)
        if chosen is not None and (place := geometry.around(label, chosen, how.crop, rng)):
            corner = [patch * (first // patch) for first in place]
        window = tuple(slice(first, first + side) for first, side in zip(corner, how.crop, strict=True))
        cells = tuple(slice(w.start // patch, -(-w.stop // patch)) for w in window)  # corners are at whole patches
        taps = features.read(index, number)
        if features.patch is not None:
            taps = taps[(slice(None), *cells)]
        levels = [None if k is None else taps[k] for k in features.levels]
        return {"image": image[window], "label": label[window], "taps": levels}

    def _paste(self, row: dict, other: dict, rng: np.random.Generator) -> None:
        """A part of `other` into `row`, at whole patches where there are features."""
        features = self._labelled.features
        patch = features.patch if features is not None else 1
        part = geometry.rectangle(row["label"].shape, patch, rng)
        for key in ("image", "label"):
            row[key] = row[key].copy()
            row[key][part] = other[key][part]
        row["skipped"] = bool(row["skipped"] or other["skipped"])
        if features is not None:
            cells = tuple(slice(p.start // patch, -(-p.stop // patch)) for p in part)
            row["taps"] = [taps if taps is None else taps.copy() for taps in row["taps"]]
            for taps, others in zip(row["taps"], other["taps"], strict=True):
                if taps is not None:
                    taps[cells] = others[cells]
