"""Dice, focal and Lovász-softmax loss and hard pixels: against segmentation_models_pytorch, NumPy and by hand.

goldens/region_losses.npz holds what segmentation_models_pytorch 0.6.0 computes in float64. It wants torchvision and
timm, so only its losses are loaded. Its Lovász loss casts to float32 within, which is made float64, too. Made, and held
against it again, by

    pip install --no-deps --target /tmp/smp segmentation_models_pytorch==0.6.0
    cd tests && python -c "import test_region_losses as t; t.np.savez_compressed(t.GOLDEN, **t.of_smp('/tmp/smp'))"
    KTDA_SMP=/tmp/smp python -m pytest tests/test_region_losses.py
"""

import dataclasses
import functools
import importlib
import math
import os
import pathlib
import sys
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ktda_jax.config.settings import Settings
from ktda_jax.data.datasets import IGNORE
from ktda_jax.models.ktda import Outputs, full_size
from ktda_jax.training import losses, region_losses

GOLDEN = pathlib.Path(__file__).parent / "goldens" / "region_losses.npz"
OURS = {
    "dice": region_losses.dice,
    "focal": region_losses.focal,
    "focal_half": functools.partial(region_losses.focal, gamma=0.5),
    "lovasz": region_losses.lovasz,
}
ALL = OURS | {"hard": functools.partial(losses.cross_entropy, hard_share=0.3)}


def pixels() -> dict[str, np.ndarray]:
    """Some of them ignored, the last class in none, and some predicted with confidence."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (2, 4, 6)).astype(np.uint8)
    labels[0, :2, :3] = IGNORE
    return {"logits": 3 * rng.normal(size=(2, 4, 6, 4)), "labels": labels}


def of_smp(folder: str) -> dict[str, np.ndarray]:
    """`pixels`, and each loss with its gradient with respect to the logits, by the package in that folder."""
    import torch

    package = types.ModuleType("segmentation_models_pytorch")  # its own __init__ wants torchvision
    package.__path__ = [os.path.join(folder, package.__name__)]
    sys.modules[package.__name__] = package
    smp = importlib.import_module(f"{package.__name__}.losses")
    common = dict(mode="multiclass", ignore_index=IGNORE)
    found = pixels()
    for name, loss in {
        "dice": smp.DiceLoss(**common, from_logits=True, smooth=0.0, eps=1e-7),
        "focal": smp.FocalLoss(**common, gamma=2.0),
        "focal_half": smp.FocalLoss(**common, gamma=0.5),
        "lovasz": smp.LovaszLoss(**common, per_image=False, from_logits=True),
    }.items():
        logits = torch.tensor(found["logits"], requires_grad=True)
        with mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
            value = loss(logits.movedim(-1, 1), torch.tensor(found["labels"]).long())
        value.backward()
        found |= {name: value.item(), f"{name}/gradient": logits.grad.numpy()}
    return found


def value_and_grad(loss, logits, labels):
    return jax.jit(jax.value_and_grad(loss))(jnp.asarray(logits), jnp.asarray(labels))


@pytest.mark.skipif("KTDA_SMP" not in os.environ, reason="needs the losses of segmentation_models_pytorch")
def test_the_goldens_are_those_of_smp():
    with np.load(GOLDEN) as golden:
        found = of_smp(os.environ["KTDA_SMP"])
        assert set(found) == set(golden)
        for name, value in golden.items():
            np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("name", OURS)
def test_value_and_gradient_are_those_of_smp(name):
    with np.load(GOLDEN) as golden, jax.enable_x64(True):
        value, gradient = value_and_grad(OURS[name], golden["logits"], golden["labels"])
        assert value.dtype == jnp.float64
        np.testing.assert_allclose(value, golden[name], rtol=1e-9)
        np.testing.assert_allclose(gradient, golden[f"{name}/gradient"], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_ignored_pixels_say_nothing_and_half_precision_is_widened(name):
    logits, labels = pixels().values()
    logits = logits.astype(np.float32)
    value, gradient = value_and_grad(ALL[name], logits, labels)
    assert not np.any(gradient[labels == IGNORE]) and np.any(gradient[labels != IGNORE])
    other = np.where((labels == IGNORE)[..., None], 50.0, logits).astype(np.float32)
    assert value_and_grad(ALL[name], other, labels)[0] == value
    assert ALL[name](jnp.asarray(logits, jnp.bfloat16), labels).dtype == jnp.float32


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_without_labels_a_loss_is_zero_and_nowhere_is_it_nan(name, scale):
    """Also of logits that make float32's probabilities 0 and 1, and of equal ones."""
    logits, labels = pixels().values()
    logits = (scale * logits).astype(np.float32)
    value, gradient = value_and_grad(ALL[name], logits, np.full_like(labels, IGNORE))
    assert float(value) == 0 and not np.any(gradient)
    for given in (labels, np.zeros_like(labels)):
        value, gradient = value_and_grad(ALL[name], logits, given)
        assert np.isfinite(value) and np.isfinite(gradient).all()
    value, gradient = value_and_grad(ALL[name], logits[..., :1], np.zeros_like(labels))  # one class
    assert np.isfinite(value) and np.isfinite(gradient).all()
    if not name.startswith("focal"):  # which knows no softmax
        assert abs(float(value)) < 1e-6 and not np.any(gradient)


