"""Which files of a folder hold its weights: one, or the shards of Hugging Face's index."""

import json
import pathlib

from ktda_jax import UserError


def weight_files(folder: pathlib.Path) -> tuple[list[pathlib.Path], dict[str, str]]:
    """The files to read, and by tensor's name the shard that an index says it is in. UserError names what is missing.

    Files that begin with a dot (macOS leaves ._model.safetensors beside model.safetensors) are none.
    """
    for suffixes in ((".safetensors",), (".bin", ".pth")):
        files = _visible(folder, suffixes)
        indices = _visible(folder, tuple(f"{suffix}.index.json" for suffix in suffixes))
        shards = _weight_map(indices[0]) if indices else {}
        names = sorted(set(shards.values()))
        whole = [file for file in files if file.name not in names]
        if len(whole) == 1 and (not names or len(files) == 1):  # an index without its shards is left of another form
            return whole, {}
        if names:
            if missing := [name for name in names if not (folder / name).is_file()]:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise UserError(f"{folder} lacks {missing[0]}{more}, which its {indices[0].name} lists; is it whole?")
            return [folder / name for name in names], shards
        if files:
            some = ", ".join(file.name for file in files[:4])
            raise UserError(f"{folder} holds {len(files)} weight files ({some}); give one of them")
    hint = ""
    for place in (folder, folder.parent):  # of a training's, which Orbax wrote
        if place.name == "checkpoints":
            hint = f"; give the training's workdir, {place.parent}"
    raise UserError(f"{folder} holds no .safetensors, .bin or .pth file{hint}")


def check_complete(tensors, shards: dict[str, str], folder: pathlib.Path) -> None:
    """UserError if a tensor is not where the index says, by the names that were read."""
    missing = sorted(shards.keys() - tensors.keys())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(
            f"{folder / shards[missing[0]]} lacks {missing[0]}{more}, which the folder's index says is there; "
            "is it whole?"
        )


def _visible(folder: pathlib.Path, endings: tuple[str, ...]) -> list[pathlib.Path]:
    return sorted(
        p for p in folder.iterdir() if p.name.endswith(endings) and not p.name.startswith(".") and p.is_file()
    )


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text())["weight_map"]
        if not found or any(pathlib.PurePath(name).name != name for name in found.values()):
            raise ValueError("no files in this folder by tensor")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of weight files ({str(error).splitlines()[0]}); is it whole?") from error
