"""`python -m ktda_jax.plan`: collectives of a compiled program, the search for settings, and real compilations."""

import importlib.util
import json
import subprocess
import sys

import pytest
import runs
from test_slices import REPORT

from ktda_jax import UserError
from ktda_jax.plan import compile, slices

ALL = {"config": "grass", "crop": (64, 64), "model_tflop": 19.7, **REPORT}


def test_collectives_are_added_up_by_kind():
    text = """
ENTRY %main (x: f32[9]) -> f32[9] {
  %all-reduce.1 = f32[1024,250]{1,0:T(8,128)} all-reduce(%x), channel_id=1, to_apply=%add
  %all-reduce.2 = (f32[1000]{0}, bf16[500]{0}) all-reduce(%a, %b), channel_id=2
  %s = (bf16[100]{0}, bf16[400]{0}) all-gather-start(%c), dimensions={0}
  %d = bf16[400]{0} all-gather-done(%s)
  %p = (pred[8]{0}, pred[8]{0}, u32[], u32[]) collective-permute-start(%e), source_target_pairs={{0,1}}
  %f = f32[9]{0} fusion(%all-reduce.1), kind=kLoop
}
"""
    found = compile.collective_bytes(text)
    assert found == pytest.approx(
        {"all-reduce": (1024 * 250 * 4 + 4000 + 1000) / 1e9, "all-gather": 800 / 1e9, "collective-permute": 8 / 1e9}
    )


def test_collectives_in_the_loop_count_as_often_as_it_runs_and_spread_ones_once():
    text = """
%body.1 (p: (s32[], f32[250])) -> (s32[], f32[250]) {
  %r = f32[250]{0} all-reduce(%g), channel_id=1, to_apply=%add
  %i = f32[250]{0} async-start(%r), calls=%wrapped
}

%wrapped (p: f32[250]) -> f32[250] {
  ROOT %s = f32[125]{0} reduce-scatter(%p), channel_id=2, dimensions={0}
}

%fused.1 (p: f32[25]) -> f32[100] {
  ROOT %g.1 = f32[100]{0:S(1)} all-gather(%p), channel_id=3, dimensions={0}
}

%fused.2 (p: f32[25]) -> f32[100] {
  ROOT %g.2 = f32[100]{0} all-gather(%p), channel_id=3, dimensions={0}
}

%all-reduce-scatter.1 (p: f32[50]) -> f32[25] {
  %a = f32[50]{0} all-reduce(%p), channel_id=5, to_apply=%add
}

ENTRY %main (x: f32[250]) -> f32[250] {
  %w = (s32[], f32[250]) while(%t), condition=%c, body=%body.1
  %r.2 = f32[250]{0} all-reduce(%h), channel_id=4, to_apply=%add
  %r.3 = f32[8]{0} all-reduce(%k), channel_id=4, to_apply=%add
  %r.4 = f32[25]{0} fusion(%k), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    found = compile.collective_bytes(text, trips=4, group=2)
    assert found == pytest.approx(
        {"all-reduce": (5 * 1000 + 32) / 1e9, "reduce-scatter": (4 * 2 * 500 + 200) / 1e9, "all-gather": 400 / 1e9}
    )


def test_the_text_says_what_fits_and_how_it_scales():
    text = compile.text_of(ALL)
    assert "v5e:2x2, 4 chips, global batch 8: fits: 10.00 of 16.91 GB a chip" in text
    rows = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:2] in ("v5", "v6", "v4")}
    assert rows["v5e:16x16"][:3] == ["256", "512", "yes"]
    assert rows["v5e:2x2"][-1] == "100.0%" and 0 < float(rows["v5e:16x16"][-2][:-1]) < 100
    assert text.splitlines()[-1].endswith("at these settings: v5e:2x2, v6e:1x1, v5p:2x2x1, v4:2x2x1")
    assert "does not fit: 20.00 of 16.91 GB" in compile.text_of({**ALL, "temporary_gb": 16.0})


def test_search_stops_at_the_first_settings_that_fit(tmp_path, monkeypatch, capsys):
    seen = []

    def compile_for(config, topology):
        seen.append((config.grad_accum, config.model.fmm.remat))
        if not config.model.fmm.remat:
            raise compile.TooLarge("does not fit: needs 20 G")
        return ALL

    monkeypatch.setattr(compile, "compile_for", compile_for)
    monkeypatch.setattr(compile, "_devices", lambda topology: None)
    config = runs.config(tmp_path, {"batch_size": 8}).copy_and_resolve_references()
    assert compile.search(config, "v5e:2x2") == ALL
    assert seen == [(1, False), (2, False), (1, True)]
    assert capsys.readouterr().out.splitlines()[:3] == [
        "as configured: does not fit: needs 20 G",
        "--config.grad_accum=2: does not fit: needs 20 G",
        "--config.model.student.remat=True --config.model.fmm.remat=True: fits",
    ]

    def never(config, topology):
        raise compile.TooLarge("does not fit: needs 30 G")

    monkeypatch.setattr(compile, "compile_for", never)
    with pytest.raises(compile.TooLarge, match="needs 30 G"):
        compile.search(config, "v5e:2x2")
    monkeypatch.setattr(compile, "compile_for", lambda config, topology: {**ALL, "temporary_gb": 16.0})
    with pytest.raises(
        compile.TooLarge, match=r"does not fit: 20.00 GB, and a chip offers 16.91"
    ):  # compiled all the same
        compile.search(config, "v5e:2x2")


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2x2x2", "v5p:4x4"])
def test_what_cannot_be_planned_is_one_line(tmp_path, topology):
    with pytest.raises(UserError, match=f"--topology is '{topology}'; give one such as v5e:4x4, v6e:4x4, v5p:2x4x4"):
        compile.compile_for(runs.config(tmp_path).copy_and_resolve_references(), topology)


with_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[tpu]'"
)
SMALL = {**runs.TINY, "model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0, "eval_batch_size": 8}


def run_plan(settings, *more):
    flags = [f"--config={runs.REPOSITORY / 'configs' / 'grass.py'}:tiny", "--topology=v5e:2x2", *more]
    flags += [f"--config.{k}={v}" for k, v in {**SMALL, **settings}.items()]
    return runs.start(*flags, verb="plan")


@with_libtpu
def test_every_slice_that_we_name_can_be_compiled_for():
    named = {f"{kind}:{shape}": slices.chips_of(shape) for kind, shapes in slices.SLICES.items() for shape in shapes}
    code = """import os, sys
