"""`python -m ktda_jax.plan`: collectives of a compiled program, the roofline, and a real compilation."""

import dataclasses
import importlib.util

import pytest
import runs

from ktda_jax import plan
from ktda_jax.config import ConfigError

REPORT = {
    "topology": "v5e:2x2", "chips": 4, "batch_size": 8, "state_gb": 3.0, "new_outputs_gb": 0.5, "temporary_gb": 6.0,
    "program_gb": 0.5, "tflop": 19.7, "touched_gb": 8.19, "collective_gb": {"all-reduce": 1.0, "all-gather": 0.5},
}  # fmt: skip


def test_collectives_are_added_up_by_kind():
    text = """
  %all-reduce.1 = f32[1024,250]{1,0:T(8,128)} all-reduce(%x), channel_id=1
  %all-reduce.2 = (f32[1000]{0}, bf16[500]{0}) all-reduce(%a, %b), channel_id=2
  %s = (bf16[100]{0}, bf16[400]{0}) all-gather-start(%c), dimensions={0}
  %d = bf16[400]{0} all-gather-done(%s)
  %p = pred[8]{0} collective-permute(%e), source_target_pairs={{0,1}}
  %f = f32[9]{0} fusion(%all-reduce.1), kind=kLoop
"""
    found = plan.collective_bytes(text)
    assert found == pytest.approx(
        {"all-reduce": (1024 * 250 * 4 + 4000 + 1000) / 1e9, "all-gather": 800 / 1e9, "collective-permute": 8 / 1e9}
    )


def test_the_roofline_takes_the_slower_of_compute_and_memory_and_adds_the_links():
    chip = plan.CHIPS["v5e"]
    seconds = plan.step_seconds(REPORT, chip, 4)
    assert seconds["compute"] == pytest.approx(0.1) and seconds["memory"] == pytest.approx(0.01)
    assert seconds["links"] == pytest.approx((2 * 1.0 + 0.5) * 0.75 / 200)
    assert seconds["step"] == pytest.approx(0.1 + seconds["links"])
    slow = plan.step_seconds(REPORT, dataclasses.replace(chip, memory_bandwidth=8.19), 4)
    assert slow["step"] == pytest.approx(1 + seconds["links"])
    assert plan.step_seconds(REPORT, chip, 1)["links"] == 0


def test_the_text_says_what_fits_and_how_it_scales():
    text = plan.text_of(REPORT)
    assert "v5e:2x2, 4 chips, global batch 8: fits: 10.00 of 16 GB" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] in ("v5", "v6", "v4")}
    assert rows["v5e:16x16"][:3] == ["256", "512", "yes"]
    assert rows["v5e:2x2"][-1] == "100.0%" and float(rows["v5e:16x16"][-1][:-1]) < 100
    text = plan.text_of({**REPORT, "temporary_gb": 16.0})
    assert "does not fit: 20.00 GB on a chip of 16 GB; lower the batch" in text
    assert text.splitlines()[-1] == "smallest slices that fit at this batch a chip: v6e:2x2, v5p:2x2x1, v4:2x2x1"


def test_what_cannot_be_planned_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--topology is 'v9:2x2'; give KIND:SHAPE such as v5e:4x4, KIND of v5e, v5p"):
        plan.compile_for(runs.config(tmp_path).copy_and_resolve_references(), "v9:2x2")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'")
def test_a_real_compilation(tmp_path):
    """Also that XLA's bytes are there to read, in the form that we expect."""
    settings = {"model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0, "batch_size": 8, "eval_batch_size": 8}
    flags = [f"--config={runs.REPOSITORY / 'configs' / 'grass.py'}:tiny", "--topology=v5e:2x2"]
    flags += [f"--config.{k}={v}" for k, v in {**runs.TINY, **settings}.items()]
    out, _ = runs.finish(runs.start(*flags, verb="plan"))
    assert "v5e:2x2, 4 chips, global batch 8: fits" in out and "all-reduce" in out
