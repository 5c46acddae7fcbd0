"""Losses against torch and by hand; the reference's own numbers are in test_ktda.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ktda_jax.config import settings
from ktda_jax.training import losses


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 5, 7, 4)).astype(np.float32)
    labels = rng.integers(0, 4, (2, 5, 7)).astype(np.uint8)
    labels[0, :2] = 255
    return logits, labels


def test_mean_counts_ignored_pixels_unless_told_otherwise(pixels):
    torch = pytest.importorskip("torch")
    logits, labels = pixels
    args = torch.tensor(logits).movedim(-1, 1), torch.tensor(labels).long()
    per_pixel = torch.nn.functional.cross_entropy(*args, ignore_index=255, reduction="none")
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), per_pixel.mean(), rtol=1e-6)
    valid_only = torch.nn.functional.cross_entropy(*args, ignore_index=255)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, avg_non_ignore=True), valid_only, rtol=1e-6)


def test_class_weights_as_torch(pixels):
    torch = pytest.importorskip("torch")
    logits, labels = pixels
    weights = (0.5, 1.0, 2.0, 4.0)
    args = torch.tensor(logits).movedim(-1, 1), torch.tensor(labels).long(), torch.tensor(weights)
    weighted = torch.nn.functional.cross_entropy(*args, ignore_index=255)
    ours = losses.cross_entropy(logits, labels, class_weights=weights, avg_non_ignore=True)
    np.testing.assert_allclose(ours, weighted, rtol=1e-6)
    total = torch.nn.functional.cross_entropy(*args, ignore_index=255, reduction="sum") / labels.size
    np.testing.assert_allclose(losses.cross_entropy(logits, labels, class_weights=weights), total, rtol=1e-6)


@pytest.mark.parametrize("avg_non_ignore", [False, True])
def test_a_batch_without_labels_is_zero_and_has_no_gradient(pixels, avg_non_ignore):
    logits, labels = pixels
    labels = np.full_like(labels, 255)
    value, grad = jax.value_and_grad(lambda x: losses.cross_entropy(x, labels, avg_non_ignore=avg_non_ignore))(logits)
    assert float(value) == 0 and not np.any(grad)


@pytest.mark.parametrize("axis, dims", [("width", (3,)), ("channel", (1,)), ("position", (2, 3))])
def test_kl_axes_against_torch(axis, dims):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    s, t = (torch.tensor(rng.normal(size=(2, 6, 4, 5)).astype(np.float32)) for _ in range(2))  # NCHW

    def flat(x):  # the softmax axes last, joined
        x = x.movedim(dims, tuple(range(4 - len(dims), 4))) / 2.0
        return x.flatten(4 - len(dims))

    expected = torch.nn.functional.kl_div(
        flat(s).log_softmax(-1), flat(t).softmax(-1), reduction="sum"
    ) / len(s)  # fmt: skip
    ours = losses.kl_divergence(
        *(jnp.asarray(x.movedim(1, -1).numpy()) for x in (s, t)), temperature=2.0, axis=axis
    )  # fmt: skip
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


def test_half_precision_maps_are_compared_in_float32():
    s, t = (jnp.full((1, 2, 2, 3), v, jnp.bfloat16) for v in (1.0, 2.0))
    assert losses.distillation([s], [t], alpha=0.5).dtype == jnp.float32


def test_levels_without_a_tap_do_not_count():
    student = [jnp.full((1, 2, 2, 3), float(k)) for k in range(4)]
    taps = [None, jnp.zeros((1, 2, 2, 3)), None, jnp.zeros((1, 2, 2, 3))]
    assert float(losses.distillation(student, taps, alpha=0.0)) == (1 + 9) / 2 / 2  # upstream halves the MSE
    gradient = jax.grad(lambda s: losses.distillation(s, taps))(student)
    assert not gradient[0].any() and not gradient[2].any() and gradient[3].any()


def test_maps_of_different_size_are_refused_by_name():
    s, t = jnp.zeros((1, 19, 19, 8)), jnp.zeros((1, 37, 37, 8))
    with pytest.raises(ValueError, match=r"FAM's output is 19x19x8 .* teacher's features are 37x37x8"):
        losses.distillation([s], [t])


def test_the_axes_are_those_of_the_settings():
    assert tuple(losses.KL_AXES) == settings.KL_AXES


def test_distances_and_weights_by_hand():
    """mse is the plain mean, not halved; cosine is over channels; weights multiply levels; the mean is over taps."""
    rng = np.random.default_rng(2)
    s, t = ([rng.normal(size=(2, 3, 4, 5)).astype(np.float32) for _ in range(4)] for _ in range(2))
    t[1] = None
    weights = (2.0, 7.0, 0.0, 0.5)
    squares = [np.square(a - b).mean() for a, b in zip(s, t, strict=True) if b is not None]
    np.testing.assert_allclose(losses.distillation(s, t, distance="mse"), np.mean(squares), rtol=1e-6)
    weighted = losses.distillation(s, t, distance="mse", weights=weights)
    np.testing.assert_allclose(weighted, np.dot([2, 0, 0.5], squares) / 3, rtol=1e-6)
    cosines = [
        1 - ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean()
        for a, b in zip(s, t, strict=True)
        if b is not None
    ]
    np.testing.assert_allclose(losses.distillation(s, t, distance="cosine"), np.mean(cosines), rtol=1e-6)
    zeros = [np.zeros_like(a) for a in s]
    grads = jax.grad(lambda x: losses.distillation(x, t, distance="cosine"))(zeros)
    assert all(np.isfinite(g).all() for g in grads)
