"""Tiles from TFDS array_record files, read without TensorFlow; our own sets are built when missing.

TFDS takes a while to import, hence only inside functions.
"""

import contextlib
import copy
import importlib
import io
import json
import os
import pathlib
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence

import cv2
import numpy as np
from absl import logging
from etils import epath

from ktda_jax import UserError
from ktda_jax.data.datasets import DATASETS, dataset_info
from ktda_jax.data.sources import Origin

_VERSION = r"\d+\.\d+\.\d+"
_quiet_lock = threading.RLock()  # what _quiet changes belongs to the whole process


class TfdsSource:
    """Random access to a split of a TFDS data set in array_record form.

    `name_or_dir` is `grass`, `meadow/1.0.0`, `l8_biome/scenes` (below `data_dir`, by default TFDS's own) or a folder
    that holds `dataset_info.json`; `split` may be a slice such as `train[:80%]`. `source[i]` is `image` uint8 (H, W, 3)
    RGB, `label` uint8 (H, W) with 255 = ignore, `name`. Threads may share it and it pickles: copies reopen
    the files. UserError if the set is not built, has no such split, other features or number of classes.
    """

    fold = None  # of a part of a split, how it was made (folds.Fold)

    def __init__(
        self,
        name_or_dir: str | os.PathLike,
        split: str,
        *,
        data_dir: str | os.PathLike | None = None,
        num_classes: int,
    ):
        self.directory = find_built(name_or_dir, data_dir)
        self.split = split
        self.num_classes = num_classes
        self._lock, self._records = threading.Lock(), None
        records = self._open()
        self.name, self._numbers = records.dataset_info.full_name, range(len(records))  # 'meadow/1.0.0'

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict:
        example = self._record(index)
        try:
            image = _decode(example["image"], cv2.IMREAD_COLOR)
            label = _decode(example["label"], cv2.IMREAD_UNCHANGED)
        except ValueError as error:
            raise UserError(f"cannot read {self.describe(index)}: {error}; build the set again") from error
        name = example["name"].decode() if "name" in example else f"{self.split}_{self._numbers[index]}"
        return {"image": cv2.cvtColor(image, cv2.COLOR_BGR2RGB), "label": label, "name": name}

    def __repr__(self) -> str:
        # Without the folder: Grain compares it on resume, and data may have moved in the meantime.
        return f"TfdsSource({self.name!r}, {self.split!r}, tiles={len(self)})"

    def only(self, indices: Sequence[int], fold=None) -> "TfdsSource":
        """These tiles alone, in this order. `fold`: how they were chosen (folds.Fold)."""
        part = copy.copy(self)  # opens the files for itself
        part.fold, part._numbers = fold, tuple(self._numbers[index] for index in indices)
        return part

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tiles, which takes reading all records; UserError where they hold none."""
        found = []
        for index in range(len(self)):
            if "name" not in (example := self._record(index)):
                raise UserError(
                    f"{self.describe(index)} holds no name to make areas (config.data.folds) or find features by"
                )
            found.append(example["name"].decode())
        return tuple(found)

    @property
    def origin(self) -> Origin:
        what = type(self).__name__, self.name, self.split, self.num_classes, tuple(self._numbers)
        return Origin(what, (pathlib.Path(self.directory),))

    def describe(self, index: int) -> str:
        """Which record this is, for messages."""
        return f"record {self._numbers[index]} of {self.split} in {self.directory}"

    def label_size(self, index: int) -> tuple[int, int]:
        """(H, W) of one label from the header of its PNG, without decoding it."""
        png = self._record(index)["label"]
        if png[:8] != b"\x89PNG\r\n\x1a\n" or len(png) < 24:
            return self[index]["label"].shape
        return int.from_bytes(png[20:24], "big"), int.from_bytes(png[16:20], "big")

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_records")}

    def __setstate__(self, state: dict):
        self.__dict__.update(state, _lock=threading.Lock(), _records=None)

    def _record(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"{self!r} has no tile {index}")
        try:
            return self._open()[self._numbers[index]]
        except Exception as error:
            raise UserError(f"cannot read {self.describe(index)}: {_line(error)}; build the data set again") from error

    def _open(self):
        with self._lock:
            if self._records is None:
                self._records = _open_split(self.directory, self.split, self.num_classes)
            return self._records


def imported() -> None:
    """TFDS: before other threads begin, since while it is imported `import` gives all of them lazy modules."""
    with _quiet():
        import tensorflow_datasets as tfds

        _ = tfds.builder_from_directory, tfds.core.DatasetInfo  # which brings in what those need


def _open_split(directory: str, split: str, num_classes: int):
    """TFDS's data source whose records hold the images still encoded."""
    with _quiet():
        import tensorflow_datasets as tfds

        try:
            builder = tfds.builder_from_directory(directory)
        except Exception as error:
            raise UserError(f"cannot read the data set in {directory}: {_line(error)}; build it again") from error
        info = builder.info
        known = [name for name, part in info.splits.items() if part.num_examples]
        if re.split(r"[\[+]", split)[0] not in known:
            raise UserError(f"{directory} has no split {split!r}: it has {', '.join(sorted(known))}")
        _check_features(info, directory, num_classes)
        if info.file_format.value != "array_record":
            raise UserError(
                f"{directory} is stored as {info.file_format.value}, which needs TensorFlow: "
                "build it with --file_format=array_record"
            )
        keep = {"image": tfds.decode.SkipDecoding(), "label": tfds.decode.SkipDecoding()}
        try:
            return builder.as_data_source(split, decoders=keep)
        except Exception as error:
            raise UserError(f"cannot open split {split!r} of {directory}: {_line(error)}") from error