def test_by_hand():
    """Two pixels of class 0 with probabilities 3/4 and 1/2, class 1 in no label, one pixel ignored."""
    p = np.array([0.75, 0.5, 0.1])
    logits = np.stack([np.log(p), np.log(1 - p)], -1)[None, None]
    labels = np.array([[[0, 0, IGNORE]]], np.uint8)
    dice = 1 - 2 * 1.25 / (1.25 + 2)
    np.testing.assert_allclose(region_losses.dice(logits, labels), dice / 2, rtol=1e-6)  # class 1 adds 0 of 2
    # 1 - IoU is 1/2 with the worse pixel wrong and 1 with both; class 1 is not in the mean.
    np.testing.assert_allclose(region_losses.lovasz(logits, labels), 0.5 * 0.5 + 0.25 * 0.5, rtol=1e-6)
    sigmoid = 1 / (1 + np.exp(-logits[0, 0, :2]))
    truth = np.where([True, False], sigmoid, 1 - sigmoid)
    np.testing.assert_allclose(
        region_losses.focal(logits, labels, gamma=3.0), ((1 - truth) ** 3 * -np.log(truth)).mean(), rtol=1e-6
    )
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, hard_share=0.5), np.log(2), rtol=1e-6)


def test_the_steps_of_many_pixels_in_float32():
    """Algorithm 1 in float64; in float32 it would be wrong by percents."""
    rng = np.random.default_rng(1)
    count = 2**17
    errors, inside = rng.permutation(count).astype(np.float32) / count, rng.random(count) < 0.05
    valid = rng.random(count) < 0.9
    inside &= valid
    order = np.argsort(-errors)
    order = order[valid[order]]
    size, hits = inside.sum(), inside[order].cumsum()
    jaccard = 1 - (size - hits) / (size + (~inside[order]).cumsum())
    expected = np.zeros(count)
    expected[order] = np.diff(jaccard, prepend=0)
    found = region_losses._jaccard_steps(jnp.asarray(errors), jnp.asarray(inside), jnp.asarray(valid))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.3, 0.6, 1.0])
def test_the_hardest_pixels_by_a_sort(share):
    """105 labelled ones with many ties: 0.6 * 105 is above 63 in float32, so whole numbers have to count."""
    rng = np.random.default_rng(2)
    nll, labels = rng.integers(0, 6, (2, 8, 8)) / 4, rng.integers(0, 3, (2, 8, 8)).astype(np.uint8)
    labels.reshape(-1)[rng.permutation(128)[:23]] = IGNORE
    count = max(math.ceil(round(share * 105, 3)), 1)
    valid = np.flatnonzero(labels != IGNORE)
    expected = np.zeros(128, bool)
    expected[valid[np.argsort(-nll.reshape(-1)[valid], kind="stable")[:count]]] = True
    found = jax.jit(region_losses.hardest, static_argnums=2)(nll, labels, share)
    np.testing.assert_array_equal(found.reshape(-1), expected)


@pytest.mark.parametrize("weights", [None, (0.5, 1.0, 8.0, 1.0)])
@pytest.mark.parametrize("share", [0.1, 0.25, 1.0])
def test_the_mean_over_hard_pixels(weights, share):
    """A sort in NumPy, class weights carried along; the share of all is the mean over labelled pixels."""
    logits, labels = pixels().values()
    with jax.enable_x64(True):
        logits[1, 2:] = logits[1, 2, :1]  # ties among pixels of a class
        nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, (labels % IGNORE)[..., None], -1)[..., 0]
        valid = labels != IGNORE
        each = np.ones(valid.sum()) if weights is None else np.asarray(weights)[labels[valid]]
        worst = np.argsort(-nll[valid], kind="stable")[: math.ceil(share * valid.sum())]
        expected = np.average(nll[valid][worst], weights=each[worst])
        found = losses.cross_entropy(jnp.asarray(logits), labels, class_weights=weights, hard_share=share)
        np.testing.assert_allclose(found, expected, rtol=1e-6)
        if share == 1:
            plain = losses.cross_entropy(jnp.asarray(logits), labels, class_weights=weights, avg_non_ignore=True)
            np.testing.assert_allclose(found, plain, rtol=1e-14)


