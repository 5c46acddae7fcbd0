"""The whole model and the real training step against the reference implementation, stage by stage."""

import dataclasses
import functools
import json
import re
from typing import NamedTuple

import golden
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from ml_collections import ConfigDict

from ktda_jax.models import flat
from ktda_jax.models.convnext import ConvNeXtConfig
from ktda_jax.models.fmm import FMMConfig
from ktda_jax.models.ktda import KTDA, KTDAConfig, band_statistics, normalize
from ktda_jax.models.layers import resize
from ktda_jax.models.vit import MEAN, STD, ViT, ViTConfig
from ktda_jax.training import losses, optim
from ktda_jax.training.program import train_step
from ktda_jax.training.state import TrainState
from ktda_jax.weights import mmseg
from ktda_jax.weights.table import to_our_layout

pytestmark = pytest.mark.usefixtures("all_recomputed")

NAMES = ("grass_tiny", "grass_tiny_resized")
LOSS = ConfigDict(
    dict(
        class_weights=None,
        avg_non_ignore=False,
        aux_weight=0.4,
        alpha=0.5,
        temperature=1.0,
        kl_axis="width",
        distance="published",
        tap_weights=None,
        cross_entropy=1.0,
        dice=0.0,
        focal=0.0,
        focal_gamma=2.0,
        lovasz=0.0,
        hard_share=None,
    )
)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """(dtype, tolerance), with 64-bit mode on for float64."""
    if request.param == "float32":
        yield jnp.float32, 1e-4
        return
    with jax.enable_x64(True):
        yield jnp.float64, 1e-9


def nhwc(array):
    return np.moveaxis(array, 1, -1)


def stages(model, teacher, images):
    """Every intermediate map, by the names of the goldens."""
    x = normalize(images, model.dtype)
    student = model.student(x)
    fam = model.fam(student, model.config.teacher.grid_of(*x.shape[1:3]))
    neck = model.neck(fam)
    fmm = model.fmm(neck)
    levels = {"student": student, "fam": fam, "teacher": teacher(x), "neck": neck, "fmm": fmm}
    named = {f"eval/{stage}/{k}": x for stage, maps in levels.items() for k, x in enumerate(maps)}
    named["eval/decode_logits"] = model.decode_head(fmm, train=False, key=None)
    named["eval/aux_logits"] = model.auxiliary_head(fmm[2], train=False, key=None)
    return named


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_equals_the_reference(name, precision):
    dtype, tolerance = precision
    model, teacher = golden.models(name, dtype)
    expected = golden.arrays(name)
    images = expected["image_rgb_uint8"]
    if dtype == jnp.float64 and images.shape[1:3] != model.config.teacher.image_size:
        # The reference resizes the position embedding in float32 whatever the model's dtype; given the same
        # rounded values, the rest agrees in float64.
        teacher = with_float32_positions(teacher, images.shape[1:3])
    found = jax.jit(stages)(model, teacher, images)
    assert len(found) == 22
    errors = {k: golden.relative(v, nhwc(expected[k])) for k, v in found.items()}
    assert max(errors.values()) < tolerance, errors

    outputs = jax.jit(lambda model, teacher: model(images, teacher=teacher))(model, teacher)
    assert golden.relative(outputs.logits, nhwc(expected["eval/decode_logits"])) < tolerance
    full = resize(outputs.logits, images.shape[1:3])
    assert golden.relative(full, nhwc(expected["eval/full_logits"])) < tolerance
    np.testing.assert_array_equal(jnp.argmax(full, -1), expected["eval/pred"])


def with_float32_positions(teacher, image_size):
    torch = pytest.importorskip("torch")
    config = dataclasses.replace(teacher.config, image_size=tuple(image_size))
    source = torch.tensor(np.asarray(teacher.pos_embed[...])).permute(0, 3, 1, 2).float()
    resized = torch.nn.functional.interpolate(source, size=config.grid, mode="bicubic", align_corners=False)
    graphdef, params, _ = flat.split(nnx.clone(teacher))
    params["pos_embed"] = jnp.asarray(resized.permute(0, 2, 3, 1).double().numpy())
    teacher = flat.merge(graphdef, params, {})
    teacher.config = config
    return teacher


