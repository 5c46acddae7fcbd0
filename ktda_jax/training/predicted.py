"""Tiles with what a model says of them: squeezed to the crop, as published, or at the scale at which `predict` maps."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from ktda_jax import sharding
from ktda_jax.config.data import Data
from ktda_jax.metrics.confusion import count
from ktda_jax.models.flat import Arrays, merge
from ktda_jax.models.ktda import full_size
from ktda_jax.tiling import device
from ktda_jax.tiling.windows import usual_overlap


def how(data: Data) -> str:
    """In which of the two ways tiles are scored."""
    size = " x ".join(map(str, data.crop))
    if data.eval_scale == "native":
        return f"at their own scale, in windows of {size} that overlap by {usual_overlap(data.crop)}"
    return f"squeezed to {size}"


class Predicted(NamedTuple):
    name: str
    index: int  # in the split
    image: np.ndarray  # uint8 (h, w, bands), as the model saw it
    label: np.ndarray  # uint8 (H, W)
    prediction: np.ndarray  # uint8 (H, W)
    confusion: np.ndarray  # int64 (C, C)
    probabilities: np.ndarray | None  # float32 (classes, H, W)


class Model(NamedTuple):
    """The structure of a model and, where it is needed, of its frozen encoder; their arrays are arguments."""

    graphdef: nnx.GraphDef
    encoder: nnx.GraphDef | None
    classes: int
    bands: int

    def probabilities(
        self, images: jax.Array, params: Arrays, stats: Arrays, frozen: Arrays | None = None
    ) -> jax.Array:  # fmt: skip
        """Of images (B, H, W, bands): (B, H, W, classes), float32 or wider."""
        needed = {} if self.encoder is None else {"teacher": merge(self.encoder, frozen, {})}
        logits = merge(self.graphdef, params, stats)(images, **needed).logits
        return jax.nn.softmax(full_size(logits, images.shape[1:3]), -1)


@dataclasses.dataclass(frozen=True)
class Predictor:
    """Runs one model over tiles, again and again with other arrays; compiled once for each of the two ways."""

    model: Model
    mesh: Mesh
    crop: tuple[int, int]
    batch_size: int  # over all devices
    eval_step: Callable  # evaluate.make_eval_step's, for squeezed tiles
    compiler_options: dict | None = None

    def __call__(
        self,
        tiles: Iterable[dict],
        params: Arrays,
        stats: Arrays,
        frozen: Arrays | None = None,
        *,
        probabilities=False,
    ) -> Iterator[Predicted]:
        """This process's tiles. tiles: data.pipeline's `EvalBatches`, of squeezed ones, or `EvalTiles`, as they are."""
        way = self._mapped if getattr(tiles, "native", False) else self._squeezed
        return way(tiles, (params, stats) if frozen is None else (params, stats, frozen), probabilities)

    def _squeezed(self, batches, arrays, probabilities: bool) -> Iterator[Predicted]:
        params, stats, *frozen = arrays

        def of(batch, confusions, predictions, values) -> Iterator[Predicted]:
            confusions, predictions = sharding.local_rows(confusions), sharding.local_rows(predictions)
            values = sharding.local_rows(values) if probabilities else None
            for row in np.flatnonzero(batch["mask"]):
                yield Predicted(
                    batch["name"][row], int(batch["index"][row]), batch["image"][row], batch["label"][row],
                    predictions[row], confusions[row].astype(np.int64), None if values is None else values[row],
                )  # fmt: skip

        pending = None
        for batch in batches:
            rows = sharding.to_global(self.mesh, {k: batch[k] for k in ("image", "label", "mask")})
            found = self.eval_step(params, stats, rows, *frozen, probabilities=probabilities)
            if pending is not None:  # one batch late, so that the device works while the host counts
                yield from of(*pending)
            pending = batch, *found
        if pending is not None:
            yield from of(*pending)

    @functools.cached_property
    def _windows(self) -> device.Step:
        devices = [d for d in self.mesh.devices.flat if d.process_index == jax.process_index()]
        model = device.Model(
            lambda arrays, images: self.model.probabilities(images, *arrays), (), self.model.bands, self.model.classes
        )
        rows = self.batch_size * len(devices) // self.mesh.size
        return device.Step(model, self.crop, rows, devices=devices, compiler_options=self.compiler_options)

    def _mapped(self, tiles, arrays, probabilities: bool) -> Iterator[Predicted]:
        """Each process maps whole tiles of its own, on its own devices, by the code that `predict` runs."""
        from ktda_jax.tiling import pipeline  # only here: benchmarks run where OpenCV is not installed

        step, labels, values = self._windows, [], []
        step.arrays = sharding.on_each(arrays, self.mesh, step.mesh)
        strips = pipeline.finished(
            map(pipeline.Held, tiles), step, classes=self.model.classes, overlap=usual_overlap(self.crop),
            probabilities=probabilities and "float32",
        )  # fmt: skip
        try:
            for strip in strips:
                labels.append(strip.labels)
                values.append(strip.probabilities)
                if strip.row.last:
                    tile, prediction = strip.row.scene.tile, np.concatenate(labels)
                    yield Predicted(
                        tile["name"], tile["index"], tile["image"], tile["label"], prediction,
                        count(tile["label"], prediction, self.model.classes),
                        np.concatenate(values, 1) if probabilities else None,
                    )  # fmt: skip
                    labels, values = [], []
        finally:
            strips.close()
            step.arrays = ()  # the memory is the training's
