"""config.model.encoder='teacher': the frozen ViT's taps under our decoder; and narrower necks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from flax import nnx

from ktda_jax import UserError, benchmark
from ktda_jax.config import checks
from ktda_jax.config.model import model_of
from ktda_jax.config.settings import Settings
from ktda_jax.models import flat
from ktda_jax.models.initial import HostRngs
from ktda_jax.models.ktda import KTDA
from ktda_jax.models.vit import ViT
from ktda_jax.plan import flops
from ktda_jax.training import losses
from ktda_jax.training.program import build

FROZEN = {"model.encoder": "teacher", "model.fam": False, "model.fmm.enabled": False, "distill": False}
SCALES = (4.0, 2.0, 1.0, 0.5)


def test_only_the_decoder_trains(tmp_path):
    """And it does train: gradients flow to the neck and the heads, logits follow the frozen weights."""
    config = runs.config(tmp_path, FROZEN)
    model = model_of(Settings.of(config))
    program = build(Settings.of(config))
    current = runs.random_state(program)
    params, stats = current.params, current.batch_stats
    assert {path.split("/")[0] for path in params} == {"neck", "decode_head", "auxiliary_head"}
    vit, _, _ = flat.abstract(lambda: ViT(model.teacher, rngs=nnx.Rngs(0)))
    frozen = runs.random_teacher(runs.config(tmp_path))
    assert model.teacher.grid_of(64, 64) == (5, 5)
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)
    labels = np.random.default_rng(1).integers(0, runs.CLASSES, (2, 64, 64), np.uint8)

    def loss(params, stats, frozen):
        teacher = flat.merge(vit, frozen, {})
        outputs = flat.merge(program.graphdef, params, stats)(images, train=True, teacher=teacher)
        assert outputs.logits.shape == (2, 20, 20, runs.CLASSES) and outputs.taps is None
        return losses.total_loss(outputs, labels, config.loss)[0], outputs.logits

    step = jax.jit(jax.grad(loss, has_aux=True))
    gradients, logits = step(params, stats, frozen)
    for part in ("neck/lateral_convs/0/kernel", "decode_head/conv_seg/kernel", "auxiliary_head/conv_seg/kernel"):
        assert float(jnp.abs(gradients[part]).max()) > 0, part
    other = {**frozen, "patch_embed/kernel": 2 * frozen["patch_embed/kernel"]}
    assert float(jnp.abs(logits - step(params, stats, other)[1]).max()) > 1e-4
    with pytest.raises(ValueError, match="this model's encoder is the frozen teacher"):
        jax.eval_shape(lambda: flat.merge(program.graphdef, params, stats)(images))


def test_a_config_from_before_there_was_a_choice_of_encoders(tmp_path):
    config = runs.config(tmp_path).unlock()
    for name in ("encoder", "tap_scales", "neck_channels"):
        del config.model[name]
    checks.resolve(config)
    assert model_of(Settings.of(config)) == model_of(runs.settings(tmp_path))


def test_the_benchmark_times_a_frozen_encoder(tmp_path):
    config = runs.config(tmp_path, {**FROZEN, "batch_size": 1})
    report = benchmark.run(config, steps=0, forwards=1)
    assert report["forward"]["images_per_s"] > 0


def test_inference_pays_for_the_frozen_encoder(tmp_path):
    model = model_of(runs.settings(tmp_path, FROZEN))
    found = flops.of_model(model, (64, 64), distill=False)
    assert found["inference"] > found["teacher"] > 0
    assert found["training"] < 3 * found["inference"] + found["teacher"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"distill": True}, "leaves nothing to distil; set config.distill=False"),
        ({"weights.student": "x"}, "has no student; leave config.weights.student out"),
        ({"model.fam": True}, "leaves nothing to align; set config.model.fam=False"),
        ({"model.encoder": "vit"}, "config.model.encoder is 'vit'; choose 'student' or 'teacher'"),
    ],
)
def test_what_does_not_go_with_it_is_named(tmp_path, settings, message):
    config = runs.config(tmp_path, {**FROZEN, **settings})
    with pytest.raises((UserError, ValueError), match=message):
        checks.resolve(config)
        model_of(Settings.of(config))


def test_a_narrower_neck(tmp_path):
    """Distillation stays at the teacher's width; all behind the neck has its own. Unset, the published width."""
    config = runs.config(tmp_path, {"model.neck_channels": 6})
    narrow, usual = model_of(Settings.of(config)), model_of(runs.settings(tmp_path))
    assert narrow.channels == (6,) * 4 and usual.channels == (16,) * 4
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.uint8)
    graphdef, params, stats = flat.abstract(lambda: KTDA(narrow, rngs=nnx.Rngs(0)))
    outputs = jax.eval_shape(lambda p, s, x: flat.merge(graphdef, p, s)(x), params, stats, images)
    assert outputs.student[0].shape == (1, 5, 5, 16) and outputs.logits.shape == (1, 20, 20, runs.CLASSES)
    assert params["decode_head/lateral_convs/0/conv/kernel"].shape[-2] == 6
    with pytest.raises(UserError, match=r"heads is 4, which does not divide 6"):
        build(
            runs.settings(tmp_path, {"model.neck_channels": 6, "model.fmm.form": "transformer", "model.fmm.heads": 4})
        )


@pytest.mark.slow
def test_a_step_with_tap_scales_is_one_on_multiplied_taps(tmp_path):
    taps = [np.random.default_rng(k).normal(size=(4, 5, 5, 16)).astype(np.float32) for k in range(4)]
    batch = {"image": np.full((4, 64, 64, 3), 90, np.uint8), "label": np.zeros((4, 64, 64), np.uint8)}
    found = []
    for given, multiplied in ((SCALES, (1,) * 4), (None, SCALES)):
        program = build(runs.settings(tmp_path, {"model.tap_scales": given, "teacher.mode": "precomputed"}))
        rows = {**batch, "taps": [s * t for s, t in zip(multiplied, taps, strict=True)]}
        found.append(float(program.train_step(runs.random_state(program), rows, {})[1]["distill"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] > 0


def test_tap_scales_multiply_what_the_teacher_gives(tmp_path):
    taps = [np.full((1, 2, 2, 3), k + 1.0) for k in range(4)]
    scaled, unscaled = (
        KTDA(model_of(runs.settings(tmp_path, {"model.tap_scales": scales})), rngs=HostRngs(0)).scaled(taps)
        for scales in (SCALES, None)
    )
    assert [float(t.mean()) for t in scaled] == [4.0, 4.0, 3.0, 2.0]
    assert all(a is b for a, b in zip(unscaled, taps, strict=True))  # as published
    for wrong in ((1.0, 2.0, 3.0), (1.0, 1.0, 1.0, 0.0), (1.0, "a", 1.0, 1.0)):
        with pytest.raises(UserError, match="config.model.tap_scales is .*; give (four numbers above 0|numbers)"):
            model_of(runs.settings(tmp_path, {"model.tap_scales": wrong}))