def _check_features(info, directory, num_classes):
    features = info.features
    for name, channels in (("image", 3), ("label", 1)):
        if name not in features:
            raise UserError(
                f"{directory} has no feature {name!r} but {', '.join(sorted(features))}: build "
                "it with image, label and name, as data_builders/tiles.py does"
            )
        feature = features[name]
        if feature.shape[-1:] != (channels,) or feature.np_dtype != np.uint8:
            raise UserError(
                f"{directory}: feature {name!r} is {np.dtype(feature.np_dtype)} of shape "
                f"{feature.shape}, not uint8 with {channels} channels: build it again"
            )
    classes = getattr(features["label"], "names", None)
    if classes and len(classes) != num_classes:
        raise UserError(
            f"{directory} has {len(classes)} classes ({', '.join(classes)}), the configuration "
            f"{num_classes}: correct num_classes or the data set"
        )


def _decode(data: bytes, flags: int) -> np.ndarray:
    flags |= cv2.IMREAD_IGNORE_ORIENTATION
    array = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if array is None:
        raise UserError("its image data are damaged")
    return array


def default_data_dir() -> str:
    """Where TFDS keeps data sets: $TFDS_DATA_DIR or ~/tensorflow_datasets."""
    return os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")


def find_built(name_or_dir: str | os.PathLike, data_dir: str | os.PathLike | None = None) -> str:
    """The folder with `dataset_info.json`: the given one, or the highest version below the given name.

    Of a set with configurations the name alone means the default one: `l8_biome` is `l8_biome/tiles`.
    """
    root = epath.Path(os.path.expanduser(data_dir or default_data_dir()))
    name = os.fspath(name_or_dir)
    for path in (root / name, epath.Path(os.path.expanduser(name))):  # an absolute name replaces the root
        if (path / "dataset_info.json").exists():
            return os.fspath(path)
        # A folder of the working directory that merely has the name, such as data_builders/meadow, has none.
        for folder in (path, _default_config(path)):
            if versions := _versions(folder):
                return os.fspath(folder / versions[-1])
    folder = root / name
    message = f"data set {name!r} is not built: no */dataset_info.json in {folder}"
    base, config, version = _parse(name)
    if base in DATASETS and not version:
        manual = (
            "" if base == "meadow" else f" --manual_dir=FOLDER_WITH_{'SCENES' if config else 'img_dir_AND_ann_dir'}"
        )
        raise UserError(
            f"{message}; build it with: python -m ktda_jax.data.tfds_source {name} --data_dir={root}{manual}"
        )
    raise UserError(f"{message}; correct the name or data_dir ({_known_in(root)})")


def _parse(name: str) -> tuple[str, str | None, str | None]:
    """'l8_biome/scenes/1.0.0' -> base name, configuration, version; the last two may be missing."""
    base, *rest = name.strip("/").split("/")
    version = rest.pop() if rest and re.fullmatch(_VERSION, rest[-1]) else None
    return base, "/".join(rest) or None, version


