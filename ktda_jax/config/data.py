"""The settings of the tiles, config.data: which ones, how they are read, augmented and scored. See settings.py."""

import dataclasses

from ktda_jax import UserError
from ktda_jax.config.fields import NOT_NEGATIVE, setting
from ktda_jax.data import reading
from ktda_jax.data.datasets import DatasetInfo, dataset_info, distinct_colours

PUBLISHED = "Zhang et al., ICME 2025, and their code"


def listed(text: str) -> tuple[str, ...]:
    """The parts of a line with commas, as one gives them on a command line; brackets and quotes around them go."""
    return tuple(filter(None, (part.strip(" '\"") for part in text.strip(" ()[]").split(","))))


@dataclasses.dataclass(frozen=True)
class Data:
    """Which tiles, and how they are read and augmented."""

    source: str = setting("folder, or tfds: records that data_builders/ has built")
    name: str = setting("data set, which gives classes and palette (data/datasets.py); for tfds also which records")
    root: str | None = setting("folder with img_dir/ and ann_dir/; for tfds its data_dir", runtime=True)
    manual_dir: str | None = setting("tfds: where the published folders or archives are", runtime=True)
    train_split: str = setting("split that is trained on")
    val_split: str = setting("split that selects the best checkpoint; not read with `folds`")
    test_split: str | None = setting("split evaluated at the end; None: val_split", runtime=True)
    folds: str | None = setting(
        "areas of train_split, one of which is held out instead of val_split: name (tiles' names up to the first _ or "
        "-), name:K (K groups of these) or place:K (by coordinates); None: val_split validates", absent=None,
    )  # fmt: skip
    fold: int = setting("the area that is held out", unit="from 0", fits=NOT_NEGATIVE, absent=0)
    classes: tuple[str, ...] | str | None = setting(
        "names of your own classes, or a line of them with commas; None: the data set's", absent=None
    )
    palette: tuple | None = setting(
        "their colours; None: some that differ", unit="(red, green, blue) of 0 to 255", absent=None
    )
    bands: tuple[int, ...] | None = setting("bands of multi-band files; None: 8-bit RGB", unit="from 1", absent=None)
    rgb: tuple[int, ...] | None = setting(
        "which of them teacher and figures see as red, green, blue; None: the first three", absent=None
    )
    scale: tuple | None = setting("(low, high), or a pair per band: what becomes 0 and 255", absent=None)
    nodata: float | None = setting("value of pixels without data; None: as the file declares", absent=None)
    label_map: tuple | None = setting("((stored value or (r, g, b), class), ...); None: as stored", absent=None)
    unlabelled: str | None = setting(
        "images and scenes without labels, for the distillation: files, patterns and folders with commas between them",
        absent=None, runtime=True,
    )  # fmt: skip
    unlabelled_share: float = setting(
        "of a batch's rows that come from them", absent=0.5, fits=(lambda x: 0 < x < 1, "a share between 0 and 1")
    )
    unlabelled_val: str | None = setting(
        "those that score a distillation without labels; None: a tenth of `unlabelled`", absent=None, runtime=True
    )
    crop: tuple[int, int] = setting("height and width trained on, and evaluated at", unit="px", source=PUBLISHED)
    eval_scale: str = setting(
        "native: validation maps tiles as predict does, in windows of the crop; crop: it squeezes them to the crop",
        source=PUBLISHED, absent="crop",
    )  # fmt: skip
    flip: float = setting(
        "probability of a mirror image", source=PUBLISHED, fits=(lambda x: 0 <= x <= 1, "a probability")
    )
    rotate: bool = setting("quarter turns too, so that each of the eight views is as likely", absent=False)
    zoom: tuple[float, float] | None = setting(
        "(low, high): labelled crops are enlarged by a factor between them; below 1 as far as tiles go", absent=None,
        fits=(lambda x: len(x) == 2 and 0 < x[0] <= x[1], "(low, high), low first and above 0"),
    )  # fmt: skip
    cutmix: float = setting(
        "probability that a part of another crop is pasted into a labelled one", absent=0.0,
        fits=(lambda x: 0 <= x <= 1, "a probability"),
    )  # fmt: skip
    rare_crops: float = setting(
        "share of labelled crops around a pixel of a class that is drawn by its inverse frequency", absent=0.0,
        fits=(lambda x: 0 <= x <= 1, "a share from 0 to 1"),
    )  # fmt: skip
    photometric: bool = setting("distort brightness, contrast, saturation and hue", source=PUBLISHED)
    on_corrupt: str = setting("what a broken training tile does: stop, or skip it and count", runtime=True)
    num_threads: int | None = setting("that read tiles; None: by the cores", fits=NOT_NEGATIVE, runtime=True)

    @property
    def info(self) -> DatasetInfo:
        """Class names and palette: the config's own, or those of the data set it names."""
        try:
            if not self.classes:
                return dataset_info(self.name)
            classes = listed(self.classes) if isinstance(self.classes, str) else tuple(self.classes)
            if twice := {name for name in classes if classes.count(name) > 1}:
                raise UserError(f"classes names {', '.join(sorted(twice))} twice")
            palette = tuple(map(tuple, self.palette)) if self.palette else distinct_colours(len(classes))
            return DatasetInfo(self.name, classes, palette, tile_size=max(self.crop), splits=())
        except UserError as error:
            raise UserError(f"config.data: {error}") from error

    @property
    def validation(self) -> str:
        """What selects the best checkpoint, as `open_source` takes it: val_split, or train_fold0 and so on of folds."""
        return self.val_split if self.folds is None else f"{self.train_split}_fold{self.fold}"

    @property
    def num_bands(self) -> int:
        return reading.bands_of(self)[0]

    @property
    def rgb_positions(self) -> tuple[int, int, int]:
        """Of red, green and blue among the bands."""
        return reading.bands_of(self)[1]
