"""Resizing, pooling, BatchNorm and convolutions are torch's, values and gradients, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch_weights import (
    adopt,
    compiled,
    error,
    gradients,
    nchw,
    nhwc,
    ours,
    random,
    randomize,
    value_and_pullback,
    worst,
)

from ktda_jax.models import flat, initial, layers
from ktda_jax.models.convnext import Downsample


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def assert_equals_torch(function, torch_function, x):
    """Value and gradient of a map from NHWC to NHWC, to 1e-12."""
    tensor = nchw(x).requires_grad_()
    expected = torch_function(tensor)
    cotangent = random(*nhwc(expected).shape, seed=1)
    expected.backward(nchw(cotangent))
    out, gradient = value_and_pullback(function, jnp.asarray(x), jnp.asarray(cotangent))
    assert error(out, nhwc(expected)) < 1e-12
    assert error(gradient, nhwc(tensor.grad)) < 1e-12


# up, down, both at once, to and from one pixel, by no simple factor
SIZES = [((5, 7), (20, 28)), ((37, 19), (19, 9)), ((6, 9), (11, 4)), ((1, 3), (5, 1))]


def both(resize, axis):
    """Both methods' results side by side, so that one program tests them."""
    concatenate = torch.cat if axis == 1 else jnp.concatenate
    return concatenate([resize("bilinear"), resize("bicubic")], axis)


@pytest.mark.parametrize(("source", "target"), SIZES, ids=str)
def test_resize_to_a_size(source, target):
    def torch_resize(x, method):
        return torch.nn.functional.interpolate(x, size=target, mode=method, align_corners=False)

    assert_equals_torch(
        lambda x: both(lambda method: layers.resize(x, target, method=method), -1),
        lambda x: both(lambda method: torch_resize(x, method), 1),
        random(2, *source, 3),
    )


@pytest.mark.parametrize(("source", "factor"), [((19, 8), 0.5), ((7, 4), 4.0), ((5, 6), 1.5)], ids=str)
def test_resize_by_a_factor(source, factor):
    def torch_resize(x, method):
        return torch.nn.functional.interpolate(x, scale_factor=factor, mode=method, align_corners=False)

    size = tuple(int(s * factor) for s in source)
    assert_equals_torch(
        lambda x: both(lambda method: layers.resize(x, size, method=method, scale=1 / factor), -1),
        lambda x: both(lambda method: torch_resize(x, method), 1),
        random(2, *source, 3),
    )


def test_factor_and_size_differ_where_the_factor_does_not_divide():
    x = jnp.asarray(random(1, 19, 19, 2))
    assert error(layers.resize(x, (9, 9), scale=2.0), layers.resize(x, (9, 9))) > 0.1


def test_a_resize_to_the_same_size_is_free():
    x = jnp.asarray(random(1, 4, 5, 2))
    assert layers.resize(x, (4, 5)) is x and layers.resize(x, (4, 5), scale=1.0) is x


@pytest.mark.parametrize("size", [(9, 9), (19, 37), (4, 1)], ids=str)
def test_adaptive_avg_pool(size):
    """The bins of pyramid pooling; they overlap where they do not divide the size or outnumber it."""
    bins = (1, 2, 3, 6)

    def pool(x):
        return jnp.concatenate([layers.adaptive_avg_pool(x, b).reshape(2, -1, 1, 3) for b in bins], 1)

    def torch_pool(x):
        return torch.cat([torch.nn.functional.adaptive_avg_pool2d(x, b).reshape(2, 3, -1, 1) for b in bins], 2)

    assert_equals_torch(pool, torch_pool, random(2, *size, 3))


@pytest.mark.parametrize("function", [lambda x: layers.resize(x, (19, 19)), lambda x: layers.adaptive_avg_pool(x, 6)])
def test_bfloat16_keeps_its_precision(function):
    x = jnp.asarray(random(2, 8, 8, 16), jnp.bfloat16)
    out = function(x)
    assert out.dtype == jnp.bfloat16
    assert error(out, function(x.astype(jnp.float64))) < 5e-3  # a few roundings of 2e-3


def batch_norm():
    return layers.BatchNorm(5, dtype=jnp.float64, param_dtype=jnp.float64)


def test_batch_norm_in_evaluation():
    theirs = randomize(torch.nn.BatchNorm2d(5)).eval()
    graphdef, params, stats = adopt(batch_norm, theirs.state_dict(), [])

    def evaluate(x):
        module = flat.merge(graphdef, params, stats)
        out = module(x, train=False)
        assert flat.batch_stats(module)["mean"] is stats["mean"]  # left alone
        return out

    assert_equals_torch(evaluate, theirs, 2 + random(3, 4, 6, 5))


