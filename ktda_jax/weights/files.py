"""Weight files of other projects: .safetensors (without torch), .pth, and Hugging Face ids."""

import hashlib
import json
import pathlib
import re
import warnings
from collections.abc import Mapping

import numpy as np

from ktda_jax import UserError
from ktda_jax.data import buckets, staging
from ktda_jax.data.paths import expand, place
from ktda_jax.models.flat import check_finite
from ktda_jax.weights import shards

HUB = "hf://"
OURS = "ktda_jax"  # in the `meta` of a .pth
_WRAPPERS = ("state_dict", "model", "module", "teacher", "model_ema")
# What mmengine and old numpy put beside the tensors; read as inert objects, so that nothing of a file is executed.
_INERT = ("mmengine.logging.history_buffer.HistoryBuffer", "mmengine.logging.message_hub.MessageHub")


def locate(path: str) -> tuple[pathlib.Path, dict]:
    """The local file or folder of `path`, and where it came from.

    `hf://ORG/NAME`, or one file of it as `hf://ORG/NAME/FILE`, with `@REVISION` at the end if wanted, is downloaded
    into Hugging Face's cache, which also serves offline; what is in a bucket into ours (staging.py).
    """
    if not str(path).startswith(HUB):
        if buckets.is_remote(path):
            return staging.staged(place(path)), {"path": str(path)}
        found = expand(path)
        if not found.exists():
            raise UserError(f"no file or folder {found}; give a weights file, a converted folder or hf://ORG/NAME")
        return found, {"path": str(found)}
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    name, _, revision = path.removeprefix(HUB).partition("@")
    name, file = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    options = dict(revision=revision or None)
    try:
        patterns = [file, "*.json"] if file else ["*.safetensors", "*.json"]
        folder = snapshot_download(name, allow_patterns=patterns, **options)
        if not file and not list(pathlib.Path(folder).glob("[!.]*.safetensors")):
            folder = snapshot_download(name, allow_patterns=["*.bin", "*.pth", "*.json"], **options)
    except LocalEntryNotFoundError as error:
        if refused := _refused(path, name, error.__cause__):
            raise UserError(refused) from error
        raise UserError(
            f"{path} is not in the Hugging Face cache and cannot be downloaded; check the network, or download it "
            f"elsewhere and give its folder ({_line(error)})"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(_refused(path, name, error) or f"cannot download {path}: {_line(error)}") from error
    found = pathlib.Path(folder) / file
    if not found.exists():
        raise UserError(f"{path}: no file {file} in {name}")
    return found, {"path": path, "revision": pathlib.Path(folder).name}  # snapshots are named by their commit


def _refused(path: str, name: str, error: BaseException | None) -> str | None:
    """What to do about a download that wants rights, by the answer's status; None for any other error."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status not in (401, 403):  # those of GatedRepoError, and of a name that is private or is none
        return None
    hint = "; DINOv2 (hf://facebook/dinov2-base) needs neither" if "dinov3" in name.lower() else ""
    return (
        f"{path} is refused ({status}): check its name, ask for access at https://huggingface.co/{name} with your "
        f"account, then log in with `hf auth login`{hint}"
    )


def read(path: pathlib.Path) -> tuple[dict[str, np.ndarray], dict, list[pathlib.Path]]:
    """Tensors by name (views of the file where possible), the settings that come with them, and the files read.

    The settings are those of Hugging Face, and under OURS the description that `sources.to_upstream` puts into a .pth.
    """
    if path.is_dir():
        (files, where), beside = shards.weight_files(path), _settings(path)
    else:
        files, where, beside = [path], {}, _settings(path.parent) if path.suffix == ".safetensors" else {}
    tensors = {}
    for file in files:
        if file.suffix == ".safetensors":
            found = _safetensors(file)
        else:
            found, meta = _pickled(file)
            beside |= {OURS: meta[OURS]} if OURS in meta else {}
        check_finite(found, str(file))
        tensors |= found
    shards.check_complete(tensors, where, path)
    return tensors, beside, files


def sha256(file: pathlib.Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _settings(folder: pathlib.Path) -> dict:
    """Hugging Face's config.json and preprocessor_config.json, where there are any."""
    found = {}
    for name in ("config.json", "preprocessor_config.json"):
        file = folder / name
        if file.is_file():
            try:
                content = json.loads(file.read_text())
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise UserError(f"{file} is not JSON ({_line(error)})") from error
            found |= content if isinstance(content, dict) else {}
    return found


def _safetensors(file: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():
                if opened.get_slice(name).get_dtype() in ("BF16", "F8_E4M3", "F8_E5M2"):
                    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy; jax brings it
                tensors[name] = as_float(opened.get_tensor(name))
    except (SafetensorError, OSError, TypeError) as error:
        raise UserError(f"cannot read {file}: {_line(error)}; is it whole?") from error
    return tensors


def import_torch(what: str):
    """torch, which only PyTorch's own files need."""
    try:
        import torch
    except ImportError as error:
        raise UserError(f"{what} needs torch: pip install 'ktda-jax[convert]'") from error
    return torch


def _pickled(file: pathlib.Path) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors by name, and the `meta` that mmengine, and we, put beside them."""
    torch = import_torch(f"reading {file}")
    import pickle

    inert = [(type(name.rpartition(".")[2], (), {"__module__": __name__}), name) for name in _INERT]
    inert.append((lambda *args: None, "builtins.getattr"))  # how a HistoryBuffer refers to its own methods
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals([*inert, *_numpy_globals()]):
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            content = _load(torch, file)
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is not a plain checkpoint, and is not run: {_line(error)}") from error
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"cannot read {file}: {_line(error)}; is it whole?") from error
    items = _unwrap(content).items()
    tensors = {k: v.detach() for k, v in items if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise UserError(f"{file} holds no tensors by name; give a checkpoint or a state dict")
    arrays = {
        name: as_float((t.float() if t.is_floating_point() and t.dtype != torch.float64 else t).numpy())
        for name, t in tensors.items()
    }
    meta = content.get("meta")
    return arrays, meta if isinstance(meta, Mapping) else {}


def _load(torch, file: pathlib.Path):
    options = dict(map_location="cpu", weights_only=True)
    try:
        return torch.load(file, mmap=True, **options)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(file, **options)  # written by torch before 1.6


def _numpy_globals() -> list:
    """What a checkpoint's training record is made of: arrays and scalars, no code."""
    functions = {"_reconstruct": np.zeros(1).__reduce__()[0], "scalar": np.float32(0).__reduce__()[0]}
    kinds = [np.dtype(kind) for kind in ("f4", "f8", "i4", "i8", "u1", "?")]
    return [
        np.ndarray, np.dtype, *(type(kind) for kind in kinds),
        *((function, f"numpy.{core}.multiarray.{name}") for core in ("core", "_core")
          for name, function in functions.items()),
    ]  # fmt: skip


def _unwrap(content) -> dict:
    """The state dict in a checkpoint, without the prefixes of wrappers around the model."""
    while isinstance(content, Mapping):
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    return dict(content) if isinstance(content, Mapping) else {}


def strip_prefixes(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Names without what wrappers put before all of them ('module.', 'dinov2.', 'backbone.' of a lone backbone)."""
    for prefix in ("module.", "_orig_mod.", "model.", "module."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): array for name, array in tensors.items()}
    return tensors


def as_float(array: np.ndarray) -> np.ndarray:
    """Half precision as float32, which holds it exactly; float32, float64 and integers as they are."""
    if array.dtype.itemsize == 2 and array.dtype.kind in "fV":
        return array.astype(np.float32)
    return array


def _line(error: BaseException) -> str:
    """The line of an error that says most, shortened and without terminal colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [type(error).__name__]
    text = next((line.strip() for line in lines if "Unsupported" in line), lines[0])
    return text if len(text) < 200 else text[:197] + "..."
