"""The roofline of a compiled step on TPU slices, what fits where, and which settings to try."""

import dataclasses

import pytest
import runs

from ktda_jax import slices

REPORT = {
    "topology": "v5e:2x2", "chips": 4, "batch_size": 8, "grad_accum": 1, "state_gb": 3.0, "new_outputs_gb": 0.5,
    "temporary_gb": 6.0, "program_gb": 0.5, "tflop": 19.7, "touched_gb": 8.19,
    "collective_gb": {"all-reduce": 1.0, "all-gather": 0.5},
}  # fmt: skip


def test_the_roofline_takes_the_slower_of_compute_and_memory_and_adds_the_links():
    chip = slices.CHIPS["v5e"]
    found = slices.seconds(REPORT, chip, 4)
    assert found["compute"] == pytest.approx(0.1) and found["memory"] == pytest.approx(0.01)
    assert found["links"] == pytest.approx((2 * 1.0 + 0.5) * 0.75 / 200)
    assert found["step"] == pytest.approx(0.1 + found["links"])
    slow = slices.seconds(REPORT, dataclasses.replace(chip, memory_bandwidth=8.19), 4)
    assert slow["step"] == pytest.approx(1 + found["links"])
    assert slices.seconds(REPORT, chip, 1)["links"] == 0


def test_weak_scaling_keeps_the_batch_a_chip():
    rows = {row["slice"]: row for row in slices.scaling(REPORT)}
    large = rows["v5e:16x16"]
    assert large["chips"] == 256 and large["batch"] == 512 and large["fits"]
    assert rows["v5e:2x2"]["efficiency"] == 1 > large["efficiency"]
    assert large["images_per_s"] / rows["v5e:2x2"]["images_per_s"] == pytest.approx(64 * large["efficiency"])


def test_the_smallest_slices_hold_the_same_global_batch():
    """Two images a chip need 10 GB; four at most 16, which a v5e would have room for, and twelve more than that."""
    assert slices.held_gb(REPORT) == slices.held_gb(REPORT, 1) == 10.0 and slices.held_gb(REPORT, 4) == 16.0
    assert slices.smallest(REPORT) == ["v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"]
    heavy = {**REPORT, "batch_size": 16, "chips": 16, "temporary_gb": 6.0}  # one image a chip
    assert slices.smallest(heavy) == ["v5e:4x4", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1"]
    assert slices.smallest({**heavy, "grad_accum": 8}) == []  # no slice is left with whole images in every micro-batch


def test_settings_are_tried_by_what_they_cost(tmp_path):
    tries = slices.next_settings(runs.config(tmp_path, {"batch_size": 24}), 4)
    remat, fsdp = {"model.student.remat": True, "model.fmm.remat": True}, {"mesh.data": 1, "mesh.fsdp": 4}
    assert tries == [
        {"grad_accum": 2}, {"grad_accum": 6}, remat, remat | {"grad_accum": 6}, fsdp,
        fsdp | remat | {"grad_accum": 6},
    ]  # fmt: skip
    assert slices.next_settings(runs.config(tmp_path), 4)[:1] == [remat]  # one image a chip: nothing to accumulate
