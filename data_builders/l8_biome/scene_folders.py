"""USGS scene folders with cloud masks: finding them below a manual directory, and dealing them to splits.

A scene is `SCENE_B2.TIF`, `_B3.TIF`, `_B4.TIF` (as the USGS has it) or `SCENE.TIF` with the bands 1 to 11 stacked (as
torchgeo has it), with `SCENE_fixedmask.img` + `.hdr` or `SCENE_fixedmask.TIF` beside it.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator

from absl import logging

from data_builders import archives
from ktda_jax import UserError

BIOMES = ("barren", "forest", "grass_crops", "shrubland", "snow_ice", "urban", "water", "wetlands")
SPLITS = ("train", "val", "test")
# Share of the scenes up to each split's end. The published lists of scenes could not be had, so these splits are ours.
_SHARES = {"train": 0.6, "val": 0.8, "test": 1.0}

_RGB = (4, 3, 2)  # OLI bands
_SCENE_FILE = re.compile(r"(.+?)(?:_fixedmask\.(?:img|tiff?)|_B[234]\.tiff?|_MTL\.txt)", re.IGNORECASE)
_STACK = re.compile(r"(LC8\d{13}[A-Z]{3}\d\d)\.tiff?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Scene:
    """One scene on disk: `bands` are (file, index in it from 1) of red, green and blue."""

    id: str
    biome: str  # one of BIOMES, or 'unknown'
    split: str | None  # that of the folders above it, if one of them is called so
    bands: tuple[tuple[pathlib.Path, int], ...]
    mask: pathlib.Path


@contextlib.contextmanager
def scene_folders(manual_dir, scratch) -> Iterator[list[Scene]]:
    """The scenes below `manual_dir` at any depth, by biome and id; their files are valid inside the `with`.

    Archives are unpacked into a temporary folder in `scratch`, unless a folder of that name lies beside them. The
    biome is the nearest folder or archive above the files that is called like one. UserError if there is no scene, a
    scene lacks files, or two have the same id.
    """
    root = pathlib.Path(manual_dir)
    packed = [path for path in _walk(root) if archives.is_archive(path)]
    packed = [path for path in packed if not (path.parent / archives.stem(path)).is_dir()]
    with tempfile.TemporaryDirectory(prefix="unpacked.", dir=scratch) as folder:
        for archive in packed:
            logging.info("unpacking %s", archive)
            target = pathlib.Path(folder) / archive.parent.relative_to(root) / archives.stem(archive)
            archives.unpack(archive, lambda path, target=target: target / path if _is_needed(path.name) else None)
        scenes = [*_scenes(root, root.name), *_scenes(pathlib.Path(folder), root.name)]
        if not scenes:
            held = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
            raise UserError(
                f"no Landsat scenes in {root}, which holds {held}: give the folder with BIOME/SCENE/SCENE_B4.TIF, "
                "_B3.TIF, _B2.TIF and SCENE_fixedmask.img, or with their archives, as manual_dir"
            )
        seen = {}
        for scene in scenes:
            if scene.id in seen:
                raise UserError(f"scene {scene.id} is there twice: {seen[scene.id]} and {scene.mask}; remove one")
            seen[scene.id] = scene.mask
        yield sorted(scenes, key=lambda scene: (scene.biome, scene.id))


def split_scenes(scenes: list[Scene]) -> dict[str, list[Scene]]:
    """{split: scenes}, no scene in two: as the folders train, val and test say, or else dealt about 3 : 1 : 1.

    Dealt by the id alone (sha256), so that a scene is in the same split whichever others are there. UserError if only
    some scenes lie below such folders, or if train gets none.
    """
    loose = [scene for scene in scenes if not scene.split]
    if loose and len(loose) < len(scenes):
        raise UserError(
            f"{len(loose)} of {len(scenes)} scenes lie outside the folders train, val and test that hold the others: "
            f"{', '.join(scene.id for scene in loose[:5])}; move them, or give folders without these names"
        )
    if loose:
        dealt = {scene.id: _dealt(scene.id) for scene in scenes}
    else:
        dealt = {scene.id: scene.split for scene in scenes}
    splits = {split: [scene for scene in scenes if dealt[scene.id] == split] for split in SPLITS}
    if not splits["train"]:
        how = "by their ids" if loose else "by their folders"
        raise UserError(f"none of the {len(scenes)} scenes is for train {how}: put some below a folder named train")
    return {split: found for split, found in splits.items() if found}


def _dealt(scene_id: str) -> str:
    share = int(hashlib.sha256(scene_id.encode()).hexdigest()[:12], 16) / 16**12
    return next(split for split, end in _SHARES.items() if share < end)


def biome_of(folders: tuple[str, ...]) -> str:
    """The biome that the last telling one of the folder names says: `Grass-Crops` is grass_crops; or 'unknown'."""
    known = {_letters(biome): biome for biome in BIOMES}
    return next((known[_letters(name)] for name in reversed(folders) if _letters(name) in known), "unknown")


def _letters(name):
    return re.sub("[^a-z]", "", name.lower()).rstrip("s")


def _walk(root) -> Iterator[pathlib.Path]:
    """Visible files below `root`. Links are followed, since they are the cheap way to arrange scenes in folders."""
    for folder, subfolders, files in os.walk(root, followlinks=True):
        above = {os.path.realpath(folder), *map(str, pathlib.Path(os.path.realpath(folder)).parents)}
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not archives.is_junk(name) and os.path.realpath(os.path.join(folder, name)) not in above
        )
        yield from (pathlib.Path(folder, name) for name in sorted(files) if not archives.is_junk(name))


def _is_needed(name):
    return bool(_SCENE_FILE.fullmatch(name) or _STACK.fullmatch(name)) or name.lower().endswith(".hdr")


def _scenes(root, root_name) -> Iterator[Scene]:
    folders = {}
    for path in _walk(root):
        folders.setdefault(path.parent, {})[path.name.lower()] = path
    for folder, files in folders.items():
        names = (path.name for path in files.values())
        ids = {match[1] for name in names if (match := _SCENE_FILE.fullmatch(name) or _STACK.fullmatch(name))}
        above = folder.relative_to(root).parts
        for scene in sorted(ids):
            yield Scene(
                id=scene,
                biome=biome_of((root_name, *above)),
                split=next((name for name in reversed(above) if name in SPLITS), None),
                bands=_bands(scene, folder, files),
                mask=_mask(scene, folder, files),
            )


def _bands(scene, folder, files):
    found = {band: _file(files, f"{scene}_B{band}", ".tif", ".tiff") for band in _RGB}
    if all(found.values()):
        return tuple((found[band], 1) for band in _RGB)
    stack = _file(files, scene, ".tif", ".tiff")
    if stack and not any(found.values()):
        return tuple((stack, band) for band in _RGB)
    missing = ", ".join(f"{scene}_B{band}.TIF" for band in _RGB if not found[band])
    raise UserError(f"scene {scene} in {folder} lacks {missing}: add the files or remove the scene")


def _mask(scene, folder, files):
    if not (mask := _file(files, f"{scene}_fixedmask", ".img", ".tif", ".tiff")):
        raise UserError(
            f"scene {scene} in {folder} has no mask: add {scene}_fixedmask.img with its .hdr, or "
            f"{scene}_fixedmask.TIF, or remove the scene"
        )
    if mask.suffix.lower() == ".img" and not _file(files, f"{scene}_fixedmask", ".hdr", ".img.hdr"):
        raise UserError(f"mask {mask} has no header: add {scene}_fixedmask.hdr")
    return mask


def _file(files, stem, *suffixes):
    return next((files[name] for suffix in suffixes if (name := f"{stem}{suffix}".lower()) in files), None)
