"""Which files are mapped, and what their maps are called."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence

from ktda_jax import UserError
from ktda_jax.data import buckets
from ktda_jax.data.addresses import Image, is_address, masked
from ktda_jax.data.paths import absolute, found, names, place

SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg", ".vrt", ".jp2")  # of scenes in a folder
MAPS = (".tif", ".tiff", ".png")
LONGEST_NAME = 255 - len(".aux.xml")  # bytes
PLAIN = (".png", ".jpg", ".jpeg")  # their maps are PNG in a folder of maps


@dataclasses.dataclass(frozen=True)
class Outputs:
    """The files of one scene, all in one folder, which may be in a bucket; None: not wanted."""

    map: pathlib.PurePath
    probabilities: pathlib.PurePath | None
    confidence: pathlib.PurePath | None
    overlay: pathlib.PurePath | None
    polygons: pathlib.PurePath | None
    view: pathlib.PurePath | None = None

    def wanted(self) -> list[pathlib.PurePath]:
        return [path for path in (getattr(self, field.name) for field in dataclasses.fields(self)) if path]


def expand(text: str, flag: str = "--input") -> list[Image]:
    """The scenes of --input, as `paths.found` takes them. UserError if there are none."""
    return found(text, SUFFIXES, what="scene", called=f"{flag}={text}")


def name_outputs(
    inputs: Sequence[Image], output: str, *, one: bool, probabilities=False, confidence=False, overlay=False,
    polygonize=False, view=False, cog=False,
) -> list[Outputs]:  # fmt: skip
    """The outputs of each input: --output itself for `one` file, else in that folder by the names of the inputs.

    Those of the same name are named by the folders that tell them apart, too: a/TCI.tif becomes a_TCI.tif. UserError if
    two would be the same file, or one of them an input.
    """
    if is_address(output) and not buckets.is_remote(output):  # pathlib would make a local folder of that name
        raise UserError(f"--output={masked(output)} is no path, nor gs://BUCKET/FOLDER; mount it and give the folder")
    target = place(output)
    folder = not one or target.is_dir() or output.endswith("/") or not target.suffix
    if folder and target.suffix.lower() in MAPS and not target.is_dir():
        raise UserError(f"--output={output} is one file for {len(inputs)} inputs; give a folder")
    if not folder and target.suffix.lower() not in MAPS:
        raise UserError(f"--output={output} must end in {', '.join(MAPS)}, or be a folder")
    named = []
    for path, name in zip(inputs, names(inputs), strict=True):
        made = target / (_stem(name) + (".png" if path.suffix.lower() in PLAIN else ".tif")) if folder else target
        if cog and made.suffix.lower() == ".png":
            raise UserError(f"--cog makes GeoTIFF, and the map of {path} is {made}; give an --output that ends in .tif")

        def beside(wanted, ending, made=made):
            return made.with_name(made.stem + ending) if wanted else None

        named.append(
            Outputs(
                made,
                beside(probabilities, "_probabilities.tif"),
                beside(confidence, "_confidence.tif"),
                beside(overlay, "_overlay.png"),
                beside(polygonize, ".gpkg"),
                beside(view, ".html"),
            )
        )
    _check(inputs, named)
    return named


def _stem(name: str) -> str:
    """All maps are in one folder."""
    *folders, last = name.split("/")
    return "_".join([*filter(None, (folder.strip(".:") for folder in folders)), pathlib.PurePosixPath(last).stem])


def make_folders(outputs: Sequence[Outputs]) -> None:
    """UserError if a folder cannot be made or written to."""
    for folder in {made.map.parent for made in outputs}:
        try:
            if not buckets.is_remote(folder):
                folder.mkdir(parents=True, exist_ok=True)
            buckets.probe(folder)
        except OSError as error:
            raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from error


def missing(outputs: Sequence[Outputs]) -> list[int]:
    """The places of those that are not all there; a bucket is asked once for each folder."""
    folders = {made.map.parent for made in outputs}
    try:
        there = {name for folder in folders if buckets.is_remote(folder) for name in buckets.inside(folder)}
    except OSError as error:
        raise UserError(str(error)) from error

    def exists(path: pathlib.PurePath) -> bool:
        return str(path).removeprefix(buckets.SCHEME) in there if buckets.is_remote(path) else path.exists()

    return [k for k, made in enumerate(outputs) if not all(map(exists, made.wanted()))]


def check_sources(read: Mapping[pathlib.Path, Sequence[Image]], named: Sequence[Outputs]) -> None:
    """read: each scene's files, such as the sources of a VRT. UserError if an output would be one of them."""
    sources = {str(absolute(source)): path for path, files in read.items() for source in files}
    for made in (made for outputs in named for made in outputs.wanted()):
        if path := sources.get(str(absolute(made))):
            part = "" if str(absolute(made)) == str(absolute(path)) else "what is read by "
            raise UserError(f"{made} would be written over {part}the input {path}; choose another --output")


def _check(inputs: Sequence[Image], named: Sequence[Outputs]) -> None:
    check_sources({path: [path] for path in inputs}, named)
    written = {}
    for path, outputs in zip(inputs, named, strict=True):
        for made in outputs.wanted():
            where = absolute(made)
            if len(os.fsencode(made.name)) > LONGEST_NAME:
                raise UserError(f"the file name {made.name} is too long; map {path} alone, to another --output")
            if where in written:
                raise UserError(
                    f"{written[where]} and {path} would both be mapped to {made}; map them into different folders"
                )
            written[where] = path
