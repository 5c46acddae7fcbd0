"""Shardings by rule, and that no mesh and no number of processes changes what is computed."""

import math
import re
import runpy
import signal

import jax
import numpy as np
import pytest
import runs
from jax.sharding import PartitionSpec as P

from ktda_jax import sharding
from ktda_jax.benchmark import COMPILED
from ktda_jax.config.settings import Settings
from ktda_jax.data import pipeline
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.inputs import augmentation, open_source
from ktda_jax.training.program import Compilation, build

pytestmark = pytest.mark.usefixtures("all_recomputed")

# The rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, fsdp, expected",
    [
        ((96, 384), 4, P(None, "fsdp")),  # the largest dimension
        ((512, 512), 4, P(None, "fsdp")),  # the last of equals
        ((1026, 512), 4, P(None, "fsdp")),  # 4 does not divide 1026
        ((3, 3, 512, 64), 8, P(None, None, "fsdp")),
        ((1001, 1003), 4, P()),  # nothing divides
        ((64, 64), 4, P()),  # too small to be worth it
        ((96, 384), 1, P()),
        ((), 4, P()),
    ],
)
def test_the_largest_dimension_that_divides_is_split(shape, fsdp, expected):
    assert sharding.spec(shape, fsdp) == expected


@pytest.mark.parametrize("given, shape", [((-1, 1), (8, 1)), ((-1, 4), (2, 4)), ((2, -1), (2, 4)), ((1, 1), (1, 1))])
def test_minus_one_takes_what_is_left(given, shape):
    assert tuple(sharding.make_mesh(*given).shape.values()) == shape


@pytest.mark.parametrize("given", [(16, 1), (3, 3), (0, 1), (-1, 9)])
def test_a_mesh_that_does_not_fit_is_named(given):
    message = f"config.mesh (data={given[0]}, fsdp={given[1]}) does not fit 8 devices"
    with pytest.raises(ValueError, match=re.escape(message)):
        sharding.make_mesh(*given)


def test_an_eighth_of_the_published_model_lies_on_each_of_eight_devices():
    """Parameters, moments and average of the base model, by the shardings that training places them with."""
    config = runpy.run_path(str(runs.REPOSITORY / "configs" / "grass.py"))["get_config"]()
    config.update_from_flattened_dict(
        {"mesh.data": 1, "mesh.fsdp": 8, "batch_size": 8, "eval_batch_size": 8, "ema": 0.9}
    )
    program = build(Settings.of(config))
    whole, share = 0, 0
    for x, s in zip(jax.tree.leaves(program.abstract), jax.tree.leaves(program.shardings), strict=True):
        whole += x.size * x.dtype.itemsize
        share += math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
    assert whole > 4e9 and 1 / 8 <= share / whole < 1.02 / 8


def test_every_device_gets_whole_rows_of_every_micro_batch():
    mesh = sharding.make_mesh(2, 4)
    sharding.check_batch_size(mesh, 16, "config.batch_size", 2)
    with pytest.raises(ValueError, match="config.batch_size is 8, which 8 devices x 2 accumulation steps do not"):
        sharding.check_batch_size(mesh, 8, "config.batch_size", 2)


def test_rows_go_to_devices_in_order_and_arrays_come_back_whole():
    mesh = sharding.make_mesh(2, 4)
    rows = np.arange(16 * 3).reshape(16, 3)
    array = sharding.to_global(mesh, {"x": rows})["x"]
    assert [s.data.shape for s in array.addressable_shards] == [(2, 3)] * 8
    np.testing.assert_array_equal(array, rows)
    kernel = np.random.default_rng(0).random((64, 256), np.float32)
    placed = sharding.place({"k": kernel}, sharding.tree_shardings(mesh, {"k": kernel}))["k"]
    assert {s.data.shape for s in placed.addressable_shards} == {(64, 64)}
    np.testing.assert_array_equal(placed, kernel)


# The same losses --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


@pytest.fixture
def small_arrays_are_split_too(monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SIZE", 64)


compiled = []
jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: name == COMPILED and compiled.append(name))


def train(tiles, data, fsdp, steps=4):
    """(initial parameters, terms of each step, final state) on a mesh, with drop path and dropout."""
    settings = {"mesh.data": data, "mesh.fsdp": fsdp, "batch_size": 8, "eval_batch_size": 8, "ema": 0.9}
    config = runs.config(tiles, settings)
    assert config.model.student.drop_path > 0 and config.model.dropout > 0
    program = build(Settings.of(config))
    batches = pipeline.train_iterator(
        open_source(Settings.of(config).data, "train"),
        augmentation=augmentation(Settings.of(config).data),
        batch_size=8,
        seed=0,
        num_threads=1,
    )
    current, teacher = program.init(), program.teacher()
    first, terms = jax.device_get(current.params), []
    Compilation(program).wait()  # from shapes, which must be those of the arrays
    for _ in range(steps):
        batch = next(batches)
        batch = sharding.to_global(program.mesh, {k: batch[k] for k in ("image", "label")})
        compiled.clear()
        current, values = program.train_step(current, batch, teacher)
        assert not compiled
        terms.append(jax.device_get(values))
    return first, terms, current