def test_run_time_position_resize_differs_from_the_reference_by_float32_rounding_only():
    with jax.enable_x64(True):
        _, teacher = golden.models("grass_tiny_resized", jnp.float64)
        expected = golden.arrays("grass_tiny_resized")
        taps = jax.jit(lambda teacher: teacher(normalize(expected["image_rgb_uint8"], jnp.float64)))(teacher)
        for k, tap in enumerate(taps):
            assert golden.relative(tap, nhwc(expected[f"eval/teacher/{k}"])) < 5e-7


@pytest.mark.parametrize("name", NAMES)
def test_distillation_variants(name, precision):
    dtype, tolerance = precision
    expected = golden.arrays(name)
    levels = {s: [jnp.asarray(nhwc(expected[f"eval/{s}/{k}"]), dtype) for k in range(4)] for s in ("fam", "teacher")}
    keys = [k for k in expected if k.startswith("eval/distill_loss")]
    assert len(keys) == 4
    for key in keys:
        temperature, alpha = (float(x[1 if x[0] == "T" else 5 :]) for x in key.rpartition("/")[2].split("_"))
        value = losses.distillation(levels["fam"], levels["teacher"], alpha=alpha, temperature=temperature)
        assert abs(float(value) / expected[key] - 1) < tolerance, key


class Trajectory(NamedTuple):
    """Eight real training steps of the golden model; drop path and dropout are 0."""

    dtype: type
    gradients: dict  # of step 0, by path
    terms: list[dict]
    rates: list[float]
    final: dict  # parameters and BatchNorm statistics


