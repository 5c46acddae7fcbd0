"""The roofline of a compiled step on TPU slices, what fits where, and which settings to try."""

import dataclasses

import pytest
import runs

from ktda_jax.plan import slices

REPORT = {
    "topology": "v5e:2x2", "chips": 4, "mesh": {"data": 4, "fsdp": 1}, "batch_size": 8, "grad_accum": 1,
    "state_gb": 3.0, "new_outputs_gb": 0.5, "temporary_gb": 6.0, "program_gb": 0.5, "tflop": 19.7, "touched_gb": 8.19,
    "kernel_gb": 1.5, "moved_gb": [["product", "fmm.FMM.__call__", 2.0]],
    "gradient_gb": 0.8, "collective_gb": {"all-reduce": 1.0, "all-gather": 0.5},
}  # fmt: skip


def test_the_roofline_takes_the_slower_of_compute_and_memory_and_adds_the_links():
    chip = slices.CHIPS["v5e"]
    found = slices.seconds(REPORT, chip, "2x2")
    assert found["compute"] == pytest.approx(0.1) and found["memory"] == pytest.approx(0.01)
    assert found["links"] == pytest.approx((2 * 1.0 + 0.5) * 0.75 / 100)
    assert found["step"] == pytest.approx(0.1 + found["links"])
    slow = slices.seconds(REPORT, dataclasses.replace(chip, memory_bandwidth=8.19), "2x2")
    assert slow["step"] == pytest.approx(1 + found["links"])
    assert slices.seconds(REPORT, chip, "1x1")["links"] == 0


@pytest.mark.parametrize(
    "kind, shape, share",
    [
        ("v5e", "2x2", 1 / 2),  # one neighbour along each axis
        ("v5e", "8x8", 1 / 2),  # a corner has two links of four, since only sides of 16 close
        ("v5e", "8x16", 3 / 4),
        ("v5e", "16x16", 1),
        ("v5p", "2x2x1", 1 / 3),
        ("v5p", "2x2x4", 1 / 2),  # axes close in cubes of four chips alone
        ("v5p", "4x4x8", 1),
    ],
)
def test_a_corner_of_the_slice_bounds_the_links(kind, shape, share):
    chip = slices.CHIPS[kind]
    assert slices.bandwidth(chip, shape) == pytest.approx(share * chip.link_bandwidth)


def test_weak_scaling_keeps_the_batch_a_chip():
    rows = {row["slice"]: row for row in slices.scaling(REPORT)}
    small, large = rows["v5e:2x2"], rows["v5e:16x16"]
    assert large["chips"] == 256 and large["batch"] == 512 and large["fits"]
    assert large["efficiency"] == pytest.approx(0.1 / large["step_s"]) and small["weak"] == 1
    assert large["images_per_s"] / small["images_per_s"] == pytest.approx(64 * large["weak"])


def test_copies_of_a_split_model_sum_their_gradients():
    split = {**REPORT, "mesh": {"data": 1, "fsdp": 4}, "collective_gb": {"all-gather": 1.0}}
    chip = slices.CHIPS["v5e"]
    assert slices.seconds(split, chip, "2x2")["links"] == pytest.approx(1.0 * 3 / 4 / 100)
    assert slices.seconds(split, chip, "4x4")["links"] == pytest.approx((1.0 + 2 * 0.8) * 15 / 16 / 100)
    wide = {**split, "mesh": {"data": 1, "fsdp": 16}, "chips": 16, "batch_size": 32}
    assert "v5e:2x2" not in {row["slice"] for row in slices.scaling(wide)}  # a chip would hold four times as much
    assert slices.smallest(wide) == ["v5e:4x4", "v6e:4x4", "v5p:2x2x4", "v4:2x2x4"]


def test_the_smallest_slices_hold_the_same_global_batch():
    """Two images a chip need 10 GB; four at most 16; all eight on one chip at most 28."""
    assert slices.held_gb(REPORT) == slices.held_gb(REPORT, 1) == 10.0 and slices.held_gb(REPORT, 4) == 16.0
    assert slices.smallest(REPORT) == ["v5e:2x2", "v6e:1x1", "v5p:2x2x1", "v4:2x2x1"]
    heavy = {**REPORT, "batch_size": 16, "chips": 16, "temporary_gb": 6.0}  # one image a chip
    assert slices.smallest(heavy) == ["v5e:2x4", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"]
    assert slices.smallest({**heavy, "grad_accum": 16, "temporary_gb": 60.0}) == []  # whole images in micro-batches


def test_settings_are_tried_by_what_they_cost(tmp_path):
    tries = slices.next_settings(runs.config(tmp_path, {"batch_size": 24, "mesh.data": -1}), 4)
    remat, fsdp = {"model.student.remat": True, "model.fmm.remat": True}, {"mesh.data": 1, "mesh.fsdp": 4}
    assert tries == [
        {"grad_accum": 2}, {"grad_accum": 6}, remat, remat | {"grad_accum": 6}, fsdp,
        fsdp | remat | {"grad_accum": 6},
    ]  # fmt: skip
    # One image a chip leaves nothing to accumulate, and what is set already is not tried again.
    config = runs.config(tmp_path, {"model.student.remat": True, "model.fmm.remat": True})
    assert slices.next_settings(config, 4) == [{"mesh.fsdp": 4}]