from ktda_jax import sharding
from ktda_jax.plan import compile
for topology in sys.argv[1:]:
    os.environ.pop("TPU_ACCELERATOR_TYPE", None)
    print(topology, sharding.make_mesh(devices=compile._devices(topology)).size)"""
    done = subprocess.run([sys.executable, "-c", code, *named], capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{name} {chips}" for name, chips in named.items()], done.stderr


@with_libtpu
def test_a_real_compilation(tmp_path):
    """Also that XLA's bytes and collectives are there to read, in the form that we expect."""
    out, _ = runs.finish(run_plan({"batch_size": 8}, f"--output={tmp_path / 'new' / 'compile.json'}"))
    assert "v5e:2x2, 4 chips, global batch 8: fits" in out and "smallest slices for a global batch of 8" in out
    report = json.loads((tmp_path / "new" / "compile.json").read_text())
    trained = report["parameters"] * 2 / 1e9  # gradients are summed over the chips once, in bfloat16
    assert trained <= report["collective_gb"]["all-reduce"] < 1.1 * trained
    assert report["model_tflop"] == pytest.approx(report["tflop"], rel=0.1)  # little is computed again by default
    assert report["command"].startswith("python -m ktda_jax.plan --config=") and report["versions"]["libtpu"]


@pytest.mark.slow
@with_libtpu
def test_split_parameters_are_gathered_and_accumulation_changes_neither(tmp_path):
    """And that the compiler's word for what it cannot hold is understood."""
    split = {"mesh.data": 1, "mesh.fsdp": 4, "model.head_channels": 64, "batch_size": 16}
    runs.finish(run_plan(split, f"--output={tmp_path / 'split.json'}"))
    runs.finish(run_plan(split | {"grad_accum": 2}, f"--output={tmp_path / 'twice.json'}"))
    once, twice = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("split", "twice"))
    large = once["parameters"] * 2 / 1e9
    # Most of the parameters lie in large arrays, which are gathered once, or for the backward pass again.
    assert 0.5 * large < once["collective_gb"]["all-gather"] < 2.5 * large
    assert once["collective_gb"]["reduce-scatter"] > 0 and once["state_gb"] < 1.3 * twice["state_gb"]
    assert twice["temporary_gb"] < once["temporary_gb"]
    assert twice["tflop"] == pytest.approx(once["tflop"], rel=0.01)
    assert once["touched_gb"] < twice["touched_gb"] < 1.5 * once["touched_gb"]
    huge = {"batch_size": 4096, "data.crop": (512, 512), "eval_batch_size": 4096}
    process = run_plan(huge)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and err.startswith("v5e:2x2, global batch 4096: does not fit: Ran out of memory"), (
        out + err
    )
    assert err.rstrip().endswith("--search tries settings that need less") and len(err.splitlines()) == 1