def test_rows_of_several_devices_are_one_set_of_pixels():
    logits, labels = pixels().values()
    logits = logits.astype(np.float32)
    rows = NamedSharding(Mesh(np.array(jax.devices()[:2]), "x"), PartitionSpec("x"))
    for name, loss in ALL.items():
        value, gradient = value_and_grad(loss, jax.device_put(logits, rows), jax.device_put(labels, rows))
        expected, expected_gradient = value_and_grad(loss, logits, labels)
        np.testing.assert_allclose(value, expected, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient, expected_gradient, atol=1e-7, err_msg=name)


def outputs() -> tuple[Outputs, np.ndarray]:
    rng = np.random.default_rng(3)
    logits, aux, student, taps = (jnp.asarray(rng.normal(size=(2, 4, 6, 4)), jnp.float32) for _ in range(4))
    labels = rng.integers(0, 4, (2, 8, 12)).astype(np.uint8)
    labels[0, :3] = IGNORE
    return Outputs(logits, aux, [student], [taps]), labels


def config(**given):
    return dataclasses.replace(runs.settings(pathlib.Path("unused")).loss, **given)


def former_cross_entropy(logits, labels, avg_non_ignore, class_weights):
    """As it was before other losses could be mixed in."""
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    valid = labels != IGNORE
    index = jnp.where(valid, labels, 0).astype(jnp.int32)
    nll = -jnp.take_along_axis(log_probabilities, index[..., None], axis=-1)[..., 0]
    weights = valid.astype(nll.dtype)
    if class_weights is not None:
        weights = weights * jnp.asarray(class_weights, nll.dtype)[index]
    total = weights.sum() if avg_non_ignore else labels.size
    return (nll * weights).sum() / (total + losses.EPS)


@pytest.mark.parametrize("given", [{}, {"avg_non_ignore": True, "class_weights": (1.0, 2.0, 4.0, 0.5)}])
def test_without_other_losses_the_computation_is_the_former_one(given):
    made, labels = outputs()
    settings = config(**given)

    def former(made):
        sizes = (full_size(x, labels.shape[1:]) for x in (made.logits, made.aux_logits))
        decode, aux = (former_cross_entropy(x, labels, settings.avg_non_ignore, settings.class_weights) for x in sizes)
        distill = losses.distillation(made.student, made.taps, alpha=settings.alpha)
        return decode + settings.aux_weight * aux + distill

    def ours(made):
        return losses.total_loss(made, labels, settings)[0]

    before, now = (jax.jit(jax.value_and_grad(f))(made) for f in (former, ours))
    jax.tree.map(np.testing.assert_array_equal, now, before)
    assert list(losses.total_loss(made, labels, settings)[1]) == ["loss", "decode", "aux", "distill", "acc"]


def test_a_mixture_is_the_weighted_sum_in_both_heads():
    made, labels = outputs()
    settings = config(cross_entropy=0.5, dice=2.0, focal=3.0, focal_gamma=1.0, lovasz=0.25, hard_share=0.4)
    loss, terms = losses.total_loss(made, labels, settings)

    def parts(logits):
        logits = full_size(logits, labels.shape[1:])
        return {
            "cross_entropy": 0.5
            * losses.cross_entropy(logits, labels, class_weights=settings.class_weights, hard_share=0.4),
            "dice": 2.0 * region_losses.dice(logits, labels),
            "focal": 3.0 * region_losses.focal(logits, labels, gamma=1.0),
            "lovasz": 0.25 * region_losses.lovasz(logits, labels),
        }

    main, aux = parts(made.logits), parts(made.aux_logits)
    np.testing.assert_allclose(terms["decode"], sum(main.values()), rtol=1e-6)
    np.testing.assert_allclose(terms["aux"], settings.aux_weight * sum(aux.values()), rtol=1e-6)
    np.testing.assert_allclose(loss, terms["decode"] + terms["aux"] + terms["distill"], rtol=1e-6)
    assert set(terms) == {"loss", "decode", "aux", "distill", "acc", *main}
    for name, value in main.items():
        np.testing.assert_allclose(terms[name], value, rtol=1e-6)
    alone, terms = losses.total_loss(made, labels, config(cross_entropy=0.0, dice=1.0))
    np.testing.assert_allclose(terms["decode"], terms["dice"])
    np.testing.assert_allclose(alone, terms["decode"] + terms["aux"] + terms["distill"], rtol=1e-6)
    assert set(terms) == {"loss", "decode", "aux", "distill", "acc", "dice"}


def test_a_config_from_before_is_the_cross_entropy_alone():
    before = runs.config(pathlib.Path("unused")).to_dict()
    for name in ("cross_entropy", "dice", "focal", "focal_gamma", "lovasz", "hard_share"):
        del before["loss"][name]
    assert Settings.of(before).loss == config()
