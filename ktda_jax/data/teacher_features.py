"""The frozen teacher's features of a split on disk, so that training need not run the teacher (ktda_jax.extract).

A folder of array_record files, `manifest.json`, and `records.npy`, which says where a tile is. Every tile has two
records, of the tile and of its mirror image, or eight, of all its views (geometry.view): the taps of the whole tile,
(n, h, w, C), of n layers. The manifest says
what they were made from; whoever reads them says what is wanted, and anything else is refused.
"""

import hashlib
import json
import pathlib
import threading
from collections.abc import Mapping, Sequence

import ml_dtypes
import numpy as np

from ktda_jax import UserError
from ktda_jax.data.geometry import turned

FORMATS = (1, 2)  # 2: of other than two views, which former versions would take for others'
MANIFEST, RECORDS = "manifest.json", "records.npy"
DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
PADDING = "zeros at bottom and right up to a multiple of the patch, after normalisation"


class FeatureWriter:
    """Writes one shard: tiles in the order of the calls."""

    def __init__(self, path: pathlib.Path, dtype: str):
        from array_record.python.array_record_module import ArrayRecordWriter

        self._dtype, self._writer = DTYPES[dtype], ArrayRecordWriter(str(path), "group_size:1")

    def write(self, name: str, views: Sequence[np.ndarray]) -> None:
        """Of one tile's views, in their order: (n, h, w, C) each, in the stored dtype."""
        for values in views:
            if not np.isfinite(values).all():
                raise UserError(
                    f"the teacher's features of tile {name} are not finite as {self._dtype}: set "
                    "config.teacher.dtype='bfloat16'"
                )
            self._writer.write(np.ascontiguousarray(values, self._dtype).tobytes())

    def close(self) -> None:
        self._writer.close()


class TeacherFeatures:
    """Random access to the features of a split; threads may share it and it pickles.

    `wanted` is the manifest's `made_from` as the configuration at hand would have it; entries that are None there are
    not compared. UserError names what differs.
    """

    def __init__(self, folder: pathlib.Path, wanted: dict):
        self.folder = pathlib.Path(folder)
        manifest = read_manifest(self.folder)
        check(self.folder, manifest, wanted)
        self.patch = manifest["made_from"]["patch"]
        self.source = manifest["made_from"]["teacher"]
        self.views = views_of(manifest)
        tapped = _tapped(manifest["made_from"])
        self._layers = stored_layers(tapped)
        self.levels = [None if index is None else self._layers.index(index) for index in tapped]  # which of the n
        self._dtype, self._width = DTYPES[manifest["dtype"]], manifest["made_from"]["width"]
        told = {k: manifest[k] for k in ("made_from", "dtype", "computed_in")}
        self.fingerprint = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()  # wherever they lie
        self._paths = [str(self.folder / name) for name in manifest["shards"]]
        for path, size in [*zip(self._paths, manifest["shards"].values(), strict=True), (self.folder / RECORDS, None)]:
            if not pathlib.Path(path).is_file():
                raise UserError(f"the teacher features in {self.folder} lack {path}: {AGAIN}")
            if size is not None and (found := pathlib.Path(path).stat().st_size) != size:
                raise UserError(f"{path} has {found:,} bytes, not the {size:,} that were written: {AGAIN}")
        try:
            self._records = np.load(self.folder / RECORDS)  # (tiles, 4): shard, place in it, h, w
        except (ValueError, EOFError) as error:
            raise UserError(f"cannot read {self.folder / RECORDS}: {AGAIN}") from error
        self._lock, self._open = threading.Lock(), None

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int, view: int) -> np.ndarray:
        """The taps (n, h, w, C) of a view of tile `index`."""
        shard, place, height, width = self._records[index].tolist()
        if turned(view):
            height, width = width, height
        try:
            data = self._shards()[shard][self.views * place + view]
            return np.frombuffer(data, self._dtype).reshape(len(self._layers), height, width, self._width)
        except Exception as error:
            raise UserError(f"cannot read the teacher features of tile {index} in {self.folder}: {AGAIN}") from error

    def _shards(self) -> list:
        with self._lock:
            if self._open is None:
                import grain  # only here: benchmarks run where it is not installed

                self._open = [grain.sources.ArrayRecordDataSource([path]) for path in self._paths]
            return self._open

    def __getstate__(self) -> dict:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_open")}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _open=None)


def views_of(manifest: Mapping) -> int:
    """How many views of a tile are stored: before there was a choice, it and its mirror image."""
    return manifest.get("views", 2)


def stored_layers(tapped: Sequence[int | None]) -> list[int]:
    """The layers of which features are stored, each once, for those of all levels."""
    return sorted({index for index in tapped if index is not None})


def _tapped(made_from: Mapping) -> list[int | None]:
    """The layer of each level; features made before there was a choice are of the last layer of each quarter."""
    return made_from.get("taps") or [(k + 1) * made_from["depth"] // 4 - 1 for k in range(4)]


AGAIN = "extract them again by python -m ktda_jax.extract with this config, into a new config.teacher.features"
_NAMED = {  # of `made_from`
    "tiles": "other tiles",
    "split": "another split",
    "sha256": "another teacher's weights",
    "image_size": "a teacher set to another image size",
    "rgb": "other bands",
    "taps": "other layers",
}


def check(folder: pathlib.Path, manifest: dict, wanted: dict) -> None:
    """UserError unless the features were made from what is wanted."""
    made = {"bands": 3, **manifest["made_from"], "taps": _tapped(manifest["made_from"])}
    for key, value in wanted.items():
        if value is None or made.get(key) == value:
            continue
        what = _NAMED.get(key, f"a teacher of another {key}")
        there = "random ones" if (key, made.get(key)) == ("sha256", None) else _short(made.get(key))
        raise UserError(f"the teacher features in {folder} are of {what} ({there}, wanted {_short(value)}): {AGAIN}")


def _short(value) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text  # a sha256


def read_manifest(folder: pathlib.Path) -> dict:
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        if manifest["format"] not in FORMATS:
            known = " or ".join(map(str, FORMATS))
            raise UserError(f"the teacher features in {folder} have format {manifest['format']}, not {known}: {AGAIN}")
        parts = {"made_from", "dtype", "computed_in", "shards"}
        if not parts <= manifest.keys() or not isinstance(manifest["shards"], dict):
            raise ValueError("parts are missing")
        if not {"teacher", "patch", "width", "depth"} <= manifest["made_from"].keys():
            raise ValueError("it does not say what the features were made from")
        DTYPES[manifest["dtype"]]
        return manifest
    except FileNotFoundError as error:
        raise UserError(
            f"no teacher features in {folder} (no {MANIFEST}): extract them by python -m ktda_jax.extract with this "
            "config, or set config.teacher.features"
        ) from error
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {' '.join(str(error).split())}; {AGAIN}") from error
