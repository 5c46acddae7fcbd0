"""Maps as raster files: GeoTIFF from top to bottom, Cloud-Optimized GeoTIFF and PNG, each read back and compared."""

import contextlib
import pathlib
import warnings
import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from ktda_jax import UserError
from ktda_jax.data.gdal import rasterio_for
from ktda_jax.data.raster import Scene


class RasterWriter:
    """A tiled, compressed GeoTIFF of uint8, written from top to bottom in whole blocks."""

    def __init__(
        self,
        path: pathlib.Path,
        scene: Scene,
        bands: Sequence[str],
        *,
        palette: dict[int, tuple] | None = None,
        unit: float | None = None,
        tags: dict[str, str] | None = None,
    ):
        """bands: their names. palette: colours of a single band's values. unit: what a stored 1 stands for."""
        rasterio = rasterio_for(path)
        self.path, self._scene = path, scene
        self._block = 512 if min(scene.height, scene.width) > 512 else 256
        self._waiting, self._top = [], 0
        self.checksums: list[tuple[int, int]] = []  # end of each part, and CRC of its rows
        with _writing(path):
            self._file = rasterio.open(
                path, "w", driver="GTiff", dtype="uint8", count=len(bands), height=scene.height, width=scene.width,
                nodata=255, tiled=True, blockxsize=self._block, blockysize=self._block, interleave="band",
                compress="deflate", zlevel=1, predictor=1 if palette else 2, bigtiff="if_safer", **scene.place,
            )  # fmt: skip
            if palette:
                self._file.write_colormap(1, palette)
            if unit:
                self._file.scales = (unit,) * len(bands)
            self._file.descriptions = tuple(bands)
            self._file.update_tags(**(tags or {}))

    def write(self, rows: np.ndarray) -> None:
        """rows: uint8 (bands, h, W), any number of them, or (h, W)."""
        self._waiting.append(rows if rows.ndim == 3 else rows[None])
        if self._rows() >= self._block:
            self._flush(self._rows() // self._block * self._block)

    def _rows(self) -> int:
        return sum(rows.shape[1] for rows in self._waiting)

    def _flush(self, count: int) -> None:
        from rasterio.windows import Window

        rows = np.concatenate(self._waiting, axis=1) if len(self._waiting) > 1 else self._waiting[0]
        with _writing(self.path):
            self._file.write(rows[:, :count], window=Window(0, self._top, rows.shape[2], count))
        self._top += count
        self.checksums.append((self._top, _checksum(rows[:, :count])))
        self._waiting = [rows[:, count:].copy()]

    def close(self) -> None:
        """UserError unless all of it is in the file."""
        if self._rows():
            self._flush(self._rows())
        with _writing(self.path):
            self._file.close()
        check_whole(self.path, self.checksums)

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._file.close()


@contextlib.contextmanager
def _writing(path: pathlib.Path) -> Iterator[None]:
    rasterio_for(path)
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # GDAL's are many, not all of them rasterio's, and of different bases
        words = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"cannot write in {path.parent}: {words or type(error).__name__}; is the disk full?") from error


def _checksum(rows: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(rows))


def check_whole(path: pathlib.Path, checksums: Sequence[tuple[int, int]]) -> None:
    """UserError unless a raster gives back what was written.

    On a full disk GDAL writes what fits, and says so to nobody if that happens while it empties its cache.
    """
    from rasterio.windows import Window

    rasterio = rasterio_for(path)
    with _writing(path), rasterio.open(path) as file:
        top = 0
        for end, checksum in checksums:
            if _checksum(file.read(window=Window(0, top, file.width, end - top))) != checksum:
                raise OSError("the file does not hold what was written to it")
            top = end


def convert(source: pathlib.Path, target: pathlib.Path, driver: str, checksums: Sequence[tuple[int, int]]) -> None:
    """A GeoTIFF as Cloud-Optimized GeoTIFF (driver COG) or as PNG, checked as `check_whole` does."""
    import rasterio.shutil

    options = {"PNG": {}, "COG": dict(compress="deflate", bigtiff="if_safer", num_threads="ALL_CPUS")}[driver]
    with _writing(target), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if driver == "COG":
            with rasterio.open(source) as file:
                classes = file.colorinterp[0] == rasterio.enums.ColorInterp.palette
            options |= (
                {"overview_resampling": "nearest"} if classes else {"overview_resampling": "average", "predictor": 2}
            )
        rasterio.shutil.copy(source, target, driver=driver, **options)
    check_whole(target, checksums)
