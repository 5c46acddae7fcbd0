"""The training loop around a toy step, where every order of events is cheap to try; then the real step's options."""

import contextlib
import functools
import json
import os
import signal

import jax
import numpy as np
import optax
import pytest
import runs

from ktda_jax import UserError, sharding
from ktda_jax.config.settings import Settings
from ktda_jax.data import pipeline, remembered
from ktda_jax.training import inputs, lock, loop, reported
from ktda_jax.training.checkpoint import Checkpoints
from ktda_jax.training.program import build
from ktda_jax.training.state import TrainState


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    return runs.make_tiles(tmp_path_factory.mktemp("tiles"))


# The loop ---------------------------------------------------------------------------------------------------------


def final_state(workdir, program) -> TrainState:
    checkpoints = Checkpoints(workdir / "checkpoints")
    current, _ = checkpoints.restore(checkpoints.latest_step(), program.abstract, program.shardings)
    return current


def kept(workdir) -> set[int]:
    return {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}


def test_the_best_checkpoint_is_kept_and_reported(toy, tiles, tmp_path):
    toy(quality={2: 0.4, 4: 0.9, 6: 0.7})
    result = loop.train_and_evaluate(runs.config(tiles, {"eval_every": 2}), tmp_path)
    scores = {row["step"]: row["val/mIoU"] for row in runs.rows(tmp_path) if "val/mIoU" in row}
    assert list(scores) == [2, 4, 6] and max(scores, key=scores.get) == 4
    assert kept(tmp_path) == {4, 6}
    assert result.metrics.summary["mIoU"] == scores[4]
    final = [row for row in runs.rows(tmp_path) if "final/mIoU" in row]
    assert [(row["step"], row["split"], row["final/mIoU"]) for row in final] == [(4, "val", scores[4])]


def test_it_stops_early_where_scores_get_no_better_and_more_patience_goes_on(toy, tiles, tmp_path, capsys):
    given = {"eval_every": 2, "total_steps": 12, "patience": 2}
    toy(quality={2: 0.4, 4: 0.9, 6: 0.7, 8: 0.8}, at={9: lambda: pytest.fail("trained on")})
    result = loop.train_and_evaluate(runs.config(tiles, given), tmp_path)
    assert "stopped early at step 8: no better score in config.patience=2" in capsys.readouterr().out
    assert kept(tmp_path) >= {4, 8} and result.metrics.summary["mIoU"] == pytest.approx(max(
        row["val/mIoU"] for row in runs.rows(tmp_path) if "val/mIoU" in row
    ))  # fmt: skip
    again = loop.train_and_evaluate(runs.config(tiles, given), tmp_path)  # by the checkpoints alone
    assert "stopped early at step 8" in capsys.readouterr().out
    np.testing.assert_array_equal(again.confusion, result.confusion)
    toy(quality={10: 0.9, 12: 0.5})  # no better than that of step 4
    loop.train_and_evaluate(runs.config(tiles, given | {"patience": 3}), tmp_path)
    assert "stopped early at step 10" in capsys.readouterr().out
    loop.train_and_evaluate(runs.config(tiles, given | {"patience": 9}), tmp_path)
    assert runs.steps(tmp_path, "val/mIoU") == [2, 4, 6, 8, 10, 12]