def _default_config(path):
    """The folder of the configuration that TFDS noted as the default one; `path` itself without such a note."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        return path / json.loads((path / ".config" / "metadata.json").read_text())["default_config_name"]
    return path


def _versions(path) -> list[str]:
    if not path.is_dir():
        return []
    found = [
        child.name
        for child in path.iterdir()
        if re.fullmatch(_VERSION, child.name) and (child / "dataset_info.json").exists()
    ]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def _known_in(root) -> str:
    if not root.is_dir():
        return f"{root} does not exist"
    names = sorted(child.name for child in root.iterdir() if child.is_dir() and child.name != "downloads")
    return f"{root} holds {', '.join(names) or 'nothing'}"


def prepare(name: str, data_dir: str | os.PathLike | None = None, manual_dir: str | os.PathLike | None = None) -> str:
    """Builds `grass`, `l8_biome`, `l8_biome/scenes` or `meadow` into array_record unless there; returns its folder.

    `manual_dir` holds the published img_dir/ and ann_dir/ or their archives, for `l8_biome/scenes` the USGS scenes
    (also cut otherwise: `l8_biome/scenes[_percentile|_reflectance][_clear]`), for meadow nothing; it is not looked
    at when the set is already built. Several processes may call it at once: each builds into a folder of its own,
    the first to finish gives it the final name. UserError names the file when the data are unusable.
    """
    base, config, version = _parse(name)
    dataset_info(base)
    data_dir = os.path.expanduser(data_dir or default_data_dir())
    started = time.monotonic()
    # TFDS wants a download folder, which stays empty; archives are unpacked beside the data set.
    with _quiet(), tempfile.TemporaryDirectory() as scratch:
        import tensorflow_datasets as tfds

        builder_cls = importlib.import_module(f"data_builders.{base}.{base}_dataset_builder").Builder
        if config and not builder_cls.BUILDER_CONFIGS:
            raise UserError(f"unknown data set {name!r}: {base} has no configurations; call it {base}")
        options = {"config": config} if config else {}
        try:
            builder = builder_cls(data_dir=data_dir, file_format="array_record", version=version, **options)
        except AssertionError as error:  # what TFDS raises for a version it cannot build
            raise UserError(f"cannot build {name}: {_line(error)}") from error
        if builder.is_prepared():
            return os.fspath(builder.data_path)
        if builder_cls.MANUAL_DOWNLOAD_INSTRUCTIONS:
            _check_manual_dir(name, manual_dir)
            manual_dir = os.path.expanduser(manual_dir)
        download = tfds.download.DownloadConfig(manual_dir=manual_dir)
        try:
            builder.download_and_prepare(download_dir=scratch, download_config=download)
        except Exception as error:
            if not builder.is_prepared():  # else another process was first, and its files are as good
                _remove_if_empty(builder.data_path.parent)
                _remove_if_empty(builder.data_path.parent.parent, but=data_dir)
                if isinstance(error, UserError):
                    raise
                raise UserError(f"cannot build {name} in {data_dir}: {_line(error)}") from error
        if not builder.is_prepared():  # TFDS takes any folder of that name for the finished set
            raise UserError(f"{builder.data_path} exists but holds no data set: remove it and run again")
    logging.info("built %s in %.1f s: %s", name, time.monotonic() - started, builder.data_path)
    return os.fspath(builder.data_path)


def _check_manual_dir(name, manual_dir):
    base, config, _ = _parse(name)
    content = "Landsat scenes" if config and config != "tiles" else "published img_dir and ann_dir, or their archives"
    if not manual_dir:
        raise UserError(
            f"{name} is not built and is not generated: give manual_dir, the folder with the {content} "
            f"({dataset_info(base).homepage})"
        )
    folder = os.path.expanduser(manual_dir)
    if not os.path.isdir(folder):
        right = f"the folder with the {content}"
        if os.path.isfile(folder):
            right = f"{os.path.dirname(os.path.abspath(folder))}, which holds it"
        raise UserError(f"manual_dir {os.fspath(manual_dir)} for {name} is not a directory: give {right}")
    if not os.listdir(folder):
        raise UserError(f"manual_dir {os.fspath(manual_dir)} for {name} is empty: put the {content} there")


def _remove_if_empty(path, but=None):
    """Removes a folder that holds nothing, or nothing but TFDS's note of the default configuration."""
    with contextlib.suppress(OSError):
        if but is None or not os.path.samefile(path, but):
            if os.listdir(path) == [".config"]:
                shutil.rmtree(path / ".config")
            os.rmdir(path)


@contextlib.contextmanager
def _quiet():
    """Keeps TFDS's banners, progress bars and log lines off the terminal; errors are raised anyway."""
    with _quiet_lock:
        verbosity = logging.get_verbosity()
        logging.set_verbosity(min(verbosity, logging.ERROR))
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                import tensorflow_datasets as tfds

                tfds.disable_progress_bar()
                yield
        finally:
            logging.set_verbosity(verbosity)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main(argv=None):
    """`python -m ktda_jax.data.tfds_source NAME[/CONFIG] [--data_dir=DIR] [--manual_dir=DIR]` builds a data set."""
    import argparse
    import signal
    import sys

    parser = argparse.ArgumentParser(prog="python -m ktda_jax.data.tfds_source", description=prepare.__doc__)
    parser.add_argument("name", help=f"{', '.join(sorted(DATASETS))}, l8_biome/scenes")
    parser.add_argument("--data_dir", help=f"default {default_data_dir()}")
    parser.add_argument("--manual_dir", help="folder with img_dir and ann_dir, their archives, or scenes")
    args = parser.parse_args(argv)

    def stop(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    started = time.time()
    try:
        path = prepare(args.name, args.data_dir, args.manual_dir)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        number = next(iter(error.args), signal.SIGINT)
        words = "stopped from the keyboard" if number == signal.SIGINT else "stopped by a signal"
        print(f"error: {words}", file=sys.stderr)
        sys.exit(128 + number)
    print(path)
    if os.stat(os.path.join(path, "dataset_info.json")).st_mtime < started:
        print("it was there already and is left as it was; remove it to build it again", file=sys.stderr)


if __name__ == "__main__":
    main()
