"""Few labelled tiles, drawn: which ones, and folders that hold them and the tiles that are scored."""

import contextlib
import json
import pathlib

import numpy as np
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
LABELLED, RAREST = 0.05, 0.005  # least share of a tile's pixels with a label, and of a draw's of each class

# name: classes; groups of training tiles, taken from in turn; groups that are scored, apart and together. A group is
# the split that a tile lies in, or the beginning of its name, up to the first underscore.
SETS = {
    "choose": ("building,land,road,vegetation,water", ("area1", "area2", "area7"), ("area4",)),
    "final": ("building,land,road,vegetation,water", ("area1", "area2", "area4", "area7"), ("area3", "area6")),
    "clouds": ("clear,cloud", ("train",), ("val",)),
}


def names_of(tiles: pathlib.Path) -> dict[str, pathlib.Path]:
    """{name: image} of all splits of a folder of tiles."""
    found = {path.stem: path for path in sorted(tiles.glob("img_dir/*/*.png"))}
    if not found:
        raise SystemExit(f"no tiles in {tiles}/img_dir/*/: cut them first")
    return found


def members(images: dict[str, pathlib.Path], group: str) -> list[str]:
    return [name for name, path in images.items() if group in (path.parent.name, name.split("_")[0])]


def label_of(image: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(str(image).replace("/img_dir/", "/ann_dir/"))


def draw(tiles: pathlib.Path, name: str, labels: int, number: int) -> list[str]:
    """Names of `labels` tiles, from the groups in turn; a draw that lacks a class is drawn again. Written down once."""
    record = HERE / "draws" / f"{name}_{labels}_{number}.json"
    if record.exists():
        return json.loads(record.read_text())
    classes, groups, _ = SETS[name]
    images, rng = names_of(tiles), np.random.default_rng([labels, number])
    counts = {k: np.bincount(np.asarray(Image.open(label_of(v))).ravel(), minlength=256) for k, v in images.items()}
    usable = {k for k, c in counts.items() if c[:255].sum() >= LABELLED * c.sum()}
    by_group = [[k for k in members(images, group) if k in usable] for group in groups]
    while True:
        orders = [iter(rng.permutation(group).tolist()) for group in by_group]
        chosen = [next(orders[k % len(orders)]) for k in range(labels)]
        total = sum(counts[k] for k in chosen)[: len(classes.split(","))]
        if (total >= RAREST * total.sum()).all():
            break
    record.parent.mkdir(exist_ok=True)
    record.write_text(json.dumps(sorted(chosen), indent=0) + "\n")
    return sorted(chosen)


def folder(work: pathlib.Path, tiles: pathlib.Path, name: str, labels: int, number: int) -> pathlib.Path:
    """WORK/tiles/NAME_LABELS_NUMBER with the splits train and the scored groups, as links. labels 0: all tiles."""
    target, images = work / "tiles" / f"{name}_{labels}_{number}", names_of(tiles)
    _, groups, scored = SETS[name]
    splits = {group: members(images, group) for group in scored}
    everything = [k for group in groups for k in members(images, group)]
    splits["train"] = draw(tiles, name, labels, number) if labels else everything
    splits["images"] = everything
    for split, names in splits.items():
        for name in names:
            for source in (images[name], label_of(images[name])):
                link = target / source.parent.parent.name / split / source.name
                link.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileExistsError):  # of another row, which may run at this moment
                    link.symlink_to(source.resolve())
    return target