def test_a_workdir_older_than_what_configs_set_goes_on_as_it_was_begun(toy, tiles, tmp_path, capsys):
    """configs/custom.py scores at native scale and turns tiles since there are such settings."""
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["data"]["eval_scale"], saved["data"]["rotate"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    now = runs.config(tiles, {"data.eval_scale": "native", "data.rotate": True})
    for _ in range(2):  # its record stays as old as it is
        result = loop.train_and_evaluate(now, tmp_path)
        out = capsys.readouterr().out
        assert "goes on as it was begun: config.data.eval_scale=crop, config.data.rotate=False" in out
        assert "tiles squeezed to 64 x 64" in out and result.confusion.any()
    with pytest.raises(UserError, match=r"another config: data.rotate \(saved False, now True\)"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "new")
        loop.train_and_evaluate(runs.config(tiles, {"data.rotate": True}), tmp_path / "new")


def test_what_is_wrong_with_the_test_split_is_said_before_training(toy, tiles, tmp_path):
    toy(at={1: lambda: pytest.fail("trained")})
    with pytest.raises(UserError, match="test"):
        loop.train_and_evaluate(runs.config(tiles, {"data.test_split": "test"}), tmp_path)


def test_other_tiles_are_refused_on_resume(toy, tiles, tmp_path):
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")
    other = runs.make_tiles(tmp_path / "other", train=5)
    with pytest.raises(UserError, match="the train and val data are not those that .*run was begun with"):
        loop.train_and_evaluate(runs.config(other), tmp_path / "run")
    moved = runs.make_tiles(tmp_path / "moved")
    loop.train_and_evaluate(runs.config(moved), tmp_path / "run")  # the same tiles elsewhere


def test_other_teacher_features_are_refused_on_resume(toy, tiles, tmp_path, monkeypatch):
    """Wherever they lie: what they are made from counts."""
    monkeypatch.setattr(pipeline, "train_iterator", _without_features)
    for number, (fingerprint, message) in enumerate((("a", None), ("a", None), ("b", "the teacher features data are"))):
        features = type("Features", (), {"fingerprint": fingerprint, "folder": f"f{number}", "source": None})
        monkeypatch.setattr(inputs, "open_features", lambda *_, features=features: features)
        toy()
        config = runs.config(tiles, {"teacher.mode": "precomputed"})
        if message is None:
            loop.train_and_evaluate(config, tmp_path / "run")
        else:
            with pytest.raises(UserError, match=message):
                loop.train_and_evaluate(config, tmp_path / "run")


def _without_features(*arguments, features, original=pipeline.train_iterator, **options):
    return original(*arguments, **options)


def test_evaluation_of_another_model_is_refused(toy, tiles, tmp_path):
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    with pytest.raises(UserError, match=r"begun with another config: model.fmm.heads \(saved 2, now 4\)"):
        loop.evaluate_workdir(runs.config(tiles, {"model.fmm.heads": 4}), tmp_path)
    loop.evaluate_workdir(runs.config(tiles, {"optimizer.lr": 1.0, "eval_batch_size": 3}), tmp_path)


def test_evaluation_leaves_a_running_training_its_file(toy, tiles, tmp_path):
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as training:
        loop.evaluate_workdir(runs.config(tiles), tmp_path)
        training.write('{"step": 7, "train/loss": 1.0}\n')
    rows = runs.rows(tmp_path)
    assert rows[-1]["step"] == 7 and "final/mIoU" in rows[-2]


def test_averaged_parameters_are_the_ones_evaluated(toy, tiles, tmp_path):
    toy(quality={99: 0.8}, ema=99.0)
    result = loop.train_and_evaluate(runs.config(tiles), tmp_path)
    assert result.metrics.summary["aAcc"] == pytest.approx(80, abs=0.1)


def test_a_score_of_nothing_is_never_the_best(toy, tiles, tmp_path):
    """Without a labelled pixel in validation, mIoU is NaN, which no comparison can rank."""
    toy(quality={3: np.nan, 6: np.nan})
    loop.train_and_evaluate(runs.config(tiles, {"keep_checkpoints": 1}), tmp_path)
    assert kept(tmp_path) == {6}


@pytest.mark.parametrize("step", [2, 3])  # 3 is also validated
def test_a_stop_at_any_step_resumes_as_if_nothing_had_happened(toy, tiles, tmp_path, capsys, step):
    config, before = runs.config(tiles), signal.getsignal(signal.SIGTERM)
    program = toy()
    loop.train_and_evaluate(config, tmp_path / "whole")
    toy(at={step: functools.partial(os.kill, os.getpid(), signal.SIGTERM)})
    assert loop.train_and_evaluate(config, tmp_path / "stopped") is None
    assert f"stopped by a signal at step {step}; run the same command to go on" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is before
    assert max(kept(tmp_path / "stopped")) == step

    toy()
    loop.train_and_evaluate(config, tmp_path / "stopped")
    assert f"resuming at step {step}" in capsys.readouterr().out
    whole, stopped = (final_state(tmp_path / name, program) for name in ("whole", "stopped"))
    assert whole.params == stopped.params and int(whole.step) == int(stopped.step) == 6
    assert runs.reported(tmp_path / "whole") == runs.reported(tmp_path / "stopped")


def test_the_finished_command_trains_nothing(toy, tiles, tmp_path):
    toy()
    first = loop.train_and_evaluate(runs.config(tiles), tmp_path)
    rows = runs.rows(tmp_path)
    toy(at=dict.fromkeys(range(9), pytest.fail))
    again = loop.train_and_evaluate(runs.config(tiles), tmp_path)
    np.testing.assert_array_equal(first.confusion, again.confusion)
    assert runs.rows(tmp_path) == rows
    with lock.hold(tmp_path, place="", claim="training", remedy=""):  # which does not mind to be looked at
        loop.evaluate_workdir(runs.config(tiles), tmp_path)
        with pytest.raises(UserError, match="use another --workdir or stop it"):
            loop.train_and_evaluate(runs.config(tiles), tmp_path)


@pytest.mark.parametrize("step, saved", [(2, "no checkpoint was written yet"), (5, "the last checkpoint is step 3")])
def test_a_loss_that_is_not_finite_ends_training_and_is_not_saved(toy, tiles, tmp_path, step, saved):
    toy(loss={step: np.nan})
    with pytest.raises(UserError, match=f"not finite at step {step}: loss is nan; {saved}. Lower"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path)
    assert kept(tmp_path) == ({3} if step > 3 else set())


def test_a_loss_that_nobody_looked_at_is_not_saved_either(toy, tiles, tmp_path):
    toy(loss={5: np.nan})
    with pytest.raises(UserError, match="not finite at step 5: loss is nan; the last checkpoint is step 3. Lower"):
        loop.train_and_evaluate(runs.config(tiles, {"log_every": 50}), tmp_path)
    assert kept(tmp_path) == {3} and runs.steps(tmp_path, "train/loss") == [1]


def test_the_next_batch_is_put_on_the_devices_while_steps_run(toy, tiles, tmp_path, monkeypatch):
    """But not across a save, whose data position is that of its step."""
    order, put, save = [], sharding.to_global, Checkpoints.save

    def to_global(mesh, batch):
        order.extend([] if "mask" in batch else ["put"])  # evaluation's have a mask
        return put(mesh, batch)

    monkeypatch.setattr(sharding, "to_global", to_global)
    monkeypatch.setattr(reported.jax, "block_until_ready", lambda terms: order.append("waited"))
    monkeypatch.setattr(Checkpoints, "save", lambda *a: order.append("save") or save(*a))
    toy(at={step: functools.partial(order.append, f"step {step}") for step in range(1, 6)})
    loop.train_and_evaluate(runs.config(tiles, {"total_steps": 5, "eval_every": 5, "checkpoint_every": 4}), tmp_path)
    assert " ".join(order) == (
        "put step 1 waited put step 2 put step 3 put step 4 waited waited waited save put step 5 waited save"
    )


def test_rows_say_how_fast_it_was_and_what_it_waited_for(toy, tiles, tmp_path):
    toy()
    loop.train_and_evaluate(runs.config(tiles, {"log_every": 2}), tmp_path)
    rows = [row for row in runs.rows(tmp_path, times=True) if "train/loss" in row]
    assert [row["step"] for row in rows if "train/images_per_s" in row] == [2, 4, 6]
    assert all(row["train/images_per_s"] > 0 and 0 <= row["train/data_wait"] <= 1 for row in rows[1:])


def test_tiles_are_checked_once(toy, tmp_path, monkeypatch):
    """Not again by the evaluation at the end, by a resumed run, or by another evaluation; but if they change."""
    tiles, checked = runs.make_tiles(tmp_path / "tiles"), []
    original = remembered.check_split
    monkeypatch.setattr(remembered, "YOUNG", 0)
    monkeypatch.setattr(remembered, "check_split", lambda source, **o: checked.append(source) or original(source, **o))
    toy(at={4: functools.partial(os.kill, os.getpid(), signal.SIGTERM)})
    assert loop.train_and_evaluate(runs.config(tiles), tmp_path / "run") is None
    assert len(checked) == 2 and (tmp_path / "run" / "checked.json").exists()
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")
    loop.evaluate_workdir(runs.config(tiles), tmp_path / "run")
    assert len(checked) == 2
    loop.evaluate_workdir(runs.config(tiles, {"data.test_split": "train"}), tmp_path / "run")
    loop.evaluate_workdir(runs.config(tiles, {"data.test_split": "train"}), tmp_path / "run")
    assert len(checked) == 3  # with no crop that it must hold
    runs.write_tile(tiles, "val", "t1", np.zeros((72, 72, 3)), np.zeros((72, 72)))
    with pytest.raises(UserError, match="the val data are not those that .*run was begun with"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")
    assert len(checked) == 4


def traces(workdir) -> int:
    return len(list((workdir / "profile").rglob("*.xplane.pb")))


def test_some_steps_are_traced(toy, tiles, tmp_path, capsys, monkeypatch):
    steps, started = [], []
    start, stop = jax.profiler.start_trace, jax.profiler.stop_trace
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: (started.append(steps[-1]), start(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: (started.append(steps[-1]), stop()))
    toy(at={step: functools.partial(steps.append, step) for step in range(7)})
    loop.train_and_evaluate(runs.config(tiles), tmp_path, profile=(2, 4))
    assert started == [1, 4] and traces(tmp_path) == 1
    assert f"a trace is in {tmp_path / 'profile'}" in capsys.readouterr().out
    loop.train_and_evaluate(runs.config(tiles), tmp_path, profile=(2, 4))
    assert "--profile=2:4 leaves no trace, since step 6 is done already" in capsys.readouterr().out
    assert started == [1, 4]


@pytest.mark.parametrize("error", [False, True])
def test_a_trace_ends_with_the_training(toy, tiles, tmp_path, error):
    signalled = functools.partial(os.kill, os.getpid(), signal.SIGTERM)
    toy(at={3: functools.partial(pytest.fail, "an error of any kind") if error else signalled})
    with pytest.raises(pytest.fail.Exception) if error else contextlib.nullcontext():
        assert loop.train_and_evaluate(runs.config(tiles), tmp_path, profile=(2, 6)) is None
    assert traces(tmp_path) == 1
    with pytest.raises(RuntimeError, match="No profile started"):
        jax.profiler.stop_trace()


def test_a_trace_that_cannot_be_written_is_only_said(toy, tiles, tmp_path, capsys, monkeypatch):
    def fails(original=jax.profiler.stop_trace):
        original()
        raise RuntimeError("INTERNAL: no\nroom")

    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    toy()
    assert loop.train_and_evaluate(runs.config(tiles), tmp_path, profile=(2, 3)) is not None
    assert f"warning: cannot write the trace to {tmp_path / 'profile'}: INTERNAL: no room" in capsys.readouterr().out


def test_checkpoints_between_evaluations(toy, tiles, tmp_path):
    toy(at={6: functools.partial(pytest.fail, "an error of any kind")})
    with pytest.raises(pytest.fail.Exception):
        loop.train_and_evaluate(runs.config(tiles, {"checkpoint_every": 5}), tmp_path)
    assert kept(tmp_path) == {3, 5}  # complete, although the error came right after


def corrupt(tiles, name):
    path = tiles / "img_dir" / "train" / f"{name}.png"
    path.write_bytes(path.read_bytes()[:100])


def test_skipped_tiles_are_counted(toy, tmp_path):
    tiles = runs.make_tiles(tmp_path / "tiles")
    corrupt(tiles, "t2")
    toy()
    config = runs.config(tiles, {"data.on_corrupt": "skip", "batch_size": 2})
    loop.train_and_evaluate(config, tmp_path / "run")  # 6 steps of 2 rows: each of the 6 tiles comes twice
    assert runs.rows(tmp_path / "run")[-3]["train/skipped_tiles"] == 2


def test_a_tile_that_breaks_during_training_is_named(toy, tmp_path, monkeypatch):
    tiles = runs.make_tiles(tmp_path / "tiles")
    toy()
    opened = pipeline.train_iterator
    monkeypatch.setattr(pipeline, "train_iterator", lambda *a, **k: corrupt(tiles, "t2") or opened(*a, **k))
    with pytest.raises(UserError, match=r"t2\.png.*repair or remove the tile, or train with on_corrupt='skip'"):
        loop.train_and_evaluate(runs.config(tiles), tmp_path / "run")


def test_the_workdir_holds_what_it_promises(toy, tiles, tmp_path):
    toy(figures=True)
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 6
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["seed"] == 42 and run["versions"]["jax"] == jax.__version__ and len(run["devices"]) == 8
    assert set(run["data"]) == {"train", "val"} and run["data"]["train"] != run["data"]["val"]
    assert run["tiles"] == {"train": 6, "val": 5} and list(tmp_path.glob("events.*"))
    figures = {p.name for p in (tmp_path / "figures").iterdir()}
    assert figures == {
        "val_confusion.png",
        "val_samples.png",
        "val.csv",
        "val_tiles.csv",
        "val_precision_recall.png",
        "val_reliability.png",
        "val.json",
        "curves.png",
    }
    assert runs.steps(tmp_path, "train/loss") == [1, 2, 3, 4, 5, 6]
    assert runs.steps(tmp_path, "val/mIoU") == [3, 6]


def test_evaluation_on_another_split(toy, tiles, tmp_path, capsys):
    toy()
    loop.train_and_evaluate(runs.config(tiles), tmp_path)
    loop.evaluate_workdir(runs.config(tiles, {"data.test_split": "train"}), tmp_path)
    assert "train split, step 6:" in capsys.readouterr().out  # of equal scores the later one
    assert [row["split"] for row in runs.rows(tmp_path) if "split" in row] == ["val", "train"]


# The step ---------------------------------------------------------------------------------------------------------


def real_batch(config):
    rng = np.random.default_rng(3)
    image = rng.integers(0, 256, (config.batch_size, *config.data.crop, 3), np.uint8)
    label = (image.mean(-1) // 52).astype(np.uint8)
    return {"image": image, "label": label}


@pytest.mark.parametrize(
    "overrides, missing, modules",
    [
        ({}, set(), set()),
        ({"model.aux_channels": 0}, {"aux"}, {"auxiliary_head"}),
        ({"distill": False}, {"distill"}, set()),
        ({"distill": False, "model.fam": False}, {"distill"}, {"fam", "neck"}),
        ({"model.fmm.enabled": False}, set(), {"fmm"}),
        ({"model.fmm.form": "transformer"}, set(), set()),
    ],
)
def test_what_is_left_out_leaves_its_term_and_parameters_out(overrides, missing, modules):
    config = runs.config("unused", overrides)
    program = build(Settings.of(config))
    batch = jax.eval_shape(lambda: real_batch(config))
    _, terms = jax.eval_shape(program.train_step, program.abstract, batch, runs.random_teacher(config))
    assert terms.keys() == {"loss", "decode", "aux", "distill", "acc", "grad_norm", "lr"} - missing
    every = {"student", "fam", "neck", "fmm", "decode_head", "auxiliary_head"}
    assert {path.split("/")[0] for path in program.abstract.params} == every - modules


def first_step(overrides, batch=None):
    """(state before, state after, terms) of one real step."""
    config = runs.config("unused", {"schedule.warmup": 0, **overrides})
    program = build(Settings.of(config))
    kept, teacher = runs.random_state(program), runs.random_teacher(config)
    before = sharding.place(kept, program.shardings)
    batch = sharding.to_global(program.mesh, batch or real_batch(config))
    after, terms = program.train_step(before, batch, teacher)
    return kept, jax.device_get(after), {k: float(v) for k, v in terms.items()}


def test_options_of_the_step_together():
    """bfloat16 keeps float32 parameters, clipping bounds the gradient, the average follows the parameters."""
    before, after, terms = first_step(
        {
            "dtype": "bfloat16", "clip_norm": 1e-2, "ema": 0.75, "loss.kl_axis": "channel",
            "model.student.depths": (0, 0, 0, 0), "loss.avg_non_ignore": True,
            "loss.class_weights": (1.0, 2.0, 1.0, 1.0, 1.0),
        }
    )  # fmt: skip
    assert all(np.isfinite(v) for v in terms.values()) and terms["grad_norm"] > 1e-2
    assert all(v.dtype == np.float32 for v in jax.tree.leaves((after.params, after.batch_stats, after.ema)))
    # Adam's first moment is a tenth of the first gradient: the clipped one.
    moments = next(s.mu for s in jax.tree.leaves(after.opt_state, is_leaf=_is_adam) if _is_adam(s))
    assert float(optax.tree.norm(moments)) == pytest.approx(0.1 * 1e-2, rel=1e-3)
    moved = 0
    for path, old in before.params.items():
        np.testing.assert_allclose(after.ema[path], 0.75 * old + 0.25 * after.params[path], rtol=1e-5, atol=1e-8)
        moved += not np.array_equal(old, after.params[path])
    assert moved > 0.9 * len(before.params)


def test_trainings_that_differ_in_their_seed_share_a_program():
    """So that the compilation cache serves all of them: the key is an argument."""
    small = {"model.student.depths": (0, 0, 0, 0), "distill": False, "mesh.data": 1}
    programs = [build(runs.settings("unused", {**small, "seed": seed})) for seed in (1, 2)]
    texts = [p.train_step.func.lower(*p.arguments, **p.train_step.keywords).as_text() for p in programs]
    assert texts[0] == texts[1]
    seeds = [np.asarray(p.train_step.keywords["seed"]) for p in programs]
    expected = [jax.random.key_data(jax.random.key(seed)) for seed in (1, 2)]
    np.testing.assert_array_equal(seeds, expected)


def _is_adam(leaf) -> bool:
    return isinstance(leaf, optax.ScaleByAdamState)


def test_two_micro_batches_are_one_batch_but_for_batch_norm():
    """Micro-batch k holds rows k, k + 2, ...: of rows a a b b, both hold a b, whose BatchNorm statistics are those
    of the whole batch. Then all losses and gradients agree; the running averages, updated twice, do not."""
    config = runs.config("unused")
    rows = {k: np.repeat(v[:2], 2, axis=0) for k, v in real_batch(config).items()}
    quiet = {"model.student.depths": (0, 0, 0, 0), "model.dropout": 0.0}
    _, one, terms = first_step(quiet, rows)
    _, two, accumulated = first_step({**quiet, "grad_accum": 2}, rows)
    for name, value in terms.items():
        assert accumulated[name] == pytest.approx(value, rel=1e-4), name
    for path, moment in _moments(one).items():
        error = np.linalg.norm(moment - _moments(two)[path])
        assert error <= 1e-3 * np.linalg.norm(moment) + 1e-7, path
    mean = "decode_head/bottleneck/bn/mean"
    np.testing.assert_allclose(two.batch_stats[mean], 1.9 * one.batch_stats[mean], rtol=1e-3, atol=1e-5)


def _moments(current):
    return next(s.mu for s in jax.tree.leaves(current.opt_state, is_leaf=_is_adam) if _is_adam(s))


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        {"model.aux_channels": 0},
        {"distill": False, "model.fam": False},
        {"model.fmm.enabled": False},
        {"model.fmm.form": "transformer"},
        {"loss.kl_axis": "position", "loss.alpha": 1.0},
        {"loss.alpha": 0.0},
        {"model.student.remat": True, "model.fmm.remat": True, "model.fmm.form": "transformer"},
    ],
)
def test_every_ablation_trains(overrides):
    before, after, terms = first_step(overrides)
    assert all(np.isfinite(v) for v in terms.values())
    assert any(not np.array_equal(after.params[path], old) for path, old in before.params.items())
