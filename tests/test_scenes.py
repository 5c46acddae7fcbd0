"""Windows, blending and the pipeline, with models that stand in for KTDA."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scene_files as sf

from ktda_jax import UserError
from ktda_jax.data import raster
from ktda_jax.data.images import Reading
from ktda_jax.data.raster import open_scene
from ktda_jax.tiling import blend, pipeline
from ktda_jax.tiling.device import FLIPS, SCALES, Step, augmented
from ktda_jax.tiling.windows import axis


@pytest.mark.parametrize(
    "length, tile, overlap", [(1000, 64, 16), (70, 64, 32), (64, 64, 0), (5, 64, 8), (300, 64, 63)]
)
def test_weights_sum_to_one_and_lie_within_their_tiles(length, tile, overlap):
    tiles = axis(length, tile, overlap)
    assert tiles.starts[0] == 0 and tiles.starts[-1] == max(length - tile, 0)
    assert all(0 < b - a <= tile - overlap for a, b in zip(tiles.starts, tiles.starts[1:], strict=False))
    total = np.zeros(max(length, tile))
    for start, weights in zip(tiles.starts, blend.weights(tiles), strict=True):
        assert weights.min() >= -1e-7
        total[start : start + tile] += weights
    np.testing.assert_allclose(total, 1, atol=1e-6)
    assert [tiles.done(k) for k in range(len(tiles.starts))] == [*tiles.starts[1:], length]


def test_the_outer_eighth_of_an_overlap_counts_nothing():
    first, middle, last = blend.weights(axis(160, 64, 16))
    assert (middle[:2] == 0).all() and (middle[-2:] == 0).all() and (middle[14:-14] == 1).all()
    assert (first[:48] == 1).all() and (last[16:] == 1).all()


@pytest.mark.parametrize("size", [(333, 257), (64, 64), (65, 500), (40, 50)])
def test_tiled_is_whole(tmp_path, size):
    """A model that sees 5 x 5 pixels: probabilities agree to 1e-5 with those of the whole scene at once."""
    values = sf.smooth(*size)
    scene = open_scene(sf.write(tmp_path / "scene.tif", values), Reading(), 3)
    step, rows, used = Step(sf.model(sf.local), (64, 64), 8), [], blend.labels
    sums = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blend, "labels", lambda found, present: sums.append(found.copy()) or used(found, present))
        for strip in pipeline.finished([scene], step, classes=3, overlap=16):
            rows.append(strip.labels)
    whole = np.asarray(jax.jit(sf.local)((), values[None]))[0]
    if min(size) >= 64:  # a smaller one is continued by reflection, and the model sees that
        np.testing.assert_allclose(np.concatenate(sums, 1), np.moveaxis(whole, -1, 0), atol=1e-5)
    agree = np.concatenate(rows) == whole.argmax(-1)
    assert agree.shape == size and agree[: size[0] - 2, : size[1] - 2].all()


def test_tiles_leave_no_seams(tmp_path):
    """A model that leans to its left in every tile and says nonsense along its edges: the map has no step anywhere."""

    def leaning(arrays, images):
        width = images.shape[2]
        lean = jnp.linspace(0.4, 0.6, width)[None, None].repeat(images.shape[1], 1)
        edge = jnp.pad(jnp.zeros((images.shape[1] - 6, width - 6)), 3, constant_values=1)
        lean = jnp.where(edge > 0, 1.0, lean)
        return jnp.stack([lean, 1 - lean], -1).repeat(len(images), 0)

    scene = open_scene(sf.write(tmp_path / "scene.tif", sf.smooth(200, 300)), Reading(), 3)
    step, steps = Step(sf.model(leaning, classes=2), (64, 64), 8), {}
    for overlap in (0, 16):
        strips = list(pipeline.finished([scene], step, classes=2, overlap=overlap, probabilities=True))
        found = np.concatenate([strip.probabilities for strip in strips], 1)[0, 3:-3, 3:-3] / blend.CERTAIN
        steps[overlap] = max(np.abs(np.diff(found, axis=axis)).max() for axis in (0, 1))
    assert steps[0] > 0.35 and steps[16] < 0.04  # 0.15 over the 12 pixels of a smooth ramp, and a little of the edges


def test_test_time_augmentation_is_the_mean_of_its_views():
    """Of an even image nothing changes; what leans to one side is evened out by the mirror images."""
    image = sf.smooth(64, 96)[None]
    np.testing.assert_allclose(augmented(sf.brightest)((), np.full((1, 64, 96, 3), 90, np.uint8)), 1 / 3, atol=1e-6)

    def corner(arrays, x):
        ramp = np.arange(x.shape[2], dtype=np.float32) / x.shape[2]
        return np.asarray(x, np.float32) * 0 + ramp[:, None]

    found = augmented(corner)((), image)
    np.testing.assert_allclose(found[0, :, ::-1] + found[0], 2 * np.mean(found), atol=0.05)
    seen = []
    augmented(lambda arrays, x: seen.append(x.shape) or x)((), image.astype(np.float32))
    assert seen == [(1, 64, 96, 3)] * len(FLIPS) + [(1, 32 * round(2 * s), 32 * round(3 * s), 3) for s in SCALES]


def test_nothing_is_computed_where_there_are_no_data(tmp_path):
    """Nor read twice: a scene of which only one corner has data."""
    values = np.zeros((300, 1000, 3), np.uint8)
    values[200:, 900:] = sf.smooth(100, 100) | 1
    scene = open_scene(sf.write(tmp_path / "scene.tif", values, nodata=0), Reading(), 3)
    tiles, seen = 0, []

    class Counting(Step):
        def __call__(self, images, rows, columns):
            nonlocal tiles
            tiles += sum(rows.any(1))
            return super().__call__(images, rows, columns)

    with pytest.MonkeyPatch.context() as patch:
        original = raster.RowReader._window
        patch.setattr(raster.RowReader, "_window", lambda self, *given: seen.append(given) or original(self, *given))
        strips = list(pipeline.finished([scene], Counting(sf.model(), (64, 64), 8), classes=3, overlap=16))
    labels = np.concatenate([strip.labels for strip in strips])
    np.testing.assert_array_equal(labels == 255, (values == 0).all(-1))
    np.testing.assert_array_equal(labels[200:, 900:], values[200:, 900:].argmax(-1))
    assert tiles == 9, "of 6 x 21"
    assert sum((end - first) * (area.stop - area.start) for first, end, area in seen) == 300 * 1000


def test_waiting_rows_are_bounded_by_their_bytes(tmp_path, monkeypatch):
    """A diagonal of data, of which a large batch would hold every row."""
    values = np.zeros((500, 500, 3), np.uint8)
    for k in range(0, 500, 50):
        values[k : k + 20, k : k + 20] = 9
    scene = open_scene(sf.write(tmp_path / "scene.tif", values, nodata=0), Reading(), 3)
    step = Step(sf.model(), (64, 64), 64)

    def rows():
        batches = pipeline._read([scene], step, 16, ())
        return [sum(isinstance(item, pipeline.Row) for item in batch.order) for batch in batches]

    assert rows() == [11]
    monkeypatch.setattr(pipeline, "BYTES_HELD", 60_000)
    assert max(rows()) == 3 and sum(rows()) == 11


def test_scenes_share_batches(tmp_path):
    """Five scenes of one tile each are one batch of eight."""
    paths = [sf.write(tmp_path / f"{k}.tif", sf.smooth(64, 64, seed=k)) for k in range(5)]
    calls = []

    class Counting(Step):
        def __call__(self, *given):
            calls.append(given)
            return super().__call__(*given)

    scenes = [open_scene(path, Reading(), 3) for path in paths]
    strips = list(pipeline.finished(scenes, Counting(sf.model(), (64, 64), 8), classes=3, overlap=16))
    assert len(calls) == 1 and [strip.row.scene.path for strip in strips] == paths
    for k, strip in enumerate(strips):
        np.testing.assert_array_equal(strip.labels, sf.smooth(64, 64, seed=k).argmax(-1))


def test_an_error_in_a_thread_comes_out_and_closing_stops_the_threads():
    def broken():
        yield 1
        raise UserError("no")

    items = pipeline.ahead(pipeline.ahead(broken(), 1), 1)
    assert next(items) == 1
    with pytest.raises(UserError, match="no"):
        next(items)
    closed = []

    def endless():
        try:
            while True:
                yield 1
        finally:
            closed.append(True)

    items = pipeline.ahead(pipeline.ahead(endless(), 1), 1)
    next(items)
    items.close()
    assert closed