def test_batch_norm_in_training():
    """Values, all gradients, and running statistics over two steps (torch's running variance is unbiased)."""
    theirs = randomize(torch.nn.BatchNorm2d(5)).train()
    graphdef, params, stats = adopt(batch_norm, theirs.state_dict(), [])
    x, cotangent = (random(2, 3, 2, 2, 5, seed=seed) for seed in (0, 1))
    x = 2 + 3 * x

    def two_steps(primals):
        params, x = primals
        module = flat.merge(graphdef, params, stats)
        return jnp.stack([module(step, train=True) for step in x]), flat.batch_stats(module)

    zeros = jax.tree.map(jnp.zeros_like, stats)
    (out, new_stats), (params_grad, x_grad) = value_and_pullback(
        two_steps, (params, jnp.asarray(x)), (jnp.asarray(cotangent), zeros)
    )
    for k in range(2):
        tensor = nchw(x[k]).requires_grad_()
        expected = theirs(tensor)
        expected.backward(nchw(cotangent[k]))
        assert error(out[k], nhwc(expected)) < 1e-12
        assert error(x_grad[k], nhwc(tensor.grad)) < 1e-11
    assert worst(params_grad, ours(gradients(theirs), [], params))[0] < 1e-12
    assert worst(new_stats, {k: v for k, v in ours(theirs.state_dict(), [], {}).items() if k in stats})[0] < 1e-12


def test_batch_norm_of_one_value_is_finite():
    """Pyramid pooling to one bin with batch 1, where torch refuses to train."""

    def train(x):
        module = batch_norm()
        return module(x, train=True), flat.batch_stats(module)

    x = jnp.asarray(random(1, 1, 1, 5))
    ones = jax.tree.map(lambda v: jnp.ones(v.shape), jax.eval_shape(train, x))
    (out, stats), gradient = value_and_pullback(train, x, ones)
    np.testing.assert_array_equal(out, jnp.zeros_like(x))
    np.testing.assert_allclose(stats["var"], 0.9, rtol=1e-12)  # torch would put NaN here
    assert jnp.isfinite(gradient).all()


def test_batch_norm_statistics_are_wide():
    """bfloat16 sums over 1,024 values would lose the mean of 100; ours are float32."""
    x = jnp.asarray(100 + 10 * random(4, 16, 16, 5), jnp.bfloat16)
    out = layers.BatchNorm(5, dtype=jnp.bfloat16, param_dtype=jnp.float32)(x, train=True)
    assert out.dtype == jnp.bfloat16
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean((0, 1, 2))) / np.sqrt(wide.var((0, 1, 2)) + 1e-5)
    assert error(out, expected) < 5e-3


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_convolution(kernel, bias):
    theirs = randomize(torch.nn.Conv2d(4, 6, kernel, padding=kernel // 2, bias=bias))

    def build():
        settings = dict(use_bias=bias, kernel_init=initial.trunc_normal, dtype=jnp.float64, param_dtype=jnp.float64)
        return layers.conv(4, 6, kernel, rngs=nnx.Rngs(0), **settings)

    assert_equals_torch(compiled(*adopt(build, theirs.state_dict(), [])), theirs, random(2, 5, 8, 4))


@pytest.mark.parametrize("stem", [True, False], ids=["stem", "transition"])
def test_patch_convolution_drops_what_does_not_fill_a_patch(stem):
    stride = 4 if stem else 2
    norm, conv = torch.nn.LayerNorm(6 if stem else 3, eps=1e-6), torch.nn.Conv2d(3, 6, stride, stride)
    theirs = randomize(torch.nn.ModuleDict({"conv": conv, "ln": norm}))

    def build():
        return Downsample(3, 6, stride, stem=stem, dtype=jnp.float64, param_dtype=jnp.float64, rngs=nnx.Rngs(0))

    def torch_function(x):
        def channels_last(x):
            return norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

        return channels_last(conv(x)) if stem else conv(channels_last(x))

    assert_equals_torch(compiled(*adopt(build, theirs.state_dict(), [])), torch_function, random(2, 9, 14, 3))


@pytest.mark.parametrize(("drop", "kept_axes"), [(layers.drop_path, (0,)), (layers.dropout2d, (0, 3))])
def test_drops_whole_units_and_keeps_the_expectation(drop, kept_axes):
    """drop_path drops samples, dropout2d channels of samples; the rest is scaled up."""
    x, rate, draws = jnp.asarray(1 + random(3, 4, 5, 6) ** 2), 0.3, 4000
    ratio = np.asarray(jax.vmap(lambda key: drop(x, rate, key))(jax.random.split(jax.random.key(0), draws)) / x)
    unit = tuple(axis + 1 for axis in range(4) if axis not in kept_axes)
    np.testing.assert_allclose(ratio.max(unit), ratio.min(unit), rtol=1e-12)  # one fate per unit
    is_zero, is_kept = ratio == 0, np.isclose(ratio, 1 / (1 - rate), rtol=1e-12)
    assert (is_zero | is_kept).all() and is_zero.any() and is_kept.any()
    five_sigma = 5 * np.sqrt(rate / (1 - rate) / draws)
    np.testing.assert_allclose(ratio.mean(0), 1, atol=five_sigma)
    fates = ratio[:, :, 0, 0] if drop is layers.dropout2d else ratio[:, :, 0, 0, :1]
    fates = fates.reshape(draws, -1)
    assert np.abs(np.corrcoef(fates.T) - np.eye(fates.shape[1])).max() < 0.1  # units fall independently


@pytest.mark.parametrize("drop", [layers.drop_path, layers.dropout2d])
def test_no_key_or_no_rate_drops_nothing(drop):
    x = jnp.ones((2, 3, 3, 4))
    assert drop(x, 0.5, None) is x and drop(x, 0.0, jax.random.key(0)) is x
