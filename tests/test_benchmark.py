"""`python -m ktda_jax.benchmark` on a tiny model: what it reports is there, and agrees with itself."""

import json

import pytest
import runs

from ktda_jax import benchmark


def test_the_command(tmp_path):
    """Where neither grain nor TFDS is installed, as on the machine with the GPU."""
    for name in ("grain", "tensorflow_datasets"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('not here')")
    settings = {**runs.TINY, "data.root": "nowhere", "model.student.depths": (0, 0, 0, 0), "model.aux_channels": 0}
    flags = [f"--config={runs.REPOSITORY / 'configs' / 'grass.py'}:tiny"]
    flags += [f"--config.{key}={value}" for key, value in settings.items()]
    flags += ["--steps=2", "--forwards=2", "--peak_tflops=0.1", f"--output={tmp_path / 'out' / 'report.json'}"]
    out, err = runs.finish(runs.start(*flags, verb="benchmark", PYTHONPATH=str(tmp_path)))
    assert "step images per s" in out and "Traceback" not in err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for part, images in (("step", settings["batch_size"]), ("forward", 1)):
        found = report[part]
        assert found["spread_s"][0] <= found["s"] <= found["spread_s"][1]
        assert found["images_per_s"] == pytest.approx(images / found["s"])
        operations = report[f"{'training' if part == 'step' else 'inference'}_tflop_per_image"]
        assert found["mfu"] == pytest.approx(operations * found["images_per_s"] / 0.1, rel=0.02)  # of a rounded number
    assert report["compile_s"] > 0 and report["peak_gb"] > report["temporary_gb"] > 0
    assert report["command"].endswith(" ".join(flags)) and report["versions"]["jax"]


def test_the_machine_itself():
    found = benchmark.machine(side=64, megabytes=1, count=2)
    assert found["product_gflop_per_s"] > 0 and found["copy_gb_per_s"] > 0 and "cores" in found["device"]


def test_the_table_shows_every_number():
    text = benchmark.table({"crop": (64, 64), "step": {"s": 0.123456, "spread_s": [0.1, 0.2]}, "batch_size": 4})
    assert "crop           64 x 64" in text and "0.1235" in text and "0.1 to 0.2" in text