@pytest.fixture(scope="module")
def one_device(tiles):
    return train(tiles, 1, 1)


@pytest.mark.parametrize(
    "data, fsdp",
    [(2, 4), pytest.param(8, 1, marks=pytest.mark.slow), pytest.param(1, 8, marks=pytest.mark.slow)],
)
def test_a_mesh_gives_the_losses_of_one_device(one_device, tiles, small_arrays_are_split_too, recwarn, data, fsdp):
    first, terms, current = train(tiles, data, fsdp)
    for path, value in one_device[0].items():
        np.testing.assert_allclose(first[path], value, rtol=1e-6, atol=1e-7, err_msg=path)
    losses = [float(t["loss"]) for t in one_device[1]]
    assert len(set(losses)) == len(losses)
    for ours, theirs in zip(terms, one_device[1], strict=True):
        for name in ("loss", "decode", "aux", "distill"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), rel=1e-5), name
    share = 1 / fsdp  # of a parameter, its moments and its average lies on each device
    kernel = current.params["decode_head/bottleneck/conv/kernel"]
    moments = [x for x in jax.tree.leaves(current.opt_state) if x.shape == kernel.shape]
    for array in (kernel, *moments, current.ema["decode_head/bottleneck/conv/kernel"]):
        assert array.addressable_shards[0].data.size == array.size * share
    arrays = jax.tree.leaves((current.params, current.opt_state, current.ema))
    for device in range(data * fsdp):  # of all of them, but for the few that do not divide
        held = sum(x.addressable_shards[device].data.nbytes for x in arrays)
        assert share <= held / sum(x.nbytes for x in arrays) < share + 0.05
    assert not [w for w in recwarn if "donated buffers were not usable" in str(w.message)]


def start_two(tiles, workdir, settings):
    return runs.start_two(*runs.arguments(tiles, workdir, settings))


@pytest.mark.slow
def test_two_processes_are_one(tiles, tmp_path):
    """Against one process with two devices, parameters split over both."""
    settings = {"total_steps": 3, "mesh.fsdp": 2, "ema": 0.9, "model.student.depths": (0, 0, 0, 0)}
    settings["model.aux_channels"] = 0
    one = runs.start(*runs.arguments(tiles, tmp_path / "one", settings), devices=2)
    runs.finish(one)
    (out, _), (quiet, _) = [runs.finish(process) for process in start_two(tiles, tmp_path / "two", settings)]
    assert "2 cpu device(s)" in out and "val split, step 3:" in out
    assert not [line for line in quiet.splitlines() if "Gloo" not in line]  # process 0 speaks for all

    rows = [runs.rows(tmp_path / name) for name in ("one", "two")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]] == [1, 2, 3, 3, 3]
    for ours, theirs in zip(*rows, strict=True):
        assert ours.pop("split", None) == theirs.pop("split", None)
        assert theirs == pytest.approx(ours, rel=1e-5)
    config = runs.config(tiles, settings)
    program = build(Settings.of(config))
    states = []
    for name in ("one", "two"):
        with Checkpoints(tmp_path / name / "checkpoints") as checkpoints:
            states.append(checkpoints.restore(3, program.abstract, program.shardings))
    assert states[0][1] == states[1][1]  # the data position
    for ours, theirs in zip(*(jax.tree.leaves(state) for state, _ in states), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(tiles, tmp_path):
    settings = {"total_steps": 60, "eval_every": 60, "model.student.depths": (0, 0, 0, 0)}
    processes = start_two(tiles, tmp_path, settings)
    runs.wait_for(lambda: runs.reached(tmp_path, 5), processes[0])
    processes[1].send_signal(signal.SIGTERM)
    (out, _), _ = [runs.finish(process, 143) for process in processes]
    (step,) = [int(p.name) for p in (tmp_path / "checkpoints").iterdir()]
    assert f"stopped by a signal at step {step};" in out and step % 10 == 0 and step < 60
    processes = start_two(tiles, tmp_path, settings | {"log_every": 1})
    (out, _), _ = [runs.finish(process) for process in processes]
    assert f"resuming at step {step}" in out and runs.steps(tmp_path, "train/loss") == list(range(1, 61))


@pytest.mark.slow
def test_a_signal_before_the_first_step_stops_both_alike(tiles, tmp_path):
    """One that ended by itself would leave the other one waiting for it."""
    settings = {"total_steps": 60, "eval_every": 60, "model.student.depths": (0, 0, 0, 0)}
    processes = start_two(tiles, tmp_path / "run", settings)
    runs.wait_for(lambda: "parameters to train" in processes[0].stdout.readline(), processes[0])
    processes[1].send_signal(signal.SIGINT)
    (out, _), _ = [runs.finish(process, 130) for process in processes]
    assert "stopped by a signal before the first step" in out
    assert not list((tmp_path / "run" / "checkpoints").iterdir()) and not (tmp_path / "run" / "lock.json").exists()