@pytest.fixture(scope="module", params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def trajectory(request):
    dtype = jnp.dtype(request.param)
    with jax.enable_x64(request.param == "float64"):
        model, teacher = golden.models("grass_tiny", dtype, dropout=0.0)
        graphdef, params, stats = flat.split(model)
        teacher_graphdef, frozen, _ = flat.split(teacher)
        schedule = optim.warmup_poly(6e-4, 8, warmup=3)
        keep_gradients = optax.GradientTransformation(lambda params: params, lambda grads, _, params: (grads, grads))
        optimizer = optax.chain(keep_gradients, optim.adamw(schedule))
        arrays = golden.arrays("grass_tiny")
        batch = {"image": arrays["image_rgb_uint8"], "label": arrays["label_uint8"]}
        given = dict(
            seed=0, grad_accum=1, ema=None, loss=LOSS, semi=dict(weight=0.0), optimizer=dict(student_lr_mult=1.0)
        )
        settings = ConfigDict(given)
        parts = dict(graphdef=graphdef, teacher_graphdef=teacher_graphdef, optimizer=optimizer, schedule=schedule)
        step = jax.jit(lambda current: train_step(current, batch, frozen, settings=settings, mesh=None, **parts))
        current = TrainState(jnp.zeros((), jnp.int32), params, stats, optimizer.init(params), None)
        gradients, terms = None, []
        for _ in range(8):
            current, found = step(current)
            gradients = gradients or current.opt_state[0]
            terms.append({k: float(v) for k, v in found.items()})
        return Trajectory(
            dtype, gradients, terms, [each["lr"] for each in terms], {**current.params, **current.batch_stats}
        )


def test_losses_and_every_gradient_of_the_first_step(trajectory):
    tolerance = 1e-9 if trajectory.dtype == jnp.float64 else 1e-4
    expected = golden.arrays("grass_tiny")
    upstream = dict(
        decode="decode.loss_ce", aux="aux.loss_ce", distill="distill_loss", loss="total", acc="decode.acc_seg"
    )
    for ours, theirs in upstream.items():
        limit = 1e-6 if ours == "acc" else tolerance  # the reference computes the accuracy in float32
        assert abs(trajectory.terms[0][ours] / expected[f"train0/{theirs}"] - 1) < limit, ours

    found = trajectory.gradients
    grads = {k.removeprefix("train0/grad/"): v for k, v in expected.items() if k.startswith("train0/grad/")}
    grads = golden.ours(grads, found)
    assert len(grads) == 184 and grads.keys() == found.keys()
    largest = max(np.linalg.norm(g) for g in grads.values())
    for path, reference in grads.items():
        allowed = tolerance * np.linalg.norm(reference) + 1e-6 * largest
        assert np.linalg.norm(np.asarray(found[path], np.float64) - reference) <= allowed, path
    # Nearly all of them without that allowance, which attention's key biases (no gradient at all) need.
    assert sum(golden.relative(found[k], g) < 10 * tolerance for k, g in grads.items()) >= 0.9 * len(grads)


def test_eight_steps_follow_the_reference(trajectory):
    exact = trajectory.dtype == jnp.float64
    expected = golden.arrays("grass_tiny")
    np.testing.assert_allclose(trajectory.rates, expected["traj/lr"], rtol=0, atol=1e-9)
    losses_found = [[terms[k] for k in ("decode", "distill", "aux")] for terms in trajectory.terms]
    limit = 1e-8 if exact else 1e-4
    np.testing.assert_allclose([t["loss"] for t in trajectory.terms], expected["traj/total"], rtol=limit)
    np.testing.assert_allclose(losses_found, expected["traj/components_decode_distill_aux"], rtol=limit)

    final = {k.removeprefix("traj/final/"): v for k, v in expected.items() if k.startswith("traj/final/")}
    final = golden.ours(final, trajectory.final)
    assert len(final) == 8
    for path, reference in final.items():
        assert golden.relative(trajectory.final[path], reference) < (1e-7 if exact else 1e-3), path


def small(**overrides) -> KTDAConfig:
    defaults = dict(
        num_classes=3, student=ConvNeXtConfig((1, 1, 1, 1), (8, 8, 16, 16), drop_path=0.2),
        teacher=ViTConfig(width=16, depth=4, heads=2, image_size=(64, 64)), fmm=FMMConfig(blocks=1, heads=2),
        head_channels=8, aux_channels=8,
    )  # fmt: skip
    return KTDAConfig(**(defaults | overrides))


@pytest.mark.parametrize(
    "overrides, absent",
    [({}, ()), (dict(fam=False), ("fam", "neck")), (dict(fmm=None), ("fmm",)), (dict(aux_channels=0), ("auxiliary",))],
    ids=["full", "no FAM", "no FMM", "no auxiliary head"],
)
def test_ablations_leave_parts_out(overrides, absent):
    graphdef, paths, stats = flat.abstract(lambda: KTDA(small(**overrides), rngs=nnx.Rngs(0)))
    for part in ("fam", "neck", "fmm", "auxiliary"):
        assert any(p.startswith(part) for p in paths) == (part not in absent)

    def forward(params, stats):
        images = np.zeros((2, 64, 64, 3), np.uint8)
        return flat.merge(graphdef, params, stats)(images, train=True, key=jax.random.key(0))

    outputs = jax.eval_shape(forward, paths, stats)
    assert outputs.logits.shape == ((2, 16, 16, 3) if "fam" in absent else (2, 20, 20, 3))
    assert (outputs.aux_logits is None) == ("auxiliary" in absent)
    assert (outputs.student is None) == ("fam" in absent)


@pytest.mark.slow
def test_evaluation_is_deterministic_and_leaves_the_statistics_alone():
    graphdef, params, stats = flat.split(nnx.jit(lambda: KTDA(small(), rngs=nnx.Rngs(0)))())
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)

    @functools.partial(jax.jit, static_argnums=0)
    def forward(train, key):
        model = flat.merge(graphdef, params, stats)
        return model(images, train=train, key=key), flat.batch_stats(model)

    outputs, after = forward(False, None)
    np.testing.assert_array_equal(outputs.logits, forward(False, None)[0].logits)
    assert outputs.aux_logits is None  # only the loss needs it
    assert all(np.array_equal(after[path], stats[path]) for path in stats)
    (a, after), (b, _) = (forward(True, jax.random.key(k)) for k in (0, 1))
    assert not np.array_equal(a.logits, b.logits)
    assert not any(np.array_equal(after[path], stats[path]) for path in stats)


