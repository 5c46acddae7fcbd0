"""How much of the teacher's variance the student explains: the score of a distillation, on images it has not seen.

Of a tap it is 1 - sum (s - t)^2 / sum (t - mean)^2 over all tokens and channels, `mean` being that of each channel over
the tokens scored: 0 for a student that knows the mean alone, 1 for the teacher itself. Trained by the cosine, a student
has no scale, and gets the one that fits best.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ktda_jax import sharding
from ktda_jax.data import buckets
from ktda_jax.models.flat import Arrays, merge
from ktda_jax.models.layers import at_least_float32


def of_batch(student: Sequence[jax.Array], taps: Sequence[jax.Array | None], distance: str = "mse") -> jax.Array:
    """Of one batch, (B, h, w, C) per level, in the mean over the levels with a tap: scalar."""
    shares = []
    for s, t in zip(student, taps, strict=True):
        if t is not None:
            s, t = at_least_float32(s), at_least_float32(t)
            if distance == "cosine":
                s = s * ((s * t).sum() / jnp.maximum((s * s).sum(), 1e-12))
            total = jnp.square(t - t.mean((0, 1, 2))).sum()
            shares.append(1 - jnp.square(s - t).sum() / jnp.maximum(total, 1e-12))
    return sum(shares) / len(shares)


@dataclasses.dataclass(frozen=True)
class Explained:
    """By level with a tap: its layer, counted from 1, and the share of that layer's variance."""

    layers: tuple[int, ...]
    shares: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.shares))

    @property
    def summary(self) -> dict[str, float]:
        """The mean first, then {'explained_level2_layer6': ...}."""
        return {"explained": self.mean, **dict(zip(self.names, self.shares, strict=True))}

    @property
    def names(self) -> list[str]:
        return [f"explained_level{level}_layer{layer}" for level, layer in enumerate(self.layers, 1) if layer]


def make_eval_step(
    graphdef: nnx.GraphDef, teacher_graphdef: nnx.GraphDef, mesh: Mesh, compiler_options: dict | None = None
) -> Callable:
    """(params, batch_stats, batch, teacher) -> sums over the batch's tokens and channels, by level with a tap."""

    def eval_step(params: Arrays, stats: Arrays, batch: dict, teacher: Arrays) -> list[dict[str, jax.Array]]:
        outputs = merge(graphdef, params, stats)(batch["image"], teacher=merge(teacher_graphdef, teacher, {}))
        found = []
        for s, t in zip(outputs.student, outputs.taps, strict=True):
            if t is None:
                continue
            mask = batch["mask"][:, None, None, None]
            s, t = (jnp.where(mask, at_least_float32(x), 0) for x in (s, t))
            tokens = batch["mask"].sum() * t.shape[1] * t.shape[2]
            products = {"st": (s * t).sum(), "ss": (s * s).sum(), "tt": (t * t).sum()}
            found.append({"tokens": tokens, "t": t.sum((0, 1, 2)), **products})
        return found

    return jax.jit(
        sharding.on_mesh(mesh, eval_step), out_shardings=sharding.replicated(mesh), compiler_options=compiler_options
    )


def evaluate(
    eval_step: Callable,
    params: Arrays,
    stats: Arrays,
    batches: Iterable[dict],
    mesh: Mesh,
    teacher: Arrays,
    *,
    tapped: Sequence[int | None],
    distance: str,
) -> Explained:
    """Runs over this process's share of `batches`; the sums are those of all processes. `tapped`: layers from 0."""
    total, pending = None, None
    for batch in itertools.chain(batches, (None,)):
        found = None
        if batch is not None:
            rows = sharding.to_global(mesh, {k: batch[k] for k in ("image", "mask")})
            found = eval_step(params, stats, rows, teacher)
        if pending is not None:  # fetched one batch late, so that the device works while the host decodes
            sums = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.device_get(pending))
            total = sums if total is None else jax.tree.map(np.add, total, sums)
        pending = found
    layers = tuple(0 if index is None else index + 1 for index in tapped)
    return Explained(layers, tuple(_share(sums, distance) for sums in total))


def _share(sums: dict[str, np.ndarray], distance: str) -> float:
    variance = sums["tt"] - np.square(sums["t"]).sum() / sums["tokens"]
    if distance == "cosine":
        error = sums["tt"] - sums["st"] ** 2 / max(sums["ss"], 1e-12)
    else:
        error = sums["ss"] - 2 * sums["st"] + sums["tt"]
    return float(1 - error / max(variance, 1e-12))


def table(result: Explained) -> str:
    """The share of each layer's variance, as text."""
    lines = [f"{'teacher layer':>14}{'level':>7}{'explained':>11}"]
    shares = iter(result.shares)
    for level, layer in enumerate(result.layers, 1):
        if layer:
            lines.append(f"{layer:14}{level:7}{next(shares):11.3f}")
    return "\n".join([*lines, f"{'mean':>14}{'':7}{result.mean:11.3f}"])


def write_report(result: Explained, workdir: pathlib.Path, images: int) -> None:
    """Writes `figures/held_out.json`."""
    folder = workdir / "figures"
    folder.mkdir(exist_ok=True)
    with buckets.aside(folder / "held_out.json") as temporary:
        temporary.write_text(json.dumps({"images": images, **result.summary}, indent=1) + "\n")