@pytest.mark.slow
def test_bfloat16_computes_in_bfloat16_and_stays_close():
    config = small(student=ConvNeXtConfig((1, 1, 1, 1), (8, 8, 16, 16)))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), np.uint8)

    def forward(dtype):
        model = KTDA(config, dtype=dtype, rngs=nnx.Rngs(0))
        assert {p.dtype for p in flat.split(model)[1].values()} == {jnp.dtype(jnp.float32)}
        return model(images)

    outputs, full = (jax.jit(forward, static_argnums=0)(d) for d in (jnp.bfloat16, jnp.float32))
    assert outputs.logits.dtype == outputs.student[0].dtype == jnp.bfloat16
    assert golden.relative(outputs.student[3], full.student[3]) < 0.05


def test_the_teacher_sees_the_chosen_bands():
    """Five bands of which 4, 2 and 0 are red, green, blue; the student sees all, its colours normalised as such."""
    config = small(fmm=None, aux_channels=0, rgb=(4, 2, 0), student=dataclasses.replace(small().student, bands=5))
    model, teacher = KTDA(config, rngs=nnx.Rngs(0)), ViT(config.teacher, rngs=nnx.Rngs(1))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 5), np.uint8)
    ours = jax.jit(lambda images: model(images, teacher=teacher).taps)(images)  # jit leaves the rest out
    theirs = jax.jit(lambda images: teacher(normalize(images, jnp.float32)))(images[..., [4, 2, 0]])
    for tap, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(tap, expected, atol=1e-5)
    mean, std = band_statistics(5, (4, 2, 0))
    np.testing.assert_array_equal(mean[[4, 2, 0]], MEAN)
    np.testing.assert_allclose(std[[1, 3]], np.mean(STD))
    np.testing.assert_array_equal(band_statistics(3, (0, 1, 2)), (MEAN, STD))
    np.testing.assert_allclose(band_statistics(1, (0, 0, 0)), [[np.mean(MEAN)], [np.mean(STD)]])
    with pytest.raises(ValueError, match=r"rgb is \(0, 1, 5\); give three positions among the 5 bands"):
        dataclasses.replace(config, rgb=(0, 1, 5))


def test_base_model_has_the_published_parameters():
    published = json.loads((golden.GOLDENS / "parameters_base.json").read_text())
    config = KTDAConfig.from_dict(
        dict(num_classes=5, student=dict(preset="base", drop_path=0.4), teacher=dict(preset="base"))
    )
    _, params, _ = flat.abstract(lambda: KTDA(config, rngs=nnx.Rngs(0)))
    shapes = {}
    for row in published:
        path = mmseg.our_path(row["name"])
        assert path is not None, row["name"]
        zeros = np.broadcast_to(np.float32(0), row["shape"])
        shapes[path] = to_our_layout(zeros, path).shape
    assert shapes == {k: v.shape for k, v in params.items()}
    assert round(flat.count(params) / 1e6, 1) == 260.1


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(student=dict(preset="huge")), "config.model.student.preset is 'huge'; known: laptop, tiny, small, base"),
        (dict(student=dict(depth=3)), "config.model.student.depth is not a setting; known: depths"),
        (dict(teacher=dict(width=8)), "config.model.teacher lacks depth, heads"),
        (dict(fmm=dict(form="cnn")), "config.model.fmm.form is 'cnn'; choose 'transformer' or 'mlp'"),
        (dict(student=dict(preset="tiny", depths=(1, 1))), "config.model.student.depths is (1, 1); give four numbers"),
        (dict(neck=1), "config.model.neck is not a setting"),
    ],
)
def test_unknown_settings_are_named(values, message):
    base = dict(num_classes=2, student=dict(preset="tiny"), teacher=dict(preset="small"))
    with pytest.raises(ValueError, match=re.escape(message)):
        KTDAConfig.from_dict(base | values)
